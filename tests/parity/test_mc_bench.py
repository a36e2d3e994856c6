"""MD-Vid against the released evaluator's figures, and MC-Bench's layout against what the released code walks."""

import pytest
import torch

from motionrag.evaluation.mc_bench_items import read_mc_bench
from motionrag.evaluation.mean_distance import block_pixels, md_vid, md_vid_published, targets
from tests.parity.golden import FOLDER, assert_golden, load_case

CASE = load_case("../motionpro/metrics_md")
ITEMS = CASE.config["items"]
LATER = list(range(1, 16))


@pytest.fixture(params=sorted(ITEMS))
def item(request):
    return request.param


def test_tracked_pixels_are_the_released_ones(item):
    queries = CASE.inputs[f"{item}.queries"]
    assert not queries[:, 0].any()
    pixels = block_pixels(ITEMS[item])
    assert torch.equal(pixels, queries[:, 1:])
    assert torch.equal(pixels[36::64], CASE.inputs[f"{item}.selected_queries"])


def test_targets_are_the_released_ones(item):
    drawn = targets(ITEMS[item], 16, published=True)
    assert_golden(drawn[:, 1:], CASE.outputs[f"{item}.target_points_all16"])


def test_published_distance(item):
    drawn = targets(ITEMS[item], 16, published=True)
    tracks = CASE.inputs[f"{item}.pred_tracks"].transpose(0, 1)
    assert_golden(md_vid_published(tracks, drawn, LATER), CASE.outputs[f"{item}.md_all16"])
    assert_golden(md_vid_published(tracks, drawn, [7, 15]), CASE.outputs[f"{item}.md_0_7_15_as_released"])
    # The same pixels at the right frames.
    centres = tracks[36::64]
    assert_golden(md_vid(centres, drawn, [7, 15]), CASE.outputs[f"{item}.md_0_7_15_frames_aligned"])


def test_mean_is_over_videos_not_over_drags():
    figures = [
        md_vid_published(
            CASE.inputs[f"{item}.pred_tracks"].transpose(0, 1), targets(ITEMS[item], 16, published=True), LATER
        )
        for item in ITEMS
    ]
    assert_golden(torch.stack(figures).mean(), CASE.outputs["md_all16_mean_of_videos"])


def test_where_the_released_evaluator_fails_there_is_no_figure():
    drag = [[[0, 20], [10, 20]]]
    pixels = block_pixels(drag)
    assert len(pixels) == 32  # half a block: no 37th pixel
    assert md_vid_published(pixels[:, None].expand(-1, 16, -1), targets(drag, 16), LATER) is None


def test_items_are_visited_in_the_released_order():
    case = load_case("../motionpro/mc_bench_tiny_expected")
    bench = read_mc_bench(FOLDER.parent / "motionpro" / "mc_bench_tiny")
    assert [item.path for item in bench.items] == case.config["visit_order"]
    assert (bench.broken, bench.notes) == ({}, ())
    for item in bench.items:
        assert (item.height, item.width) == tuple(case.outputs[f"{item.path}.mask"].shape)
        assert item.evaluator_drags == item.drags
        # The released walk writes the last displacement into the block around the start: both ends must fit it.
        rows_columns, flow = case.outputs[f"{item.path}.yx"], case.outputs[f"{item.path}.flow_at_yx"]
        for drag in item.drags:
            x, y = drag[0]
            [at] = ((rows_columns == torch.tensor([y, x]).long()).all(1)).nonzero().flatten().tolist()
            moved = (1.0, 1.0) if len(drag) == 1 else (drag[-1][0] - x, drag[-1][1] - y)
            assert flow[-1, at].tolist() == pytest.approx(moved, abs=1e-4)
