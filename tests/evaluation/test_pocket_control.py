"""Evaluation of control: figures of videos that are known, what each row asks for, and one run with a real pipeline."""

import csv
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from motionrag import MotionRAGPipeline
from motionrag.cli import app
from motionrag.evaluation.control_making import PipelineMaker, Request
from motionrag.evaluation.control_material import (
    drag_scenes,
    together_domains,
    together_scenes,
    true_way_scenes,
)
from motionrag.evaluation.pocket_control import ControlSizes, figures, measure_control
from motionrag.pocket.initialise_control import initialise_control
from motionrag.pocket.world import NUM_FRAMES, SIZE
from motionrag.trajectory import RegionTrajectory, interpolate

SMALL = ControlSizes(scenes=2, noises=2, batch_size=2)


@pytest.fixture(scope="module")
def drags():
    return drag_scenes(2)


@pytest.fixture(scope="module")
def together():
    return together_scenes(together_domains(1), 2)


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """An untrained second pocket beside the embedded first."""
    folder = tmp_path_factory.mktemp("weights") / "control"
    initialise_control(folder, shared="pocket")
    return folder


def measured(frames, scenes, *, at_once=False):
    stacked = torch.from_numpy(np.stack(frames))
    rows = figures(stacked, scenes, range(len(scenes)), at_once=at_once, noise=0)
    return [
        {name: value if name == "family" or value == "" else float(value) for name, value in r.items()} for r in rows
    ]


def still(scene):
    return np.repeat(scene.clip.frames[:1], NUM_FRAMES, axis=0)


def test_drags_begin_on_their_thing_stay_inside_and_leave_all_else_alone(drags):
    assert [len(scene.clip.things) for scene in drags] == [2, 3]
    assert [scene.all_at_once is not None for scene in drags] == [False, True]
    for scene in drags:
        [thing], [way] = scene.drag.things, scene.drag.ways
        column, row = np.floor(way[0]).astype(int)
        assert scene.clip.masks[0, row, column] == thing + 1
        assert np.array_equal(scene.drag.brush, scene.clip.masks[0] == thing + 1)
        assert 12 <= np.linalg.norm(way[-1] - way[0]) <= 30
        asked = scene.drag.asked
        assert np.array_equal(asked.frames[0], scene.clip.frames[0])
        others = [each for each in range(len(scene.clip.things)) if each != thing]
        assert (asked.tracks[others] == asked.tracks[others, :1]).all()
        radius = scene.clip.things[thing].radius
        edge = np.minimum(radius, np.minimum(asked.tracks[thing, 0], SIZE - asked.tracks[thing, 0])) - 1e-3
        assert (asked.tracks[thing] >= edge).all()
        assert (asked.tracks[thing] <= SIZE - edge).all()
        assert asked.visible.all()
    three = drags[1].all_at_once
    assert three.things == (0, 1, 2)
    mine = drags[1].drag.things[0]
    assert np.array_equal(three.ways[mine], drags[1].drag.ways[0])


def test_scenes_do_not_depend_on_how_many_are_drawn_and_differ_by_seed(drags):
    [first] = drag_scenes(1)
    assert np.array_equal(first.clip.frames, drags[0].clip.frames)
    assert np.array_equal(first.drag.ways[0], drags[0].drag.ways[0])
    [other] = drag_scenes(1, seed=1)
    assert not np.array_equal(first.clip.frames, other.clip.frames)


def test_videos_that_do_what_is_asked_have_no_distance(drags):
    for row in measured([scene.drag.asked.frames for scene in drags], drags):
        assert row["md"] < 0.6
        assert row["md_end"] < 0.6
        assert row["others_moved"] < 0.3
        assert row["moved_outside"] < 0.1
        assert row["flow_outside"] < 0.4
        assert row["lost"] == 0
    [row] = measured([drags[1].all_at_once.asked.frames], drags[1:], at_once=True)
    assert row["md"] < 0.6
    assert row["things"] == 3
    assert (row["others_moved"], row["moved_outside"], row["flow_outside"]) == ("", "", "")


def test_still_videos_have_the_asked_ways_length(drags):
    for scene, row in zip(drags, measured([still(scene) for scene in drags], drags), strict=True):
        [way] = scene.drag.ways
        path = interpolate(way, NUM_FRAMES).numpy()
        lengths = np.linalg.norm(path - path[0], axis=1)
        assert row["md"] == row["drawn"] == pytest.approx(lengths[1:].mean(), abs=1e-3)
        assert row["md_end"] == row["drawn_end"] == pytest.approx(np.linalg.norm(way[-1] - way[0]), abs=1e-3)
        assert row["others_moved"] == 0
        assert row["moved_outside"] == row["flow_outside"] == pytest.approx(0, abs=1e-3)


