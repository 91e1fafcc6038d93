"""One self-contained page about a trained model, and the card that its bundle carries.

``content``   what a report is made from: Content, Curve, Example
``html``      render(content) -> the page; ``template.html`` is its layout
``summary``   headline, table, where the model is unsure: numbers only
``plots``     the look of every figure; ``comparison``, ``calibration``, ``curves``, ``icicle`` draw them
``examples``  the grid of test rows
``card``      render_card(...) -> the model card, README.md of the bundle
"""

from nestling.report.card import render_card
from nestling.report.content import Content, Curve, Example
from nestling.report.html import render

__all__ = ["Content", "Curve", "Example", "render", "render_card"]
