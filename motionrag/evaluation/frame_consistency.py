"""Frame consistency: how alike neighbouring frames look to an image encoder, -1 to 1.

A still video reaches 1, so it says nothing alone: read it beside a figure of motion.
"""

from torch import Tensor
from torch.nn import functional as F


def frame_consistency(features: Tensor) -> Tensor:
    """Mean cosine between the features of each frame and the next.

    Args:
        features: `(t d)`: one vector for each frame.

    Returns:
        Scalar, -1 to 1.

    Raises:
        ValueError: If there are fewer than two frames.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"Frame consistency compares features (t d) of two or more frames; got {tuple(features.shape)}."
        )
    vectors = features.float()
    return F.cosine_similarity(vectors[:-1], vectors[1:], dim=1).mean().clamp(-1, 1)
