"""Motion of a region: noise and fading are none, a pan is, and what moves beside it does not count."""

import pytest
import torch

from motionrag.evaluation.region_motion import region_motion
from motionrag.pocket.world import named_domain, sample_clip

FRAMES = 17


@pytest.fixture(scope="module")
def picture():
    return torch.from_numpy(sample_clip(named_domain("blick"), (0, 3), truth=False).frames[0])


def still(picture):
    return picture.expand(FRAMES, *picture.shape)


def noisy(frames, amplitude):
    noise = torch.randint(-amplitude, amplitude + 1, frames.shape, generator=torch.Generator().manual_seed(0))
    return (frames.int() + noise).clamp(0, 255).to(torch.uint8)


def everywhere(frames):
    return torch.ones(frames.shape[1:3], dtype=torch.bool)


@pytest.mark.parametrize("amplitude", [1, 3])
def test_noise_is_no_motion_though_flow_finds_some(picture, amplitude):
    frames = noisy(still(picture), amplitude)
    moved, plain = region_motion(frames, everywhere(frames))
    assert moved < 0.02
    assert plain > 0.3


def test_a_still_picture_that_becomes_brighter_and_greyer_does_not_move(picture):
    share = torch.linspace(0, 0.2, FRAMES)[:, None, None, None]
    frames = (still(picture) * (1 - share) + 128 * share).round().to(torch.uint8)
    assert region_motion(frames, everywhere(frames))[0] < 0.02


@pytest.mark.parametrize("amplitude", [0, 3])
def test_a_pan_is_seen(picture, amplitude):
    frames = torch.stack([picture.roll(min(time, 8), dims=1) for time in range(FRAMES)])
    true = sum(min(time, 8) for time in range(1, FRAMES)) / (FRAMES - 1)
    moved, _ = region_motion(noisy(frames, amplitude), everywhere(frames))
    assert 0.35 * true < moved < 1.2 * true


def test_only_the_region_counts(picture):
    frames = still(picture).clone()
    half = frames.shape[2] // 2
    for time in range(FRAMES):
        frames[time, :, :half] = picture[:, :half].roll(min(time, 6), dims=0)
    left = torch.zeros(frames.shape[1:3], dtype=torch.bool)
    left[:, : half - 8] = True
    right = torch.zeros_like(left)
    right[:, half + 8 :] = True
    assert region_motion(frames, left)[0] > 1
    assert region_motion(frames, right)[0] < 0.02
