"""The one training loop: ``fit`` and what it stands on. Import from the modules; this package imports no torch."""
