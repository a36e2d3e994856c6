"""MC-Bench: figures that are known beforehand, items that do not work, and runs that are stopped and continued."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from motionrag.encoder import MotionEncoder
from motionrag.evaluation.frame_consistency import frame_consistency
from motionrag.evaluation.mc_bench import ImageFeatures, evaluate_mc_bench
from motionrag.evaluation.mc_bench_pocket import write_pocket_bench
from motionrag.evaluation.mean_distance import md_img, targets
from motionrag.video import Clip, read_clip, write_video
from tests.test_cli import run, run_json

HEIGHT, WIDTH = 40, 56


class Known:
    """Moves every point by `speed` (x, y) pixels a frame from an `offset` on, and counts its calls."""

    def __init__(self, speed=(0.0, 0.0), offset=(0.0, 0.0)):
        self.name, self.speed, self.offset, self.calls = "known", torch.tensor(speed), torch.tensor(offset), 0

    def __call__(self, frames, points):
        self.calls += 1
        moved = torch.arange(len(frames))[:, None] * self.speed + self.offset
        return points[:, None] + moved, torch.ones(len(points), len(frames), dtype=torch.bool)


def add_item(root, videos, path, drags, *, size=(HEIGHT, WIDTH), num_frames=16, evaluator_drags=True):
    """An item and a grey video for it; `evaluator_drags` True means the same ones, None no such file."""
    folder = root / path
    folder.mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "first_frame.png")
    (folder / "meta_data.json").write_text(json.dumps({"traj_key_points": drags}))
    if evaluator_drags is not None:
        content = drags if evaluator_drags is True else evaluator_drags
        (folder / "meta_data_new.json").write_text(json.dumps({"traj_key_points": content}))
    video = videos / f"{path}.mp4"
    video.parent.mkdir(parents=True, exist_ok=True)
    write_video(video, np.full((num_frames, *size, 3), 128, np.uint8), 8)
    return video


@pytest.fixture
def places(tmp_path):
    return tmp_path / "bench", tmp_path / "videos", tmp_path / "out"


def items_of(out):
    with (out / "items.csv").open(newline="") as file:
        return {f"{row['category']}/{row['item']}": row for row in csv.DictReader(file)}


def measure(places, **options):
    root, videos, out = places
    return evaluate_mc_bench(root, videos, out=out, **{"tracker": Known(), **options})


def test_a_constant_offset_is_its_length(places):
    add_item(*places[:2], "a/still", [[[20, 16]], [[30, 20]]])
    row = items_of(measure(places, tracker=Known(offset=(3.0, 4.0))).folder)["a/still"]
    assert float(row["md_vid"]) == pytest.approx(5)
    # The released evaluator lets a drag of one point go to (x + 1, y + 1).
    drift = [np.hypot(3 - t / 15, 4 - t / 15) for t in range(1, 16)]
    assert float(row["md_vid_published"]) == pytest.approx(np.mean(drift), abs=1e-4)
    assert (row["drags"], row["video_frames"], row["pairs"], float(row["drawn"])) == ("2", "16", "15", 0)


def test_fewer_frames_are_compared_at_the_same_moment(places):
    add_item(*places[:2], "a/right", [[[20, 16], [35, 16]]])  # one pixel a frame
    row = items_of(measure(places, tracker=Known(speed=(1.0, 0.0)), frames=2).folder)["a/right"]
    assert float(row["md_vid"]) == pytest.approx(0, abs=1e-5)
    # As released: targets of frames 8 and 15 against predictions in frames 1 and 2.
    assert float(row["md_vid_published"]) == pytest.approx((7 + 13) / 2, abs=1e-4)
    assert float(row["drawn"]) == pytest.approx((8 + 15) / 2, abs=1e-4)


def test_distances_are_in_pixels_of_the_first_frame(places):
    add_item(*places[:2], "a/twice", [[[20, 16], [35, 16]]], size=(2 * HEIGHT, 2 * WIDTH))
    row = items_of(measure(places, tracker=Known(speed=(2.0, 0.0), offset=(0.0, 6.0))).folder)["a/twice"]
    assert float(row["md_vid"]) == pytest.approx(3, abs=1e-4)


@pytest.mark.parametrize(("num_frames", "pairs"), [(31, 15), (61, 15), (9, 8)])
def test_the_way_is_spread_over_videos_of_any_length(places, num_frames, pairs):
    add_item(*places[:2], "a/long", [[[20, 16], [35, 16]]], num_frames=num_frames)
    row = items_of(measure(places, tracker=Known(speed=(15 / (num_frames - 1), 0.0))).folder)["a/long"]
    assert float(row["md_vid"]) == pytest.approx(0, abs=1e-4)
    assert (int(row["video_frames"]), int(row["pairs"])) == (num_frames, pairs)


def test_starts_at_the_border_and_between_pixels(places):
    drags = [[[0, 1], [15, 1]], [[30.75, 20.5], [45.75, 20.5]]]
    add_item(*places[:2], "a/border", drags)
    row = items_of(measure(places, tracker=Known(speed=(1.0, 0.0))).folder)["a/border"]
    assert float(row["md_vid"]) == pytest.approx(0, abs=1e-4)
    # 4 columns of 5 rows are tracked for the first drag, so the 37th pixel is the second drag's, and no other follows.
    assert row["md_vid_published"] == ""
    assert measure(places, tracker=Known(speed=(1.0, 0.0))).summary["categories"]["a"]["published_items"] == 0


def test_the_released_evaluator_reads_its_own_file(places):
    add_item(*places[:2], "a/other", [[[20, 16], [35, 16]]], evaluator_drags=[[[20, 16], [20, 31]]])
    add_item(*places[:2], "a/without", [[[20, 16], [35, 16]]], evaluator_drags=None)
    rows = items_of(measure(places, tracker=Known(speed=(1.0, 0.0))).folder)
    assert float(rows["a/other"]["md_vid"]) == pytest.approx(0, abs=1e-5)
    assert float(rows["a/other"]["md_vid_published"]) == pytest.approx(8 * np.sqrt(2), abs=1e-4)
    assert rows["a/without"]["md_vid_published"] == ""


def test_means_are_over_videos_by_category(places):
    add_item(*places[:2], "a/one", [[[20, 16], [35, 16]]])  # drawn 8 px on the mean
    add_item(*places[:2], "a/two", [[[20, 16]], [[24, 16]], [[28, 16]]])  # 0
    add_item(*places[:2], "b/three", [[[20, 8], [20, 38]]])  # 16
    report = measure(places)
    figures = report.summary["categories"]
    assert {name: round(each["md_vid"], 4) for name, each in figures.items()} == {"a": 4, "b": 16, "all": 8}
    assert json.loads((places[2] / "summary.json").read_text()) == json.loads(json.dumps(report.summary))
    assert "| b | 1 | 16.00 (16.00–16.00) |" in report.table


def test_what_does_not_work_is_named_and_the_rest_is_measured(places):
    root, videos, _ = places
    drags = [[[20, 16], [35, 16]]]
    add_item(root, videos, "a/good", drags)
    (root / "readme.txt").touch(), (root / "a" / "notes.txt").touch()
    add_item(root, videos, "a/no_video", drags).unlink()
    add_item(root, videos, "a/broken", drags).write_bytes(b"no video")
    add_item(root, videos, "a/cropped", drags, size=(HEIGHT, WIDTH - 8))
    add_item(root, videos, "a/no_json", drags)
    (root / "a/no_json/meta_data.json").unlink()
    add_item(root, videos, "a/bad_json", drags)
    (root / "a/bad_json/meta_data.json").write_text("{")
    add_item(root, videos, "a/empty", [])
    add_item(root, videos, "a/nan", [[[20, None]]])
    add_item(root, videos, "a/outside", [[[20, 16], [35, 16]], [[-1, 5], [9, 9]]])
    twice = add_item(root, videos, "a/twice", drags)
    (videos / "a" / "twice").mkdir()
    (videos / "a" / "twice" / "sampled.mp4").write_bytes(twice.read_bytes())
    summary = measure(places).summary
    assert (summary["items"], summary["measured"], summary["missing"]) == (10, 1, ["a/no_video"])
    assert summary["notes"] == ["a/notes.txt is no item", "readme.txt is no category"]
    expected = {
        "a/broken": "cannot be read as a video",
        "a/cropped": "48x40 pixels, a/cropped is 56x40",
        "a/no_json": "lacks meta_data.json",
        "a/bad_json": "is not JSON",
        "a/empty": "holds no track",
        "a/nan": "track 0",
        "a/outside": "drag 1 starts at (-1, 5), outside the 56x40 picture",
        "a/twice": "has 2 videos (twice.mp4, twice/sampled.mp4)",
    }
    assert summary["failed"].keys() == expected.keys()
    for path, message in expected.items():
        assert message in summary["failed"][path]


def test_the_only_video_of_a_folder_counts_whatever_its_name(places):
    video = add_item(*places[:2], "a/item", [[[20, 16], [35, 16]]])
    video.with_suffix("").mkdir()
    video.rename(video.with_suffix("") / "sampled_video-motion_bucket_id_17-id_frame.mp4")
    assert measure(places).summary["measured"] == 1


def test_the_last_of_five_panels_counts(places):
    root, _, out = places
    bench, true_videos = write_pocket_bench(root.parent, items=1)
    [file] = (true_videos / "pocket").glob("*.mp4")
    frames = read_clip(Clip(file)).frames
    write_video(file, np.concatenate([frames[:1].repeat(16, 0)] * 4 + [frames], axis=2), 8, full_colour=True)
    true = evaluate_mc_bench(bench, true_videos, out=out, panels=5).summary["categories"]["all"]
    assert true["md_vid"] < 0.2 * true["drawn"]
    without = evaluate_mc_bench(bench, true_videos, out=out / "1").summary
    assert "has it panels?" in next(iter(without["failed"].values()))
    three = evaluate_mc_bench(bench, true_videos, out=out / "3", panels=3).summary
    assert "not 3 panels of one width" in next(iter(three["failed"].values()))


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket")
    bench, videos = write_pocket_bench(folder, items=4)
    for file in (videos / "pocket").glob("*.mp4"):
        still = folder / "still" / "pocket" / file.name
        still.parent.mkdir(parents=True, exist_ok=True)
        write_video(still, read_clip(Clip(file)).frames[:1].repeat(16, 0), 8, full_colour=True)
    features = ImageFeatures.of_encoder(MotionEncoder.from_pretrained("pocket"))
    true = evaluate_mc_bench(bench, videos, out=folder / "true", features=features)
    still = evaluate_mc_bench(bench, folder / "still", out=folder / "still_out", features=features)
    return true, still


def test_true_videos_score_the_trackers_error_and_still_ones_the_length_of_the_drags(pocket):
    true, still = (report.summary["categories"]["pocket"] for report in pocket)
    assert true["items"] == still["items"] == 4
    assert true["drawn"] == still["drawn"] > 5
    assert true["md_vid"] < 1.2  # pixels of 64: the tracker's error
    for row in items_of(pocket[1].folder).values():
        assert float(row["md_vid"]) == pytest.approx(float(row["drawn"]), abs=0.05)
    # Whole pixels as starts, none near the edge: both definitions agree but for rounding of the block.
    assert still["md_vid_published"] == pytest.approx(still["md_vid"], abs=0.05)


def test_features_tell_motion_and_stillness_apart(pocket):
    true, still = (report.summary["categories"]["pocket"] for report in pocket)
    assert true["md_img"] < 0.5 * still["md_img"]
    assert still["frame_consistency"] == pytest.approx(1, abs=1e-3)
    assert true["frame_consistency"] < still["frame_consistency"]


def test_frame_consistency_is_the_mean_cosine_of_neighbours():
    features = torch.tensor([[2.0, 0.0], [0.0, 5.0], [3.0, 3.0]])  # at right angles, then at 45 degrees
    assert float(frame_consistency(features)) == pytest.approx((0 + np.sqrt(0.5)) / 2)
    with pytest.raises(ValueError, match="two or more frames"):
        frame_consistency(features[:1])


def test_md_img_finds_a_cell_that_moves():
    # A grid of 4 x 6 cells of 7 pixels; the cell of the start, with pixel 10 in its middle, moves one cell a frame.
    features = torch.zeros(3, 2, 4, 6)
    features[:, 1] = 1
    for frame in range(3):
        features[frame, :, 1, 1 + frame] = torch.tensor([1.0, 0.0])
    size = (28, 42)
    assert float(md_img(features, targets([[[10, 10], [24, 10]]], 3), [1, 2], size=size)) == 0
    assert float(md_img(features, targets([[[10, 10]]], 3), [1, 2], size=size)) == (7 + 14) / 2


def test_a_stopped_run_continues_and_a_changed_video_is_measured_again(places):
    root, videos, out = places
    for number in range(4):
        video = add_item(root, videos, f"a/{number}", [[[20, 16], [35, 16]]])

    class Stops(Known):
        def __call__(self, frames, points):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(frames, points)

    with pytest.raises(KeyboardInterrupt):
        measure(places, tracker=Stops())
    assert list(items_of(out)) == ["a/0", "a/1"]
    with (out / "items.csv").open("a") as file:  # what a power cut leaves
        file.write("a,2,1,16,15,8.0")
    tracker = Known()
    report = measure(places, tracker=tracker)
    assert (tracker.calls, report.summary["measured"]) == (2, 4)
    write_video(video, np.full((16, HEIGHT, WIDTH, 3), 90, np.uint8), 8)
    assert measure(places, tracker=tracker).summary["measured"] == 4
    assert (tracker.calls, len(items_of(out))) == (3, 4)
    before = (out / "items.csv").read_text()
    measure(places, tracker=tracker)
    assert (tracker.calls, (out / "items.csv").read_text()) == (3, before)


KILLED = """
import os, sys
from motionrag.evaluation.mc_bench import evaluate_mc_bench
from motionrag.tracking import OpticalFlowTracker
class Dies(OpticalFlowTracker):
    name, calls = "known", 0
    def __call__(self, frames, points):
        self.calls += 1
        if self.calls == 2:
            os.kill(os.getpid(), 9)
        return super().__call__(frames, points)
