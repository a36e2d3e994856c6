"""Adapters act at leaves of a frozen backbone and leave no trace: nothing of the backbone is subclassed or rewritten.

`injection.py` is the mechanism (attach, detach), `attention.py` what MotionRAG adds with it, `modulation.py` what
MotionPro does; `guidance.py` strengthens either.
"""

from motionrag.adapters.attention import AttentionInjection, InjectedEffect
from motionrag.adapters.guidance import AdapterGuidance
from motionrag.adapters.modulation import FeatureModulation, published_group_norm

__all__ = ["AdapterGuidance", "AttentionInjection", "FeatureModulation", "InjectedEffect", "published_group_norm"]
