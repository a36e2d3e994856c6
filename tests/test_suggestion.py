"""Suggested trajectories: they follow what moves in the clip, at the image's size."""

import pytest
import torch

from motionrag.suggestion import suggest_trajectories


def textured(height, width, seed=0):
    noise = torch.rand(1, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)[0]


@pytest.fixture(scope="module")
def moving_square():
    """A textured square of 32 pixels goes 3 pixels to the right and 1 down each frame, over a still background."""
    background, square = textured(128, 128), textured(32, 32, seed=1)
    frames = []
    for time in range(9):
        frame = background.clone()
        frame[:, 30 + time : 62 + time, 20 + 3 * time : 52 + 3 * time] = square
        frames.append(frame)
    return torch.stack(frames) * 2 - 1


def test_the_way_of_what_moves_is_carried_over_to_the_images_size(moving_square):
    found = suggest_trajectories(moving_square, (256, 384), count=1)
    [way] = found.trajectories
    start, end = torch.tensor(way.points[0]), torch.tensor(way.points[-1])
    # The square starts in columns 20 to 51 and rows 30 to 61 of 128.
    assert 3 * 20 <= start[0] < 3 * 52
    assert 2 * 30 <= start[1] < 2 * 62
    torch.testing.assert_close(end - start, torch.tensor([3 * 24.0, 2 * 8.0]), atol=6, rtol=0)
    assert found.motion_mask.shape == (256, 384)
    inside = found.motion_mask[2 * 34 : 2 * 58, 3 * 24 : 3 * 48]
    assert inside.mean() > 0.7
    assert found.motion_mask.mean() < 0.25


def test_ways_keep_their_distance_and_the_fastest_comes_first(moving_square):
    ways = suggest_trajectories(moving_square, (128, 128), count=9).trajectories
    starts = torch.tensor([way.points[0] for way in ways])
    assert len(ways) > 1
    distances = torch.pdist(starts)
    assert distances.min() >= 0.15 * 128 - 1
    lengths = [(torch.tensor(way.points[-1]) - torch.tensor(way.points[0])).norm() for way in ways]
    assert lengths[0] >= 0.8 * max(lengths)


def test_nothing_is_suggested_where_nothing_moves():
    still = (textured(64, 64) * 2 - 1).repeat(5, 1, 1, 1)
    found = suggest_trajectories(still, (64, 64))
    assert found.trajectories == []
    assert not found.motion_mask.any()


def test_bad_input():
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        suggest_trajectories(torch.zeros(5, 3, 64, 64), (64, 64), count=0)
    with pytest.raises(ValueError, match=r"\(t 3 h w\)"):
        suggest_trajectories(torch.zeros(5, 64, 64, 3), (64, 64))