def test_a_picture_that_shifts_as_a_whole_moves_outside(drags):
    """To the right by 0 1 1 1 1 2 … 4 pixels."""
    shifts = [-(-frame // 4) for frame in range(NUM_FRAMES)]
    videos = [np.stack([np.roll(scene.clip.frames[0], shift, axis=1) for shift in shifts]) for scene in drags]
    for row in measured(videos, drags):
        assert row["others_moved"] == pytest.approx(np.mean(shifts[1:]), abs=0.2)
        assert row["flow_outside"] == pytest.approx(np.mean(shifts[1:]), rel=0.25)
        # What is even is not seen moving.
        assert 0.2 * row["flow_outside"] < row["moved_outside"] <= row["flow_outside"]


def test_other_things_are_held_against_their_domain(together):
    for row in measured([scene.drag.asked.frames for scene in together], together):
        assert row["md"] < 0.6
        assert row["others_error"] < 1.5
    for scene, row in zip(together, measured([still(scene) for scene in together], together), strict=True):
        assert np.array_equal(scene.drag.brush, scene.clip.masks[0] > 0)
        others = [each for each in range(3) if each not in scene.drag.things]
        away = scene.clip.tracks[others] - scene.clip.tracks[others, :1]
        expected = 100 / SIZE * np.sqrt((away[:, 1:] ** 2).sum(-1).mean())
        assert row["others_error"] == pytest.approx(expected, abs=0.05)


def test_true_ways_are_those_of_the_clip():
    scenes = [*true_way_scenes(1, held_out=False), *true_way_scenes(1, held_out=True)]
    assert [scene.clip.family for scene in scenes] == ["fall", "eight"]
    for scene in scenes:
        [way] = scene.drag.ways
        assert np.allclose(way - way[0], scene.clip.tracks[0] - scene.clip.tracks[0, 0], atol=1e-4)
    for row in measured([scene.clip.frames for scene in scenes], scenes):
        assert row["md"] < 0.8 < row["drawn"]


class Maker:
    """Uncontrolled videos stand still, controlled ones do what is asked; under a whole brush the domain moves them."""

    def __init__(self, scenes):
        self.scenes = {scene.clip.frames[0].tobytes(): scene for scene in scenes}
        self.calls = []

    def __call__(self, requests):
        self.calls.append(requests)
        return torch.from_numpy(np.stack([self.video(request) for request in requests]))

    def video(self, request):
        scene = self.scenes.get(request.image.tobytes())
        if scene is None or not request.ways:
            return np.repeat(request.image[None], NUM_FRAMES, axis=0)
        drag = scene.drag if len(request.ways) == 1 else scene.all_at_once
        return drag.asked.frames if not request.brush.all() else scene.clip.frames


def csv_rows(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_rows_share_noise_and_differ_in_what_is_asked(drags, together, tmp_path):
    make = Maker([*drags, *together])
    report = measure_control(make, out=tmp_path, sizes=SMALL, settings={"trained": True})
    assert report.table.startswith("# Evaluation of trajectory control\n\n| target")
    by_row = [calls for calls in make.calls if len(calls) == 2]  # the drags and the scenes of `together`
    for noise in range(2):
        rows = by_row[4 * noise : 4 * noise + 4]
        plain, controlled, unguided, whole = rows
        assert len({tuple(each.noise for each in row) for row in rows}) == 1
        assert [[each.control_guidance_scale for each in row] for row in rows] == [
            [None] * 2,
            [None] * 2,
            [1] * 2,
            [None] * 2,
        ]
        assert all(np.array_equal(a.brush, b.brush) for a, b in zip(controlled, unguided, strict=True))
        assert all(each.ways == () and each.brush is None and each.caption is None for each in plain)
        for scene, asked, wide in zip(drags, controlled, whole, strict=True):
            assert np.array_equal(asked.ways[0], wide.ways[0])
            assert wide.brush.all()
            assert np.array_equal(asked.brush, scene.drag.brush)
        neither, alone, retrieval, both = by_row[8 + 4 * noise : 12 + 4 * noise]
        assert [[bool(each[0].ways), each[0].caption is not None] for each in (neither, alone, retrieval, both)] == [
            [False, False],
            [True, False],
            [False, True],
            [True, True],
        ]
        assert [each.caption for each in both] == [scene.clip.caption for scene in together]
        assert len({tuple(each.noise for each in row) for row in (neither, alone, retrieval, both)}) == 1
    noises = [each.noise for each in by_row[0] + by_row[4] + by_row[8] + by_row[12]]
    assert len(set(noises)) == 8
    [three] = [calls[0] for calls in make.calls if len(calls[0].ways) == 3][:1]
    assert three.noise == by_row[0][1].noise
    assert np.array_equal(three.brush, drags[1].clip.masks[0] > 0)

    # Shares are ratios of means over all clips.
    rows = {name: [*csv_rows(tmp_path / f"clips/drag_{name}_noise0.csv")] for name in ("u", "c", "f")}
    means = {
        (name, field): np.mean([float(row[field]) for row in rows[name]])
        for name in rows
        for field in ("md_end", "others_moved")
    }
    shares = report.summary["shares"]
    assert shares["drag_end"][0] == pytest.approx(means["c", "md_end"] / means["u", "md_end"], rel=1e-6)
    assert shares["others_of_f"][0] == pytest.approx(means["c", "others_moved"] / means["f", "others_moved"], rel=1e-6)
    assert shares["others_of_u"] is None  # nothing moves in still videos
    targets = report.summary["targets"]
    assert targets["md_end_of_width"]["figure"][0] == pytest.approx(100 / SIZE * means["c", "md_end"])
    assert targets["drag_end"]["met"]
    assert targets["others_of_f"]["met"]
    assert targets["others_of_u"]["met"] is None
    three_ways = report.summary["parts"]["drag"]["u3"]
    assert three_ways["md_end"][0] == pytest.approx(three_ways["drawn_end"][0])
    assert shares["three_end"][0] < 0.1
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report.summary))
    assert (tmp_path / "table.md").read_text() == report.table
    assert (tmp_path / "sheet.png").exists()
    assert not list(tmp_path.rglob("*.tmp"))

    # The same call again makes nothing; a lost file alone is made again; other settings are refused.
    done = len(make.calls)
    again = measure_control(make, out=tmp_path, sizes=SMALL, settings={"trained": True})
    assert len(make.calls) == done
    assert again.summary["parts"] == report.summary["parts"]
    (tmp_path / "clips" / "drag_c_noise1.csv").unlink()
    measure_control(make, out=tmp_path, sizes=SMALL, settings={"trained": True})
    [lost] = make.calls[done:]
    assert [each.noise for each in lost] == [each.noise for each in by_row[5]]
    with pytest.raises(ValueError, match=r"holds figures with trained .*; choose another folder"):
        measure_control(make, out=tmp_path, sizes=SMALL, settings={"trained": False})


def test_the_pipeline_is_asked_as_a_user_would(control, drags):
    pipe = MotionRAGPipeline.from_pretrained(control)
    pipe.pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    for site in pipe.modulation.sites.values():  # a fresh one changes nothing
        torch.nn.init.normal_(site.beta.temporal.weight, std=0.3)
    make, scene = PipelineMaker(pipe, 1), drags[1]
    image, drag = scene.clip.frames[0], scene.all_at_once
    options = {"num_references": 0, "num_inference_steps": 1, "output_type": "np"}

    def by_hand(**control):
        frames = pipe(image, **control, **options, generator=torch.Generator().manual_seed(5)).frames[0]
        return torch.from_numpy((frames.clip(0, 1) * 255).round().astype(np.uint8))

    plain = by_hand()
    [made] = make([Request(image, 5)])
    assert torch.equal(made, plain)
    ways = [RegionTrajectory(way, may_leave=True) for way in drag.ways]
    steered = by_hand(trajectories=ways, motion_mask=drag.brush)
    [made] = make([Request(image, 5, drag.ways, drag.brush)])
    assert torch.equal(made, steered)
    assert not torch.equal(steered, plain)


def test_command(control, tmp_path):
    size = ["--scenes", "1", "--noises", "1", "--steps", "2", "--dtype", "bfloat16"]
    arguments = ["evaluate", "pocket-control", "--bundle", str(control), "--out", str(tmp_path), *size]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "report.json").read_text())
    assert summary["settings"]["dtype"] == "bfloat16"
    assert summary["settings"]["num_inference_steps"] == 2
    # One domain: whatever is found is right.
    assert summary["checks"]["references_from_the_right_domain"] == 1
    assert summary["cost"]["runs"] == 1
    assert summary["cost"]["step"] > 0
    assert "**These weights are untrained" in (tmp_path / "table.md").read_text()
    assert {each["clips"] for part in summary["parts"].values() for each in part.values()} == {1}
