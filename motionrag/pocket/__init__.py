"""Pocket, the embedded default: a small backbone, encoders and bundle that need no download, and the world they know.

`world/` is that world; `clips.py` its training sets; `initialise.py` and `recipe.py` make the weights from nothing;
`weights/` is the result, an ordinary bundle folder with a model card; `demo.py` shows it. A second bundle on another
backbone, which can be dragged, lies in `weights/control/`: `initialise_control.py`, `demo_control.py`.
"""
