"""The trajectory encoder: sizes, how time is mixed, and what it refuses. Its numbers are in tests/parity."""

import pytest
import torch
from torch.nn import functional as F

from motionrag.models import TrajectoryEncoder
from motionrag.models.trajectory_encoder import SpatioTemporalConvolution


def make(channels=32, level_multipliers=(1, 2, 4)):
    torch.manual_seed(0)
    return TrajectoryEncoder(channels=channels, level_multipliers=level_multipliers).eval()


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_one_feature_for_each_level_finest_first(frames):
    features = make()(torch.randn(2, frames, 3, 32, 64))
    assert [tuple(feature.shape) for feature in features] == [
        (2, frames, 32, 4, 8),
        (2, frames, 64, 2, 4),
        (2, frames, 128, 1, 2),
    ]


def test_the_size_step_is_the_smallest_size_that_divides_evenly():
    for multipliers in ([1], [1, 2], [1, 2, 4, 4]):
        encoder = make(level_multipliers=multipliers)
        step = encoder.size_step
        with torch.no_grad():
            assert encoder(torch.zeros(1, 1, 3, step, 2 * step))[-1].shape[-2:] == (1, 2)
        assert step == 8 * 2 ** (len(multipliers) - 1)


@torch.no_grad()
def test_the_frames_before_the_first_and_after_the_last_repeat_them():
    torch.manual_seed(0)
    convolution = SpatioTemporalConvolution(in_channels=3, mid_channels=4, out_channels=5, stride=2)
    video = torch.randn(2, 3, 3, 6, 8)
    frames = [
        F.conv2d(video[:, t], convolution.spatial.weight, convolution.spatial.bias, 2, 1) for t in (0, 0, 1, 2, 2)
    ]
    actual = convolution(video)
    for t in range(3):
        expected = convolution.temporal.bias[:, None, None] + sum(
            torch.einsum("oi, bihw -> bohw", convolution.temporal.weight[:, :, k], frames[t + k]) for k in range(3)
        )
        torch.testing.assert_close(actual[:, t], expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_videos_do_not_mix_and_a_frame_reaches_a_bounded_time():
    encoder, flow = make(level_multipliers=(1,)), torch.randn(2, 9, 3, 16, 16)
    changed = flow.clone()
    changed[1, 4] += 1
    before, after = encoder(flow)[0], encoder(changed)[0]
    assert torch.equal(before[0], after[0])
    # Three temporal convolutions of three frames: three to each side.
    differs = [not torch.equal(before[1, t], after[1, t]) for t in range(9)]
    assert differs == [False, True, True, True, True, True, True, True, False]


@torch.no_grad()
def test_displacements_in_x_and_y_and_the_mask_are_told_apart():
    encoder, flow = make(), torch.randn(1, 2, 3, 32, 32)
    plain = encoder(flow)[0]
    for order in ([1, 0, 2], [0, 2, 1]):
        assert (encoder(flow[:, :, order])[0] - plain).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 2, 2, 32, 32), (1, 3, 2, 32, 32)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"flow must be \(b, f, 3, h, w\).*got"):
        make()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 40}, "multiple of 32 channels, got 40"),
        ({"channels": 0}, "multiple of 32 channels, got 0"),
        ({"level_multipliers": [2, 4]}, r"begin with 1, got \[2, 4\]"),
        ({"level_multipliers": [1, 0]}, r"positive.*got \[1, 0\]"),
        ({"level_multipliers": []}, r"begin with 1, got \[\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
