"""The demo of control: three things of a scene along three ways, and a picture of one's own."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from motionrag.bundle import MotionBundle
from motionrag.pocket import demo_control as demo
from motionrag.pocket.initialise_control import initialise_control
from motionrag.trajectory import Tracks, write_tracks
from motionrag.video import probe
from tests.test_cli import run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Untrained, but for modulation that does something."""
    folder = tmp_path_factory.mktemp("weights") / "control"
    initialise_control(folder, shared="pocket")
    made = MotionBundle.from_pretrained(folder)
    torch.manual_seed(1)
    for parameter in made.feature_modulation.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def done(bundle, tmp_path_factory):
    """What the command says, and its folder; OpenCV is not there."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cv2", None)
        said = run("demo", "--control", "--bundle", bundle, "--out", out, "--steps", 1, "--seed", 5)
    assert said.returncode == 0, said.stderr
    return said.stdout, out


@pytest.fixture(scope="module")
def report(done):
    return json.loads((done[1] / "report.json").read_text(encoding="utf-8"))


def own_picture(folder, points, *, canvas=(64, 96)):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(folder / "dog.png")
    write_tracks(folder / "ways.json", Tracks(points, height=canvas[0], width=canvas[1]))
    return {"image": folder / "dog.png", "tracks": folder / "ways.json"}


def test_things_of_the_scene_stay_apart_and_in_the_frame():
    task = demo.scene_task()
    assert len({name.split()[0] for name in task.names}) == 3  # their colours
    positions = task.tracks.sampled(17)
    reach = 7.5 * 1.1  # half a cross' bar of the largest of several things
    assert positions.min() > reach
    assert positions.max() < 64 - reach
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (positions[one] - positions[other]).norm(dim=-1).min() > 2 * reach


def test_two_curves_and_a_straight_way_and_a_brush_on_the_things():
    task = demo.scene_task()
    curve, straight, other = task.tracks.sampled(17).numpy()
    for bent in (curve, other):
        chord = (bent[-1] - bent[0]) / np.linalg.norm(bent[-1] - bent[0])
        assert np.abs(np.cross(bent - bent[0], chord)).max() > 2
    assert np.ptp(straight[:, 0]) == 0
    assert np.ptp(straight[:, 1]) == 17
    # All but the ring begin on themselves.
    assert [bool(task.mask[int(way[0, 1]), int(way[0, 0])]) for way in (curve, straight, other)] == [True, True, False]
    assert 0 < task.mask.sum() < 3 * np.pi * 8**2


def test_distances_of_videos_that_are_known():
    task = demo.scene_task()
    still = np.repeat(task.truth[:1], 17, axis=0)
    gone = still.copy()
    gone[1:] = still[0, 0, 0]
    things = demo._measure(task, {demo.WITHOUT: still, demo.WITH: task.truth, demo.BOTH: gone})
    by_hand = [np.hypot(17 - 13, 32 - 14), 51 - 34, np.hypot(47 - 33, 12 - 23)]
    for thing, expected in zip(things, by_hand, strict=True):
        assert thing["videos"][demo.WITH]["distance_pixels"] < 0.1
        found = thing["videos"][demo.WITHOUT]
        assert found["distance_pixels"] == pytest.approx(expected, abs=0.1)
        assert found["distance_percent"] == pytest.approx(100 * expected / 64, abs=0.2)
        # A thing that has vanished is not said to be where it was.
        assert not thing["videos"][demo.BOTH]["found"]
    rows = demo._table(things).splitlines()
    assert [row.split("  ")[-1] for row in rows[1:]] == ["lost"] * 3
    assert "(17, 32)" in rows[1]
    assert "18.4 px, 28.8 %" in rows[1]


def test_figures_follow_from_the_reported_positions(report):
    assert report["frame"] == {"height": 64, "width": 64}
    assert [thing["asked"][0] for thing in report["things"]] == [[13, 14], [51, 51], [33, 23]]
    assert [thing["asked"][-1] for thing in report["things"]] == [[17, 32], [51, 34], [47, 12]]
    for thing in report["things"]:
        assert list(thing["videos"]) == [demo.WITHOUT, demo.WITH, demo.BOTH]
        for result in thing["videos"].values():
            assert len(result["track"]) == len(thing["asked"]) == 17
            distance = np.hypot(*np.subtract(result["track"][-1], thing["asked"][-1]))
            assert result["distance_pixels"] == pytest.approx(distance, abs=0.006)
            assert result["distance_percent"] == pytest.approx(distance / 0.64, abs=0.006)


def test_only_control_and_retrieval_differ(report):
    made = report["generations"]
    asked = {
        "trajectories": [[list(point) for point in way.points] for way in demo.WAYS],
        "motion_mask": "ndarray 64×64",
    }
    assert [each["control"] for each in made.values()] == [{}, asked, asked]
    assert [len(each["references"]) for each in made.values()] == [0, 0, 9]
    assert {each["seed"] for each in made.values()} == {5}
    changed = {
        "control",
        "control_scale",
        "control_guidance_scale",
        "references",
        "num_references",
        "min_similarity",
        "injected_effect",
        "database",
    }
    same = [{key: value for key, value in each.items() if key not in changed} for each in made.values()]
    assert same[0] == same[1] == same[2]


def test_files_and_words(done, report):
    said, out = done
    assert report["videos"] == demo.FILES
    for name in demo.FILES.values():
        made = probe(out / name)
        assert (made.width, made.height, made.num_frames, made.fps) == (64, 64, 17, 8)
        assert str(out / name) in said
    videos = {name: (out / name).read_bytes() for name in demo.FILES.values()}
    assert videos["controlled.mp4"] != videos["uncontrolled.mp4"]
    assert demo._table(report["things"]) in said
    assert f"Sheet:  {out / 'sheet.png'}" in said
    assert f"Note: {demo.UNTRAINED}" in said
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 8 * demo.TILE
        assert sheet.height > 384 + 4 * demo.TILE  # the drawn ways, three videos, what was asked for


def test_a_picture_of_ones_own(bundle, tmp_path):
    pytest.importorskip("cv2")
    # Drawn on a canvas twice as large as the picture, which the pipeline squeezes to 64×64.
    given = own_picture(tmp_path, [[(96, 64), (144, 96)], [(30, 30)]], canvas=(128, 192))
    made = demo.run_control_demo(**given, bundle=bundle, out=tmp_path / "out", num_inference_steps=1)
    assert [video.name for video in made.videos] == ["uncontrolled.mp4", "controlled.mp4"]
    report = json.loads(made.report.read_text(encoding="utf-8"))
    drag, stays = report["things"]
    assert (drag["asked"][0], drag["asked"][-1]) == ([32, 32], [48, 48])
    assert stays["asked"] == [[10, 15]] * 17
    for thing in (drag, stays):
        assert all(each["track"][0] == thing["asked"][0] for each in thing["videos"].values())
    assert "track 2" in made.table
    assert not (tmp_path / "out" / "databases").exists()


def test_points_of_a_picture_are_followed_in_pixels_of_the_video(tmp_path):
    pytest.importorskip("cv2")
    task = demo.picture_task(**own_picture(tmp_path, [[(48, 32), (72, 48)]]))
    # A smooth pattern that moves a pixel to the right and half a pixel down a frame.
    y, x = np.mgrid[:64, :64]
    waves = [120 + 50 * np.sin((x - t) / 4) + 50 * np.cos((y - 0.5 * t) / 5) for t in range(9)]
    frames = np.repeat(np.stack(waves)[..., None], 3, axis=3).astype(np.uint8)
    positions, found = task.follow(frames)
    assert positions[0, 0].tolist() == [32, 32]
    assert positions[0, 8].tolist() == pytest.approx([40, 36], abs=0.5)
    assert found.all()


def test_what_does_not_belong_together_is_refused(tmp_path):
    given = own_picture(tmp_path, [[(10, 10)]])
    for arguments, message in (
        (("demo", "--control", "--image", given["image"]), "an image without tracks"),
        (("demo", "--control", "--tracks", given["tracks"]), "tracks without an image"),
        (("demo", "--tracks", given["tracks"]), "belong to --control"),
        (("demo", tmp_path, "--control"), "leave out CLIPS"),
    ):
        refused = run(*arguments)
        assert refused.returncode != 0
        assert message in " ".join(refused.stderr.replace("│", " ").split())


def test_tracks_outside_the_image_are_refused_before_anything_is_loaded(tmp_path):
    pytest.importorskip("cv2")
    for points, message in (
        ([[(10, 10)], [(120, 10), (20, 20)]], r"trajectories\[1\] starts at \(120, 10\), outside the image of 96x64"),
        ([], r"ways.json holds no track"),
    ):
        with pytest.raises(ValueError, match=message):
            demo.run_control_demo(**own_picture(tmp_path, points), bundle=tmp_path / "none", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_own_pictures_need_opencv(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"needs OpenCV: pip install 'motionrag\[control\]'"):
        demo.run_control_demo(**own_picture(tmp_path, [[(10, 10)]]), out=tmp_path / "out")
