"""Tracking without weights: OpenCV's optical flow DIS from each frame to the next, chained from frame 0."""

from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from motionrag.tracking.chain import follow


class OpticalFlowTracker:
    """Follows points by chained optical flow.

    Attributes:
        name: What results of this tracker are labelled with.
    """

    name = "optical-flow"

    def __call__(self, frames: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Follow points.

        Args:
            frames: `(t 3 h w)` uint8.
            points: `(n 2)` float32, in frame 0. One outside the frame moves like the nearest pixel, unseen.

        Returns:
            tracks `(n t 2)` float32 and visible `(n t)` bool.

        Raises:
            ImportError: If OpenCV is not installed.
        """
        return follow(frames, points, _Dis(_opencv()))


class _Dis:
    def __init__(self, cv2: Any) -> None:
        self.cv2 = cv2
        self.estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def pictures(self, frames: Tensor, factor: int) -> list[np.ndarray]:
        return [self._grey(frame, factor) for frame in frames]

    def between(self, before: np.ndarray, after: np.ndarray) -> Tensor:
        return torch.from_numpy(self.estimator.calc(before, after, None))

    def _grey(self, frame: Tensor, factor: int) -> np.ndarray:
        colours = np.ascontiguousarray(rearrange(frame, "c h w -> h w c").numpy())
        picture: np.ndarray = self.cv2.cvtColor(colours, self.cv2.COLOR_RGB2GRAY)
        if factor == 1:
            return picture
        height, width = picture.shape
        return self.cv2.resize(picture, (width * factor, height * factor), interpolation=self.cv2.INTER_CUBIC)  # type: ignore[no-any-return] # an array


def _opencv() -> Any:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ImportError("Tracking by optical flow needs OpenCV: pip install 'motionrag[control]'") from error
    return cv2
