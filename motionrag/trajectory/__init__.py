"""The conditions of MotionPro as pure functions: region trajectories, motion masks, dense flow, camera moves.

`region.py` is the entrance: ways drawn by people, and `rasterise`. `mask.py` reads brushes, `dense.py` and
`sampling.py` make the condition from tracked video, `camera.py` from camera moves. `tracks.py` and `formats/` read and
write track files, `draw.py` shows them. Nothing here knows a model.
"""

from motionrag.trajectory.camera import (
    CAMERA_MOVES,
    CameraFlow,
    CameraPath,
    camera_flow,
    named_poses,
    pose_flow,
    read_poses,
)
from motionrag.trajectory.dense import flow_from_tracks, merge_flows
from motionrag.trajectory.draw import draw_on_video, draw_trajectories
from motionrag.trajectory.formats import FORMATS, BenchItem, bench_items, read_tracks, write_tracks
from motionrag.trajectory.mask import polygon_mask, read_mask
from motionrag.trajectory.region import BLOCK, RegionTrajectory, interpolate, rasterise
from motionrag.trajectory.sampling import keep_blocks, motion_bucket, motion_mask, sample_regions, spread_blocks
from motionrag.trajectory.tracks import Tracks

__all__ = [
    "BLOCK",
    "CAMERA_MOVES",
    "FORMATS",
    "BenchItem",
    "CameraFlow",
    "CameraPath",
    "RegionTrajectory",
    "Tracks",
    "bench_items",
    "camera_flow",
    "draw_on_video",
    "draw_trajectories",
    "flow_from_tracks",
    "interpolate",
    "keep_blocks",
    "merge_flows",
    "motion_bucket",
    "motion_mask",
    "named_poses",
    "polygon_mask",
    "pose_flow",
    "rasterise",
    "read_mask",
    "read_poses",
    "read_tracks",
    "sample_regions",
    "spread_blocks",
    "write_tracks",
]
