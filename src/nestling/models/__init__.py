"""Backbones, the nested network, calibration; ``build.build_model`` makes them from names."""
