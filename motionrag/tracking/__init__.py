"""Where the content of frame 0 goes in a video: tracks of points, and dense flow.

`points.py` is the entrance, `optical_flow.py` the tracker that needs no weights, `cotracker.py` the learned one, for
those who have it. Another tracker is any callable like `Tracker`.

Coordinates are x then y in pixels, counted from the centre of the upper left pixel: (0, 0) is that pixel, as in arrays,
OpenCV and CoTracker.
"""

from motionrag.tracking.cotracker import CoTracker
from motionrag.tracking.optical_flow import OpticalFlowTracker, dense_flow
from motionrag.tracking.points import TRACKERS, Tracker, load_tracker, track_points

__all__ = [
    "TRACKERS",
    "CoTracker",
    "OpticalFlowTracker",
    "Tracker",
    "dense_flow",
    "load_tracker",
    "track_points",
]
