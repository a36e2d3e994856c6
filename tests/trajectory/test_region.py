"""Region trajectories: points, interpolation, rasterising without the published faults, and bad input."""

import numpy as np
import pytest
import torch

from motionrag.trajectory import RegionTrajectory, Tracks, interpolate, rasterise

SIZE = {"height": 40, "width": 52}


def drawn(flow):
    """Rows and columns that move in any frame, as (first row, last row, first column, last column)."""
    rows, columns = (flow != 0).any(-1).any(0).nonzero().T
    return rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()


def test_interpolation_passes_through_the_points_and_overshoots_none():
    points = torch.tensor([[0.0, 0.0], [10.0, 4.0], [11.0, 4.0], [30.0, -8.0]])
    dense = interpolate(points, 31)
    assert torch.allclose(dense[::10], points, atol=1e-6)
    assert (dense[:, 0].diff() >= 0).all()
    assert torch.allclose(dense[10:21, 1], torch.tensor(4.0))


def test_interpolation_by_hand():
    # Slopes of 0, 3, 4 in unit spacing: ends (3·3 - 1)/2 = 4 and (3·1 - 3)/2 = 0, middle 2·3·1/4 = 1.5.
    # Middle of the first part: (0 + 3)/2 + (4 - 1.5)/8; of the second: (3 + 4)/2 + (1.5 - 0)/8.
    way = interpolate([(0, 0), (3, 3), (4, 4)], 5)
    assert way[:, 0].tolist() == pytest.approx([0, 1.8125, 3, 3.6875, 4])
    assert torch.equal(interpolate([(5, 6)], 3), torch.tensor([[5.0, 6.0]] * 3))
    assert torch.equal(interpolate([(0, 0), (8, 4)], 3), torch.tensor([[0.0, 0.0], [4.0, 2.0], [8.0, 4.0]]))


@pytest.mark.parametrize("seed", range(5))
def test_interpolation_against_scipy(seed):
    scipy = pytest.importorskip("scipy.interpolate")
    points = np.random.default_rng(seed).integers(-4, 5, (2 + 3 * seed, 2)).astype(float)
    expected = scipy.PchipInterpolator(np.linspace(0, 1, len(points)), points)(np.linspace(0, 1, 25))
    assert np.allclose(interpolate(points, 25), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("start", "box"),
    [
        ((2, 20), (16, 23, 0, 5)),
        ((0, 0), (0, 3, 0, 3)),
        ((20.9, 3.99), (0, 6, 16, 23)),
        ((51, 39), (35, 39, 47, 51)),
        ((51.9, 39.9), (35, 39, 47, 51)),
    ],
)
def test_blocks_at_the_border_keep_the_part_inside(start, box):
    flow, mask = rasterise([[start, (30, 25)]], **SIZE)
    assert drawn(flow) == box
    assert torch.equal(mask[0, ..., 0].bool(), (flow != 0).any(-1).any(0))
    inside = flow[-1, box[0], box[2]]
    assert inside.tolist() == pytest.approx([30 - start[0], 25 - start[1]])


def test_a_stationary_point_has_no_motion_and_its_block_is_in_the_mask():
    for points in ([(25, 19)], [(25, 19), (25, 19)]):
        flow, mask = rasterise([points], **SIZE)
        assert not flow.any()
        rows, columns = mask[3, ..., 0].nonzero().T
        assert len(rows) == 64
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (15, 22, 21, 28)
    assert rasterise([[(25, 19)]], **SIZE, published=True)[0][-1, 19, 25].tolist() == pytest.approx([1, 1])


def test_a_closed_loop_is_in_the_mask():
    flow, mask = rasterise([[(20, 20), (34, 10), (20, 20)]], **SIZE)
    assert not flow[-1].any()
    assert flow[8].any()
    assert mask.sum() == 16 * 64


def test_later_trajectories_win():
    moving, still = [(20, 20), (30, 20)], [(22, 20)]
    flow, mask = rasterise([moving, still], **SIZE)
    assert drawn(flow) == (16, 23, 16, 17)
    assert mask[0].sum() == 10 * 8
    flow, mask = rasterise([still, moving], **SIZE)
    assert drawn(flow) == (16, 23, 16, 23)
    assert mask[0].sum() == 10 * 8


