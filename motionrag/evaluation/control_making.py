"""What makes the videos of the control evaluation: requests in, frames out, and what control costs."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from motionrag.control import control_flow
from motionrag.evaluation.material import REFERENCES
from motionrag.pipeline import MotionRAGPipeline
from motionrag.pocket.world import NUM_FRAMES, SIZE
from motionrag.trajectory import RegionTrajectory


@dataclass(frozen=True)
class Request:
    """What one video is made from.

    Attributes:
        image: `(h w 3)` uint8.
        noise: Seed of the noise.
        ways: Key points of each `(p 2)`, pixels; none for a video that is not controlled.
        brush: `(h w)` bool: what may move, of a controlled video.
        caption: Searches the database; None for no retrieval.
        control_guidance_scale: None for the bundle's own.
    """

    image: np.ndarray
    noise: int
    ways: tuple[np.ndarray, ...] = ()
    brush: np.ndarray | None = None
    caption: str | None = None
    control_guidance_scale: float | None = None


Make = Callable[[Sequence[Request]], Tensor]
"""Requests of one row to frames `(b t h w 3)` uint8."""


class PipelineMaker:
    """Makes videos with a pipeline.

    Args:
        pipe: The pipeline; captions search its database at that time.
        num_inference_steps: None for the bundle's default.
    """

    def __init__(self, pipe: MotionRAGPipeline, num_inference_steps: int | None = None) -> None:
        self.pipe, self.num_inference_steps = pipe, num_inference_steps

    def __call__(self, requests: Sequence[Request]) -> Tensor:
        """Make videos.

        Args:
            requests: Of one row: all are controlled alike or none is, all retrieve or none does.

        Returns:
            Frames `(b t h w 3)` uint8.
        """
        if requests[0].caption is None:
            retrieval: dict[str, Any] = {"num_references": 0}
        else:
            retrieval = {"num_references": REFERENCES, "retrieval_weights": {"text": 1.0}}
        frames = self.pipe(
            [Image.fromarray(request.image) for request in requests],
            [request.caption or "" for request in requests],
            flow=torch.stack([_flow(request) for request in requests]) if requests[0].ways else None,
            height=SIZE,
            width=SIZE,
            num_frames=NUM_FRAMES,
            generator=[torch.Generator().manual_seed(request.noise) for request in requests],
            num_inference_steps=self.num_inference_steps,
            control_guidance_scale=requests[0].control_guidance_scale,
            output_type="np",
            **retrieval,
        ).frames
        return torch.from_numpy((frames.clip(0, 1) * 255).round().astype(np.uint8))

    def cost(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Measure what control costs: every request without it, with it and guided in turn, under the same load.

        Args:
            requests: Controlled ones. One more run of the first warms up.

        Returns:
            Medians: `step` and `controlled_step`, seconds of one call of the denoiser, without and with control that
            is not guided; `step_ratio` of these, run by run, and `guided_step_ratio`, with the bundle's guidance;
            `encoding`, seconds that the first call of a controlled video takes longer than its others, beyond what
            an uncontrolled video's first call does, and `encoding_in_steps`, that in steps; and how many `runs`.
        """
        runs = []
        for request in [requests[0], *requests]:
            unguided = replace(request, control_guidance_scale=1.0)
            ways = (replace(request, ways=(), brush=None), unguided, request)
            runs.append([self._call_times(each) for each in ways])
        steps = [[statistics.median(times[1:]) for times in run] for run in runs[1:]]
        encodings = [
            (with_it[0] - controlled) - (plain[0] - step)
            for (plain, with_it, _), (step, controlled, _) in zip(runs[1:], steps, strict=True)
        ]
        step = statistics.median(each[0] for each in steps)
        return {
            "step": step,
            "controlled_step": statistics.median(each[1] for each in steps),
            "step_ratio": statistics.median(controlled / plain for plain, controlled, _ in steps),
            "guided_step_ratio": statistics.median(guided / plain for plain, _, guided in steps),
            "encoding": statistics.median(encodings),
            "encoding_in_steps": statistics.median(encodings) / step,
            "runs": len(requests),
        }

    def _call_times(self, request: Request) -> list[float]:
        """Seconds of each call of the denoiser, with what its adapters and their guidance do before, in and after it.

        A first guided call places the hook of guidance behind these: `cost` warms up with one.
        """
        begins, times = [], []
        [denoiser] = self.pipe.denoisers
        hooks = [
            denoiser.register_forward_pre_hook(lambda *_: begins.append(time.perf_counter()), prepend=True),
            denoiser.register_forward_hook(lambda *_: times.append(time.perf_counter() - begins[-1])),
        ]
        try:
            self([request])
        finally:
            for hook in hooks:
                hook.remove()
        return times


def _flow(request: Request) -> Tensor:
    """`(f 3 h w)`: the condition."""
    ways = [RegionTrajectory(way, may_leave=True) for way in request.ways]
    size = (SIZE, SIZE)
    return control_flow(
        image_size=size, video_size=size, num_frames=NUM_FRAMES, trajectories=ways, motion_mask=request.brush
    )
