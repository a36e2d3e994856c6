"""Region trajectories, dense flow, region sampling and camera motion against the published MotionPro code."""

import numpy as np
import pytest
import torch

from motionrag.trajectory import (
    bench_items,
    flow_from_tracks,
    interpolate,
    keep_blocks,
    merge_flows,
    motion_bucket,
    motion_mask,
    named_poses,
    pose_flow,
    rasterise,
    read_poses,
    spread_blocks,
)
from tests.parity.golden import FOLDER, assert_golden
from tests.parity.golden import load_case as load_any_case

MOTIONPRO = FOLDER.parent / "motionpro"
FRAMES_STORED = [0, 1, 2, 8, 15]


def load_case(name):
    return load_any_case(f"../motionpro/{name}")


def dense_from_sparse(case, name, height, width):
    """The stored non-zero pixels, put back into full arrays."""
    flow = torch.zeros((16, height, width, 2))
    rows, columns = case.outputs[f"{name}.yx"].T
    flow[:, rows, columns] = case.outputs[f"{name}.flow_at_yx"]
    return flow


def assert_condition(condition, flow, mask):
    assert_golden(condition[0], flow)
    assert condition[1].shape == (16, *mask.shape, 1)
    assert torch.equal(condition[1][..., 0], mask.float().expand(16, -1, -1))


def test_pchip():
    case = load_case("trajectories_pchip")
    for index, count in enumerate(case.config["n_points"]):
        actual = interpolate(case.inputs[f"points.{index}"], count)
        assert actual.dtype == torch.float32
        assert_golden(actual, case.outputs[f"points.{index}"])


SCENARIOS = sorted({key.split(".")[0] for key in load_case("trajectories_cases").outputs})


@pytest.mark.parametrize("name", SCENARIOS)
def test_rasterise(name):
    case = load_case("trajectories_cases")
    scenario = case.config["scenarios"][name]
    points = [case.inputs[f"{name}.points.{index}"] for index in range(len(scenario["points"]))]
    if name == "fractional_demo":
        points = [track.trunc() for track in points]  # the demo does so before it draws
    size = {"height": scenario["height"], "width": scenario["width"]}
    actual = rasterise(points, **size, brush=case.inputs[f"{name}.brush"], published=True)
    assert_condition(actual, dense_from_sparse(case, name, **size), case.outputs[f"{name}.mask"])
    without_faults = {"border_exact_four", "brush_full", "brush_grey", "many_points"}
    if name in without_faults | {"overlap_later_wins", "border_right_bottom_clipped", "brush_only"}:
        corrected = rasterise(points, **size, brush=case.inputs[f"{name}.brush"])
        assert_condition(corrected, dense_from_sparse(case, name, **size), case.outputs[f"{name}.mask"])


def test_rasterise_stored_whole():
    case = load_case("trajectories_dense")
    points = [case.inputs[f"two_tracks.points.{index}"] for index in range(2)]
    for published in (True, False):
        actual = rasterise(points, height=64, width=96, brush=case.inputs["two_tracks.brush"], published=published)
        assert_condition(actual, case.outputs["two_tracks.flow"], case.outputs["two_tracks.mask"])


def test_mc_bench():
    case = load_case("mc_bench_tiny_expected")
    items = bench_items(MOTIONPRO / "mc_bench_tiny")
    assert [item.name for item in items] == case.config["visit_order"]
    for item in items:
        size = {"height": item.tracks.height, "width": item.tracks.width}
        assert tuple(size.values()) == tuple(case.outputs[f"{item.name}.mask"].shape)
        actual = rasterise(item.tracks.trajectories, **size, brush=item.brush, published=True)
        assert_condition(actual, dense_from_sparse(case, item.name, **size), case.outputs[f"{item.name}.mask"])


@pytest.mark.parametrize("run", ["train", "default", "eval85"])
def test_region_sampling(run):
    case = load_case("region_sampling")
    flow = case.inputs["flow"]
    visible = torch.cat([torch.ones((1, 64, 96), dtype=torch.bool), case.inputs["visibility_jpeg"] > 125]).all(0)
    assert torch.equal(visible, case.outputs["visible_mask_all_frames"].bool())
    tries = [
        keep_blocks(visible, float(ratio), draws)
        for ratio, draws in zip(case.inputs[f"{run}.mask_ratio"], case.inputs[f"{run}.block_rand"], strict=True)
    ]
    assert not any(blocks.any() for blocks in tries[:-1])
    assert torch.equal(tries[-1], case.outputs[f"{run}.block_mask"].bool())
    kept = flow * spread_blocks(tries[-1], height=64, width=96)[..., None]
    if run != "default":
        assert torch.equal(kept, case.outputs[f"{run}.flow_ori"])
    sums = kept.sum((1, 2), dtype=torch.float64).float()
    assert_golden(sums, case.outputs[f"{run}.flow_ori_sum"])
    assert torch.equal(motion_mask(flow), case.outputs["flow_brush_mask"].bool())
    assert_golden(torch.tensor(motion_bucket(flow)), case.outputs[f"{run}.motion_bucket_id"])


