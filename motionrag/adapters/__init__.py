"""Adapters act at leaves of a frozen backbone and leave no trace: nothing of the backbone is subclassed or rewritten.

`injection.py` is the mechanism (attach, detach), `attention.py` what MotionRAG adds with it.
"""

from motionrag.adapters.attention import AttentionInjection, InjectedEffect

__all__ = ["AttentionInjection", "InjectedEffect"]
