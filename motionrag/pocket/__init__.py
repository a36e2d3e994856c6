"""Pocket, the embedded default: a small backbone, encoders and bundle that need no download.

`weights/` is an ordinary bundle folder. In this version its weights are random: they show that everything runs, not
that retrieval helps. `initialise.py` makes them.
"""
