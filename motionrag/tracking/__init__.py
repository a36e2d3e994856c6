"""Where the content of frame 0 goes in a video: tracks of points, and dense flow.

`points.py` and `dense.py` are the entrances, `optical_flow.py` is the tracker that needs no weights, `raft.py` and
`cotracker.py` are learned, `chain.py` is what the first two share. Another tracker is any callable like `Tracker`.

Coordinates are x then y in pixels, counted from the centre of the upper left pixel: (0, 0) is that pixel, as in arrays,
OpenCV and CoTracker.
"""

from motionrag.tracking.cotracker import CoTracker
from motionrag.tracking.dense import DenseTracker, dense_flow, dense_tracker
from motionrag.tracking.optical_flow import OpticalFlowTracker
from motionrag.tracking.points import TRACKERS, Tracker, load_tracker, track_points
from motionrag.tracking.raft import Raft

__all__ = [
    "TRACKERS",
    "CoTracker",
    "DenseTracker",
    "OpticalFlowTracker",
    "Raft",
    "Tracker",
    "dense_flow",
    "dense_tracker",
    "load_tracker",
    "track_points",
]
