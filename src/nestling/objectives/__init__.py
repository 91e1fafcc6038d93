"""Formulas (``functional``), terms that use them, and the reducers that make a scalar of a term."""
