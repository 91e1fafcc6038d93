"""Sphinx, with Markdown by MyST: ``make docs`` builds docs/_build, and a warning is an error."""

from __future__ import annotations

import tomllib
from pathlib import Path

_project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "Nestling"
author = "The Nestling contributors"
copyright = f"2026, {author}"
release = _project["version"]
version = ".".join(release.split(".")[:2])

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = f"Nestling {release}"
html_show_sphinx = False
html_copy_source = False