def test_frames_types_and_no_trajectory():
    flow, mask = rasterise([], **SIZE, num_frames=5, brush=np.eye(40, 52, dtype=np.uint8) * 7)
    assert flow.shape == (5, 40, 52, 2)
    assert mask.shape == (5, 40, 52, 1)
    assert flow.dtype == mask.dtype == torch.float32
    assert torch.equal(mask[4, ..., 0], torch.eye(40, 52))
    flow[0] = 1
    assert not flow[1].any()  # frames are not views of one another


def test_normalised_points_and_the_far_edge():
    pixels = rasterise([[(13, 10), (51.9999, 39.9999)]], **SIZE)
    normalised = rasterise([RegionTrajectory([(0.25, 0.25), (1, 1)], normalised=True)], **SIZE)
    torch.testing.assert_close(pixels[0], normalised[0], atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match=r"leaves the image of 52x40 pixels at point 1, \(52, 10\)"):
        rasterise([[(13, 10), (52, 10)]], **SIZE)


def test_resized_and_cropped_follow_the_image():
    way = RegionTrajectory([(20, 10), (40, 30)])
    assert way.resized((40, 80), (80, 40)).points == ((10, 20), (20, 60))
    cropped = way.cropped(left=12, top=4, width=20, height=20)
    assert cropped.points == ((8, 6), (28, 26))
    assert cropped.may_leave
    assert not way.cropped(left=12, top=4, width=40, height=30).may_leave
    assert rasterise([cropped], height=20, width=20)[0][-1, 6, 8].tolist() == [20, 20]
    with pytest.raises(ValueError, match=r"starts at \(20, 10\), outside the crop of 20x20 pixels at \(21, 0\)"):
        way.cropped(left=21, top=0, width=20, height=20)
    with pytest.raises(ValueError, match="in_pixels"):
        RegionTrajectory([(0, 0)], normalised=True).cropped(left=0, top=0, width=4, height=4)
    fractions = RegionTrajectory([(0.5, 0.25)], normalised=True)
    assert fractions.resized((4, 4), (8, 8)) == fractions


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "trajectories[1]: A trajectory needs at least one (x, y) point"),
        (
            [(1, 2, 3)],
            "trajectories[1]: A trajectory is a list of (x, y) points, shape (n, 2); this one has",
        ),
        ([(1, 2), (float("nan"), 3)], "trajectories[1]: Point 1 of a trajectory is (nan, 3.0)"),
        ([(1, "left")], "trajectories[1]: A trajectory is a list of (x, y) points"),
        ([(60, 20), (20, 20)], "trajectories[1] starts at (60, 20), outside the image of 52x40 pixels"),
        ([(-1, 20), (20, 20)], "trajectories[1] starts at (-1, 20), outside the image"),
        ([(20, 20), (20, 200)], "trajectories[1] leaves the image of 52x40 pixels at point 1, (20, 200)"),
    ],
)
def test_bad_trajectories_are_named(points, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared below
        rasterise([[(5, 5)], points], **SIZE)
    assert message in str(error.value)


def test_a_way_may_leave_the_image_if_it_says_so():
    flow, _ = rasterise([RegionTrajectory([(20, 20), (20, 200)], may_leave=True)], **SIZE)
    assert flow[-1, 20, 20].tolist() == [0, 180]


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"brush has shape \(52, 40\), the image \(40, 52\)"):
        rasterise([], **SIZE, brush=torch.ones(52, 40))
    with pytest.raises(ValueError, match="num_frames is 0"):
        rasterise([], **SIZE, num_frames=0)
    with pytest.raises(ValueError, match="num_frames is 0"):
        interpolate([(1, 1)], 0)
    with pytest.raises(ValueError, match="0x4 pixels"):
        rasterise([], height=4, width=0)


def test_tracks_sampled_per_frame_with_visibility():
    tracks = Tracks([[(0, 0), (8, 4)], [(3, 3), (3, 3)]], height=8, width=16, visible=[[True, False], [True, True]])
    frames = tracks.per_frame(5)
    assert frames.trajectories[0].points == ((0, 0), (2, 1), (4, 2), (6, 3), (8, 4))
    assert frames.visible == ((True, True, True, False, False), (True,) * 5)
    assert tracks.sampled(5).shape == (2, 5, 2)
    assert tracks.resized(height=16, width=8).trajectories[0].points == ((0, 0), (4, 8))
    with pytest.raises(ValueError, match="one value for each point"):
        Tracks([[(0, 0)]], height=8, width=8, visible=[[True, True]])
