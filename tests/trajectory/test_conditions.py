"""Masks, dense flow, sampled regions, camera moves and drawing, against values worked out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from motionrag.trajectory import (
    CAMERA_MOVES,
    RegionTrajectory,
    camera_flow,
    draw_on_video,
    draw_trajectories,
    flow_from_tracks,
    keep_blocks,
    merge_flows,
    polygon_mask,
    read_mask,
    read_poses,
    sample_regions,
)

SIZE = {"height": 6, "width": 8}


def picture(mode):
    """A picture with one painted pixel in row 2, column 5."""
    if mode == "RGBA layer":
        image = Image.new("RGBA", (8, 6))
        image.putpixel((5, 2), (0, 0, 0, 40))
    elif mode == "RGBA opaque":
        image = Image.new("RGBA", (8, 6), (0, 0, 0, 255))
        image.putpixel((5, 2), (0, 9, 0, 255))
    elif mode == "P":
        image = Image.new("RGB", (8, 6))
        image.putpixel((5, 2), (0, 0, 200))
        image = image.quantize(2)
    else:
        image = Image.new(mode, (8, 6))
        image.putpixel((5, 2), 1)
    return image


@pytest.mark.parametrize("mode", ["RGBA layer", "RGBA opaque", "P", "L", "1", "I;16"])
def test_masks_of_every_kind_of_picture(mode, tmp_path):
    expected = torch.zeros(6, 8)
    expected[2, 5] = 1
    image = picture(mode)
    assert torch.equal(read_mask(image, **SIZE), expected)
    image.save(tmp_path / "mask.png")
    assert torch.equal(read_mask(tmp_path / "mask.png", **SIZE), expected)
    assert torch.equal(read_mask(torch.tensor(np.asarray(expected) * 0.25), **SIZE), expected)


def test_masks_of_another_size_or_kind(tmp_path):
    with pytest.raises(ValueError, match="the mask has 8x6 pixels, the image 6x8; resize"):
        read_mask(np.zeros((6, 8)), height=8, width=6)
    (tmp_path / "mask.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"mask\.png cannot be read as a picture"):
        read_mask(tmp_path / "mask.png", **SIZE)
    with pytest.raises(ValueError, match=r"this one has \(8,\)"):
        read_mask(np.zeros(8), **SIZE)


def test_polygon():
    # Corners on pixel edges enclose exactly the pixels between them, and the outline belongs to the polygon.
    mask = polygon_mask([(2, 1), (6, 1), (6, 4), (2, 4)], height=8, width=10)
    assert mask[1:4, 2:6].all()
    assert mask.sum() <= 5 * 6
    assert not mask[6:].any()
    with pytest.raises(ValueError, match="three corners"):
        polygon_mask([(0, 0), (1, 1)], **SIZE)
    with pytest.raises(ValueError, match="outside the image"):
        polygon_mask([(20, 20), (30, 20), (30, 30)], **SIZE)


def test_dense_flow_later_tracks_win():
    tracks = torch.tensor([[[1.9, 2.0], [1.2, 2.7], [7, 5]], [[3.0, 2.0], [1.2, 4.7], [6, 5]]])
    flow, visible = flow_from_tracks(tracks, [[1, 1, 1], [1, 0, 1]], **SIZE)
    assert flow[1, 2, 1].tolist() == pytest.approx([0, 2])
    assert flow[1, 5, 7].tolist() == [-1, 0]
    assert (flow[1] != 0).any(-1).sum() == 2
    assert visible[0].sum() == 2
    assert visible[1].nonzero().tolist() == [[5, 7]]
    with pytest.raises(ValueError, match=r"Track 1 starts at \(8, 0\), outside the image of 8x6"):
        flow_from_tracks([[[0, 0], [8, 0]]], [[1, 1]], **SIZE)
    with pytest.raises(ValueError, match="Track 0 holds a number that is not finite"):
        flow_from_tracks([[[0, np.nan]]], [[1]], **SIZE)


def test_merged_motions_add_up_and_share_what_is_visible():
    generator = torch.Generator().manual_seed(0)
    flows = torch.randn((2, 3, 4, 5, 2), generator=generator)
    seen = torch.rand((2, 3, 4, 5), generator=generator) > 0.3
    flow, visible = merge_flows((flows[0], seen[0]), (flows[1], seen[1]))
    assert torch.equal(flow, flows[0] + flows[1])
    assert torch.equal(visible, seen[0] & seen[1])
    with pytest.raises(ValueError, match="same frames, rows and columns"):
        merge_flows((flows[0], seen[0]), (flows[1, :2], seen[1, :2]))


def test_sampled_regions_are_whole_visible_blocks_in_the_right_number():
    flow = torch.ones(2, 83, 161, 2)
    visible = torch.ones(2, 83, 161, dtype=torch.bool)
    visible[1, :40] = False
    generator = torch.Generator().manual_seed(1)
    shares = []
    for _ in range(40):
        sampled, kept = sample_regions(flow, visible, ratio=(0.5, 0.5), generator=generator)
        assert not kept[:40].any()
        assert torch.equal(sampled, flow * kept[None, :, :, None])
        assert torch.equal(kept[40:80].reshape(5, 8, 161)[:, :1].expand(-1, 8, -1), kept[40:80].reshape(5, 8, 161))
        shares.append(kept[40:].float().mean().item())
    assert 0.45 < np.mean(shares) < 0.55
    assert kept[80:].any()  # blocks that the border cuts take part


def test_sampled_regions_never_come_back_empty():
    visible = torch.zeros(2, 32, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match="No 8x8 block is visible"):
        sample_regions(torch.ones(2, 32, 32, 2), visible)
    visible[:, 8:24, 8:24] = True
    generator = torch.Generator().manual_seed(0)
    chosen = set()
    for _ in range(60):
        _, kept = sample_regions(torch.ones(2, 32, 32, 2), visible, ratio=(1, 1), generator=generator)
        assert kept.sum() == 64
        chosen.add(kept.nonzero()[0].tolist().__str__())
    assert len(chosen) == 4
    with pytest.raises(ValueError, match="ratio is"):
        sample_regions(torch.ones(2, 32, 32, 2), visible, ratio=(0.9, 1.1))


def test_an_unmoved_grid_draws_a_share_and_then_one_number_for_each_block():
    flow, visible = torch.ones(2, 20, 32, 2), torch.ones(2, 20, 32, dtype=torch.bool)
    drawn = torch.Generator().manual_seed(5)
    share = 0.75 + 0.25 * torch.rand((), generator=drawn)
    expected = torch.rand(3, 4, generator=drawn) > share
    assert expected.any()
    _, kept = sample_regions(flow, visible, generator=torch.Generator().manual_seed(5))
    assert torch.equal(kept[::8, ::8], expected)
    _, same = sample_regions(flow, visible[0], generator=torch.Generator().manual_seed(5))
    assert torch.equal(same, kept)
    with pytest.raises(ValueError, match="differ in frames or size"):
        sample_regions(flow, visible[0, 1:])


def test_a_moved_grid_begins_anywhere_and_keeps_its_blocks_whole():
    flow, visible = torch.ones(2, 40, 48, 2), torch.zeros(40, 48, dtype=torch.bool)
    visible[0:20] = True
    generator = torch.Generator().manual_seed(2)
    rows, columns = set(), set()
    for _ in range(300):
        sampled, kept = sample_regions(flow, visible, ratio=(0.5, 0.5), shift=True, generator=generator)
        assert torch.equal(sampled, flow * kept[None, :, :, None])
        # Where neighbours differ, one block ends and another begins: all such places are on one grid.
        grid = [{1 + int(edge) for edge in (kept.diff(dim=axis).any(dim=1 - axis)).nonzero()} for axis in (0, 1)]
        assert [len({edge % 8 for edge in edges}) for edges in grid] == [1, 1]
        for starts, edges in zip((rows, columns), grid, strict=True):
            starts.add(next(iter(edges)) % 8)
        # A block that begins in a visible row is visible, and is kept down to its last row.
        assert not kept[27:].any()
    assert rows == columns == set(range(8))


def test_a_block_that_the_border_cuts_is_judged_by_its_own_first_pixel():
    visible = torch.zeros(16, 16, dtype=torch.bool)
    visible[0, 0] = True
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(400):
        _, kept = sample_regions(torch.ones(1, 16, 16, 2), visible, ratio=(0, 0), shift=True, generator=generator)
        height, width = (int(kept.any(dim=axis).sum()) for axis in (1, 0))
        assert kept[:height, :width].all()
        assert kept.sum() == height * width
        sizes.add((height, width))
    assert sizes == {(height, width) for height in range(1, 9) for width in range(1, 9)}


def test_a_moved_grid_that_misses_what_is_visible_falls_back():
    visible = torch.zeros(24, 24, dtype=torch.bool)
    visible[8, 16] = True  # on the unmoved grid, and on one in 64 of the moved ones
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        _, kept = sample_regions(torch.ones(1, 24, 24, 2), visible, shift=True, generator=generator)
        assert kept.sum() == 64
        assert kept[8:16, 16:24].all()


# Where the picture goes in its middle row and column, to the right and downwards positive.
DIRECTIONS = {
    "pan left": (1, 0),
    "pan right": (-1, 0),
    "tilt up": (0, 1),
    "tilt down": (0, -1),
    "truck left": (1, 0),
    "truck right": (-1, 0),
    "pedestal up": (0, 1),
    "pedestal down": (0, -1),
}


@pytest.mark.parametrize("move", sorted(DIRECTIONS))
def test_camera_moves_shift_the_picture_the_other_way(move):
    amount = 2 if move[:3] in ("pan", "til") else 0.03
    flow, mask, visible = camera_flow(move, height=65, width=97, num_frames=9, amount=amount)
    assert flow.shape == (9, 65, 97, 2)
    assert mask.shape == (9, 65, 97, 1)
    assert mask.all()
    assert not flow[0].any()
    expected = 97 * (np.tan(np.radians(2)) if amount == 2 else 0.03)
    # The centre of the picture lies half a pixel off the middle pixel.
    assert flow[-1, 32, 48].tolist() == pytest.approx([part * expected for part in DIRECTIONS[move]], abs=0.01)
    assert 0.8 < visible.float().mean() < 1


def test_zoom_on_a_flat_scene_scales_the_picture():
    flow, _, visible = camera_flow("zoom in", height=64, width=96, num_frames=3, amount=0.2)
    # 1 / (1 - 0.2) = 1.25 from the centre (48, 32).
    assert flow[-1, 40, 60].tolist() == pytest.approx([12 * 0.25, 8 * 0.25], abs=1e-4)
    assert not visible[:, 0].any()
    assert flow[-1, 0, 0].tolist() == [0, 0]
    assert camera_flow("zoom out", height=64, width=96, num_frames=3).visible.all()


def test_roll_clockwise_turns_the_picture_the_other_way():
    flow, _, _ = camera_flow("roll clockwise", height=64, width=64, num_frames=2, amount=90)
    # A point to the right of the centre goes up.
    assert flow[-1, 32, 52].tolist() == pytest.approx([-20, -20], abs=1e-4)


def test_rotate_keeps_the_middle_of_a_flat_scene_in_place():
    # The point 12 pixels to the right lies 12/64 of the distance aside; turned by 20° it is farther away or nearer.
    cosine, sine = np.cos(np.radians(20)), np.sin(np.radians(20))
    for move, side in (("rotate clockwise", 1), ("rotate counterclockwise", -1)):
        flow, _, _ = camera_flow(move, height=64, width=64, num_frames=4, amount=20, depth=np.full((64, 64), 7.0))
        assert flow[-1, 32, 32].abs().max() < 1e-4
        assert flow[-1, 32, 44, 0] == pytest.approx(12 * cosine / (1 + side * sine * 12 / 64) - 12, abs=1e-4)


def test_near_things_move_more_and_units_of_depth_cancel():
    depth = np.full((40, 40), 4.0)
    depth[:10] = 2
    flow, _, _ = camera_flow("truck left", height=40, width=40, num_frames=3, amount=0.1, depth=depth)
    assert flow[-1, 5, 20, 0] == pytest.approx(2 * flow[-1, 30, 20, 0].item())
    assert flow[-1, 30, 20, 0] == pytest.approx(40 * 0.1)
    other = camera_flow("truck left", height=40, width=40, num_frames=3, amount=0.1, depth=depth * 1000)
    assert torch.allclose(flow, other.flow, atol=1e-4)


def test_every_move_starts_still_and_moves():
    for move in CAMERA_MOVES:
        flow = camera_flow(move, height=24, width=32, num_frames=4).flow
        assert flow[1].abs().max() > 0.1
        assert torch.isfinite(flow).all()


def test_bad_camera_input(tmp_path):
    with pytest.raises(ValueError, match=r"'fly' is no camera move; use one of pan left"):
        camera_flow("fly", **SIZE)
    with pytest.raises(ValueError, match="'' is no camera move"):
        camera_flow("", **SIZE)
    with pytest.raises(ValueError, match="a name or what read_poses gives"):
        camera_flow(tmp_path, **SIZE)
    with pytest.raises(ValueError, match="below 1 for zoom"):
        camera_flow("zoom in", **SIZE, amount=1)
    with pytest.raises(ValueError, match="distances above 0"):
        camera_flow("pan left", **SIZE, depth=np.zeros((6, 8)))
    with pytest.raises(ValueError, match=r"depth map has shape \(8, 6\)"):
        camera_flow("pan left", **SIZE, depth=np.ones((8, 6)))
    file = tmp_path / "poses.txt"
    row = "0 0.5 0.9 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0"
    file.write_text("\n".join(["title", row, row, row.replace("0.9", "x")]))
    assert len(read_poses(file, num_frames=2).poses) == 2
    with pytest.raises(ValueError, match=r"poses\.txt, line 4: a pose line has 19 numbers"):
        read_poses(file, num_frames=3)
    with pytest.raises(ValueError, match="has 3 poses; 16 frames with stride 1 do not fit"):
        read_poses(file)
    still = read_poses(file, num_frames=2)
    resting = camera_flow(still, **SIZE, num_frames=2)
    assert resting.flow.abs().max() < 1e-12
    assert resting.visible.all()
    with pytest.raises(ValueError, match="2 poses, the video 16 frames"):
        camera_flow(still, **SIZE)


def test_drawing_marks_the_way_and_leaves_the_rest():
    image = Image.new("RGB", (96, 64), (10, 20, 30))
    drawn = np.asarray(draw_trajectories(image, [RegionTrajectory([(20, 32), (70, 32)])]))
    assert drawn[32, 45, 0] > 150  # the first colour is red
    assert drawn[32, 45, 2] < 100
    assert (drawn[:20] == (10, 20, 30)).all()
    assert (drawn[50:] == (10, 20, 30)).all()
    mask = np.zeros((64, 96))
    mask[:10] = 1
    veiled = np.asarray(draw_trajectories(image, [], mask=mask))
    assert (veiled[10:] == (10, 20, 30)).all()
    # 90/255 of white over the picture.
    assert veiled[5, 5].tolist() == pytest.approx(
        [10 + 245 * 90 / 255, 20 + 235 * 90 / 255, 30 + 225 * 90 / 255], abs=1
    )
    with pytest.raises(ValueError, match="mask has shape"):
        draw_trajectories(image, [], mask=mask.T)


def test_drawing_on_a_video_follows_the_way():
    frames = np.full((6, 64, 96, 3), 40, np.uint8)
    drawn = draw_on_video(frames, [[(10, 32), (85, 32)]])
    for index, column in enumerate((10, 25, 40, 55, 70, 85)):
        assert drawn[index, 32, column, 0] > 200
        assert (drawn[index, :, column + 6 :] == 40).all()
    assert (frames == 40).all()
    with pytest.raises(ValueError, match="uint8"):
        draw_on_video(frames / 255, [])


def test_blocks_lie_where_the_flow_does():
    kept = keep_blocks(torch.ones(16, 16, device="meta"), 0.5, torch.rand(2, 2))
    assert kept.device.type == "meta"
