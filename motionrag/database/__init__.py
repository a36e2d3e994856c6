"""Databases of clips with their motion: a Lance table, derived FAISS indexes, and the indexing that fills them."""

from motionrag.database.build import AddReport, IndexingStopped
from motionrag.database.database import FingerprintMismatch, MotionDatabase
from motionrag.database.lock import DatabaseLocked
from motionrag.database.reference import Reference

__all__ = ["AddReport", "DatabaseLocked", "FingerprintMismatch", "IndexingStopped", "MotionDatabase", "Reference"]
