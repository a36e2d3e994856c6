"""Clips of the world as a folder: what is written is what was drawn, and it can be indexed."""

import csv
import json

import numpy as np
import pytest

from motionrag.database.sources import list_clips
from motionrag.pocket.folder import render_domain
from motionrag.pocket.world import FAMILIES, Domain, domain, named_domain, sample_clip
from motionrag.video import Clip, read_clip
from tests.test_cli import run


def psnr(first, second):
    return 10 * np.log10(255**2 / np.mean((first.astype(float) - second) ** 2))


def test_pixels_survive_the_file(tmp_path):
    for number, family in enumerate(FAMILIES):
        made = domain((5, number), family=family)
        render_domain(tmp_path / family, Domain("blicks", made.dynamics, made.style), 1)
        clip = sample_clip(made, (0, 0), truth=False)
        decoded = read_clip(Clip(tmp_path / family / "blick_0000.mp4"), num_frames=17)
        assert decoded.fps == 8
        assert psnr(decoded.frames, clip.frames) > 45
        things = clip.masks > 0
        assert psnr(decoded.frames[things], clip.frames[things]) > 38  # 4:2:0 gives 24


def test_the_command_writes_what_the_index_reads(tmp_path):
    arguments = ("pocket", "render", "--domain", "blick", "--count", 3, "--family", "orbit", "--seed", 4)
    done = run(*arguments, "--truth", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    table = tmp_path / "out" / "captions.csv"
    assert f"motionrag index {tmp_path / 'out'} --captions {table}" in done.stdout
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    listing = list_clips(tmp_path / "out", captions=table)
    assert listing.failures == []
    assert [clip.caption for clip in listing.clips] == [row["caption"] for row in rows]
    made = named_domain("blick", family="orbit")
    for index, (row, clip) in enumerate(zip(rows, listing.clips, strict=True)):
        drawn = sample_clip(made, (4, index))
        assert row["caption"] == drawn.caption
        assert row["caption"].endswith(" blicks")
        assert (row["family"], row["licence"]) == ("orbit", "Apache-2.0")
        assert (clip.licence, clip.metadata["family"]) == ("Apache-2.0", "orbit")
        assert json.loads(row["parameters"]) == made.dynamics.parameters
        with np.load(tmp_path / "out" / row["file_name"].replace(".mp4", ".npz")) as truth:
            assert set(truth.files) == {"tracks", "visible", "masks", "flow", "flow_visible"}
            for name in truth.files:
                np.testing.assert_array_equal(truth[name], getattr(drawn, name))


def test_the_same_command_writes_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        assert run("pocket", "render", "--domain", "zeeg", "--count", 2, tmp_path / folder).returncode == 0
    assert run("pocket", "render", "--domain", "zeeg", "--count", 2, "--seed", 1, tmp_path / "c").returncode == 0
    files = {folder: [file.read_bytes() for file in sorted((tmp_path / folder).iterdir())] for folder in "abc"}
    assert len(files["a"]) == 3  # no truth unless it is asked for
    assert files["a"] == files["b"]
    assert files["a"] != files["c"]


def test_a_longer_run_begins_with_the_same_clips(tmp_path):
    for count in (1, 2):
        render_domain(tmp_path / str(count), named_domain("blick"), count)
    name = "blick_0000.mp4"
    assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--domain", "two words"), "named by one word of letters"),
        (("--domain", "blick", "--family", "fly"), "no motion family 'fly'; there are fall"),
    ],
)
def test_what_cannot_be_rendered_is_a_sentence(tmp_path, arguments, message):
    done = run("pocket", "render", *arguments, tmp_path / "out")
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_captions_are_not_overwritten(tmp_path):
    render_domain(tmp_path, named_domain("blick"), 1)
    done = run("pocket", "render", "--domain", "zeeg", tmp_path)
    assert done.returncode == 1
    assert "holds captions.csv already" in done.stderr
    assert len(list(tmp_path.iterdir())) == 2


def test_help_shows_an_example():
    done = run("pocket", "render", "--help")
    assert "Example: motionrag pocket render --domain blick" in " ".join(done.stdout.split())
