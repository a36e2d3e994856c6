"""The commands as a user calls them, by output, files and exit codes; mostly in this process: imports take long."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
from PIL import Image

from motionrag.bundle import MotionBundle
from motionrag.cli import main
from motionrag.video import Clip, probe, read_clip
from tests.world_clips import write_families


def run(*arguments):
    """Call the command line; gives returncode, stdout and stderr as a process would."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["motionrag", *map(str, arguments)]),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return SimpleNamespace(returncode=ended.value.code or 0, stdout=out.getvalue(), stderr=err.getvalue())


def run_json(*arguments):
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_families(folder)
    return folder


@pytest.fixture(scope="module")
def database(tmp_path_factory, clips):
    path = tmp_path_factory.mktemp("db") / "shapes"
    report = run_json("index", clips, "--captions", clips / "captions.csv", "--out", path)
    assert (report["added"], report["total"], report["failed"]) == (18, 18, [])
    return path


def test_indexing_again_adds_nothing(clips, database):
    report = run_json("index", clips, "--captions", clips / "captions.csv", "--out", database)
    assert (report["added"], report["changed"], report["unchanged"]) == (0, 0, 18)


def test_dry_run_of_a_new_database_writes_nothing(clips, tmp_path):
    report = run_json("index", clips, "--out", tmp_path / "new", "--dry-run")
    assert (report["added"], report["dry_run"]) == (18, True)
    assert list(tmp_path.iterdir()) == []


def test_search_by_text_and_where(database):
    found = run_json("search", database, "--text", "a red ball hops", "-k", 3, "--where", "family = 'hop'")
    assert [hit["metadata"]["family"] for hit in found["references"]] == ["hop"] * 3
    assert [hit["rank"] for hit in found["references"]] == [1, 2, 3]


def test_search_by_motion_leaves_the_clip_itself_out(clips, database):
    found = run_json("search", database, "--motion", clips / "orbit_0.mp4", "-k", 18)
    names = [hit["uri"].rsplit("/", 1)[-1] for hit in found["references"]]
    assert len(names) == 17
    assert "orbit_0.mp4" not in names


def test_mixed_search_takes_weights(clips, database, tmp_path):
    image = tmp_path / "query.png"
    Image.fromarray(read_clip(Clip(clips / "fall_1.mp4")).frames[0]).save(image)
    arguments = ("search", database, "--text", "something falls", "--image", image, "-k", 1)
    [hit] = run_json(*arguments, "--weight", "text=0", "--weight", "image=1")["references"]
    assert hit["score"] == pytest.approx(hit["scores"]["image"])
    assert hit["scores"]["image"] == pytest.approx(1, abs=1e-3)


def test_plain_output_is_one_line_a_hit(database):
    done = run("search", database, "--text", "orbit", "-k", 2)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["1", "2"]


def test_generate_writes_video_and_json(clips, database, tmp_path):
    image, video = tmp_path / "first.png", tmp_path / "out.mp4"
    Image.fromarray(read_clip(Clip(clips / "orbit_0.mp4")).frames[0]).save(image)
    report = run_json(
        "generate",
        image,
        "--prompt",
        "a ball circles",
        "--database",
        database,
        "--references",
        2,
        "--steps",
        2,
        "--out",
        video,
    )
    assert [reference["rank"] for reference in report["references"]] == [1, 2]
    assert report["injected_effect"]["mean"] > 0
    made = probe(video)
    assert (made.width, made.height, made.num_frames, made.fps) == (64, 64, 17, 8)
    assert json.loads(video.with_suffix(".json").read_text())["prompt"] == "a ball circles"


def test_info_and_verify(database):
    facts = run_json("info", database)
    assert facts["clips"] == 18
    assert facts["licences"] == {"Apache-2.0": 18}
    assert run_json("info", "pocket")["backbone"] == "cogvideox"
    assert "torch" in run_json("info")
    assert run_json("verify", database) == {"database": str(database), "ok": True, "findings": []}


def test_verify_fails_on_damage(database, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(database, copy)
    (copy / "index" / "text.faiss").write_bytes(b"")
    done = run("verify", copy)
    assert done.returncode == 1
    assert "index 'text'" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["search", "nowhere", "--text", "x"], 1, "There is no database at"),
        (["index", "nowhere", "--out", "db"], 1, "There is no file or folder nowhere"),
        (["info", "no/such/bundle"], 1, "neither 'pocket' nor 'pocket-control', nor a folder"),
        (["search", "nowhere"], 2, "--text, --image or --motion"),
        (["index", "clips"], 2, "--out"),
        (["sing"], 2, "No such command 'sing'"),
    ],
)
def test_errors_are_sentences_and_exit_codes(arguments, code, message):
    done = run(*arguments)
    assert done.returncode == code
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_process_of_its_own_says_one_sentence_and_with_debug_a_traceback():
    command = [sys.executable, "-m", "motionrag", "search", "nowhere", "--text", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    done = subprocess.run([*command, "--debug"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_strict_indexing_fails(clips, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "broken.mp4").write_bytes(b"no video")
    done = run("index", folder, "--out", tmp_path / "db", "--strict")
    assert done.returncode == 1
    assert "broken.mp4" in done.stderr
    report = run_json("index", folder, "--out", tmp_path / "db")
    assert (report["added"], len(report["failed"])) == (0, 1)


def test_encoder_options_default_to_those_of_the_database(clips, tmp_path):
    text_encoder = tmp_path / "words"
    shutil.copytree(MotionBundle.from_pretrained("pocket").path_or_id("text_encoder"), text_encoder)
    run_json("index", clips, "--out", tmp_path / "db", "--text-encoder", text_encoder)
    for options in ([], ["--encoder", "pocket"], ["--text-encoder", text_encoder]):
        assert run_json("index", clips, "--out", tmp_path / "db", *options)["unchanged"] == 18
    assert run_json("info", tmp_path / "db")["encoder"] == {"source": "pocket", "text_encoder": str(text_encoder)}


def test_compact_says_what_it_freed(database, tmp_path):
    shutil.copytree(database, tmp_path / "copy")
    done = run("compact", tmp_path / "copy")
    assert done.returncode == 0
    assert "bytes before" in done.stdout


def test_demo_says_what_it_made(clips, tmp_path):
    out = tmp_path / "out"
    arguments = ("demo", clips, "--captions", clips / "captions.csv", "--out", out, "--steps", 1)
    report = run_json(*arguments)
    assert {"video.mp4", "video_plain.mp4", "sheet.png", "report.json"} <= {file.name for file in out.iterdir()}
    assert report == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["databases"][0]["change_by_retrieval"] > 0
    trained = run_json("info", "pocket")["trained"]
    assert ("untrained" in report["note"]) is not trained
    done = run(*arguments)
    assert "With clips, 18 new, 0 changed, 0 unchanged" in done.stdout
    assert f"Sheet:  {out / 'sheet.png'}" in done.stdout
    assert ("Note: " in done.stdout) is not trained


@pytest.mark.parametrize("command", ["index", "search", "generate", "info", "verify", "compact", "demo"])
def test_help_shows_an_example(command):
    done = run(command, "--help")
    assert done.returncode == 0
    assert f"Example: motionrag {command}" in " ".join(done.stdout.split())
