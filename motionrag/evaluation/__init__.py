"""Evaluation: one metric per file, the material they are measured on, and the report.

`motionrag evaluate pocket` runs it; `docs/evaluation.md` says what is measured and why it is measured that way.
"""

from motionrag.evaluation.pocket import QUICK, Sizes, evaluate_pocket
from motionrag.evaluation.report import PocketReport
from motionrag.evaluation.track_error import track_errors

__all__ = ["QUICK", "PocketReport", "Sizes", "evaluate_pocket", "track_errors"]