evaluate_mc_bench(sys.argv[1], sys.argv[2], out=sys.argv[3], tracker=Dies())
"""


def test_a_killed_run_keeps_what_it_measured(places):
    for number in range(3):
        add_item(*places[:2], f"a/{number}", [[[20, 16], [35, 16]]])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, places)], capture_output=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == -9
    assert list(items_of(places[2])) == ["a/0"]
    tracker = Known()
    assert measure(places, tracker=tracker).summary["measured"] == 3
    assert tracker.calls == 2


def test_settings_are_not_mixed(places):
    add_item(*places[:2], "a/one", [[[20, 16], [35, 16]]])
    measure(places)
    other = Known()
    other.name = "other"
    for options, message in [({"tracker": other}, "tracker 'known'"), ({"frames": 3}, "frames 15")]:
        with pytest.raises(ValueError, match=f"holds figures with {message}"):
            measure(places, **options)


@pytest.mark.parametrize(
    ("options", "message"), [({"frames": 16}, "1 to 15"), ({"frames": 0}, "1 to 15"), ({"panels": 0}, "panels is 0")]
)
def test_settings_out_of_range(places, options, message):
    with pytest.raises(ValueError, match=message):
        measure(places, **options)


def test_a_folder_without_items(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        evaluate_mc_bench(tmp_path / "nowhere", tmp_path, out=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no MC-Bench item"):
        evaluate_mc_bench(tmp_path / "empty", tmp_path, out=tmp_path / "out")


def test_commands(tmp_path):
    made = run("pocket", "mc-bench", tmp_path, "--items", 2)
    assert made.returncode == 0, made.stderr
    assert run("pocket", "mc-bench", tmp_path).returncode == 1
    arguments = ("evaluate", "mc-bench", tmp_path / "bench", tmp_path / "videos", "--out", tmp_path / "figures")
    summary = run_json(*arguments)
    assert summary["measured"] == 2
    assert summary["categories"]["pocket"]["md_img"] is None
    shown = run(*arguments)
    assert "| pocket | 2 |" in shown.stdout
    assert "Example: motionrag evaluate mc-bench" in " ".join(run("evaluate", "mc-bench", "--help").stdout.split())
    refused = run(*arguments, "--frames", 3)
    assert (refused.returncode, "holds figures with frames 15" in refused.stderr) == (1, True)
