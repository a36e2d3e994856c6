"""Evaluation: one metric per file, the material they are measured on, and the report.

`motionrag evaluate pocket` measures retrieval, `motionrag evaluate pocket-control` trajectories; `docs/evaluation.md`
says what is measured and why it is measured that way.
"""

from motionrag.evaluation.control_report import ControlReport
from motionrag.evaluation.pocket import QUICK, Sizes, evaluate_pocket
from motionrag.evaluation.pocket_control import ControlSizes, evaluate_pocket_control
from motionrag.evaluation.report import PocketReport
from motionrag.evaluation.track_error import track_errors

__all__ = [
    "QUICK",
    "ControlReport",
    "ControlSizes",
    "PocketReport",
    "Sizes",
    "evaluate_pocket",
    "evaluate_pocket_control",
    "track_errors",
]