def test_dense_mode():
    case = load_case("dense_mode")
    motions = []
    for name in ("obj", "cam"):
        tracks, seen = case.inputs[f"{name}.tracks"], case.inputs[f"{name}.visible"]
        flow, visible = flow_from_tracks(tracks, seen, height=32, width=48)
        assert torch.equal(flow.half(), case.outputs[f"{name}.flow_saved_fp16"].half())
        assert torch.equal(visible, case.outputs[f"{name}.visible_mask_files"] != 0)
        motions.append((flow, visible))
    flow, visible = merge_flows(*motions, published=True)
    assert torch.equal(flow, case.outputs["flow_sum_fp16"])
    assert torch.equal(visible, case.outputs["visible"].bool())
    for index, name in ((0, "frame_0"), (15, "frame_last")):
        condition = torch.cat([flow[index], visible[index][..., None]], -1).permute(2, 0, 1)
        assert torch.equal(condition, case.outputs[f"model_flow_input_{name}"])
    # Before its last rounding the published sum is that of two rounded flows.
    assert motion_bucket(flow) == pytest.approx(case.outputs["motion_bucket_id_before_fp16_cast"].item(), rel=1e-3)
    corrected, unshifted = merge_flows(*motions)
    assert (corrected - flow).abs().max() < 0.05
    assert torch.equal(unshifted[:-1], visible[1:])


CAMERA_RUNS = sorted({key.rsplit(".", 1)[0] for key in load_case("camera").outputs if key.endswith(".visible")})
NAMES = {
    "pan-left-2": ("pan left", 2),
    "roll-clockwise-15": ("roll clockwise", 15),
    "rotate-clockwise-12": ("rotate clockwise", 12),
    "truck-right-1": ("truck right", 1),
    "zoom-in-1": ("zoom in", 1),
}


@pytest.mark.parametrize("run", CAMERA_RUNS)
def test_camera(run):
    case = load_case("camera")
    expected = {key.removeprefix(f"{run}."): value for key, value in case.outputs.items() if key.startswith(f"{run}.")}
    flow, visible = pose_flow(expected["poses"], expected["K"], case.inputs["depth"])
    clear = expected["borderline"] == 0
    assert clear.float().mean() > 0.9
    stored = flow[FRAMES_STORED]
    assert_golden(stored[:, clear], expected["flow_frames"][:, clear])
    assert torch.equal(visible[clear], expected["visible"][clear].bool())
    blocks = keep_blocks(visible, 0.85, case.inputs["sparsify.block_rand"])
    sparse = flow[-1] * spread_blocks(blocks, height=40, width=64)[..., None]
    decided = clear & spread_blocks(clear[::8, ::8], height=40, width=64)
    assert_golden(sparse[decided], expected["sparse_last"][decided])
    if clear.all():
        assert_golden(flow.mean((1, 2)), expected["flow_mean_per_frame"])


@pytest.mark.parametrize("run", sorted(NAMES))
def test_named_camera_moves(run):
    case = load_case("camera")
    name, amount = NAMES[run]
    # The published turn goes around the mean depth of the central 20×20 pixels.
    distance = case.inputs["depth"][10:30, 22:42].mean().item()
    poses = named_poses(name, amount, 16, distance=distance)
    assert_golden(torch.from_numpy(poses).float(), case.outputs[f"{run}.poses"])


def test_pose_file(tmp_path):
    case = load_case("camera")
    file = tmp_path / "poses.txt"
    file.write_text(case.config["pose_text"])
    path = read_poses(file)
    assert_golden(torch.from_numpy(path.poses).float(), case.outputs["reader.poses"])
    assert_golden(torch.from_numpy(path.intrinsics(320, 512)).float(), case.outputs["reader.K_320x512"])
    flow, visible = pose_flow(path.poses, path.intrinsics(40, 64), case.inputs["depth"])
    clear = case.outputs["complex-mode_5-default.borderline"] == 0
    assert_golden(flow[FRAMES_STORED][:, clear], case.outputs["complex-mode_5-default.flow_frames"][:, clear])
    assert np.array_equal(visible[clear], case.outputs["complex-mode_5-default.visible"][clear])
