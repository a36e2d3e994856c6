"""The demo: one image under three databases, and on clips of one's own."""

import json

import numpy as np
import pytest
from PIL import Image

from motionrag.pocket import demo
from motionrag.pocket.world import named_domain, same_start, sample_clip
from motionrag.video import probe
from tests.world_clips import write_families


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return demo.run_demo(out=tmp_path_factory.mktemp("demo"), num_inference_steps=2)


@pytest.fixture(scope="module")
def report(done):
    return json.loads(done.report.read_text(encoding="utf-8"))


def test_three_databases_of_three_motions_and_one_unseen_scene(report):
    domains = [named_domain(verb) for verb in demo.VERBS]
    assert len({each.dynamics.family for each in domains}) == 3
    assert [each["name"] for each in report["databases"]] == list(demo.VERBS)
    things = report["prompt"].removesuffix(" moves")
    for each in report["databases"]:
        assert (each["index"]["added"], each["index"]["failed"]) == (demo.CLIPS_PER_DOMAIN, [])
        captions = [hit["caption"] for hit in each["generation"]["references"]]
        assert len(captions) == 9
        assert all(caption.endswith(f" {each['name']}s") for caption in captions)
        assert not any(caption.startswith(things) for caption in captions)
        assert each["name"] not in report["prompt"]


def test_only_the_database_differs(report):
    settings = [{**each["generation"]} for each in report["databases"]]
    for each in settings:
        del each["database"], each["references"], each["injected_effect"], each["abstained"]
    assert settings[0] == settings[1] == settings[2]
    plain = report["without_retrieval"]["generation"]
    assert (plain["seed"], plain["prompt"]) == (settings[0]["seed"], settings[0]["prompt"])
    assert plain["references"] == []


def test_databases_differ_by_motion_alone():
    first = [sample_clip(named_domain(verb), (0, 0), truth=False) for verb in demo.VERBS]
    assert len({clip.things for clip in first}) == 1


def test_every_video_is_judged_by_every_truth(done, report):
    for judged in (report["without_retrieval"], *report["databases"]):
        assert set(judged["track_errors"]) == set(demo.VERBS)
        assert all(0 < error < 100 for error in judged["track_errors"].values())
    sources = [result.source for result in done.results]
    for source in sources:
        errors = demo._track_errors(source.world.frames, sources)
        others = [errors[each.name] for each in sources if each is not source]
        assert errors[source.name] < 2  # the truth itself
        assert min(others) > 15
    truths = same_start([named_domain(verb) for verb in demo.VERBS], demo.UNSEEN)
    assert all(clip.visible.all() for clip in truths)


def test_files(done):
    assert {file.name for file in done.videos} == {"video_plain.mp4", *(f"video_{verb}.mp4" for verb in demo.VERBS)}
    for file in done.videos:
        made = probe(file)
        assert (made.width, made.height, made.num_frames, made.fps) == (64, 64, 17, 8)
    with Image.open(done.sheet) as sheet:
        # Query, without retrieval, and for each database two references, the result and the truth.
        assert sheet.height > 14 * demo.TILE
        assert sheet.width > 8 * demo.TILE


def test_retrieval_changes_the_video(done):
    for result in done.results:
        assert result.change > 0
        assert result.output.injected_effect.mean > 0
    assert (done.results[0].frames != done.results[1].frames).any()


def test_own_clips_make_one_database(tmp_path):
    captions = write_families(tmp_path / "clips")
    out = tmp_path / "out"
    for _ in range(2):  # a second run replaces the database of the first
        done = demo.run_demo(tmp_path / "clips", captions=captions, out=out, num_inference_steps=1)
        [result] = done.results
        assert result.index.added == 18
        assert result.track_errors == {}
        assert [file.name for file in done.videos] == ["video_plain.mp4", "video.mp4"]
    report = json.loads(done.report.read_text(encoding="utf-8"))
    # The first clip gives the image and is no reference, though it is the most similar.
    found = [hit["uri"] for hit in report["databases"][0]["generation"]["references"]]
    assert str(tmp_path / "clips" / "orbit_1.mp4") in found
    assert str(tmp_path / "clips" / "orbit_0.mp4") not in found
    assert report["prompt"] == "a red ball circles"


def test_an_image_of_ones_own_has_no_truth(tmp_path):
    captions = write_families(tmp_path / "clips")
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / "query.png")
    done = demo.run_demo(
        tmp_path / "clips",
        captions=captions,
        image=tmp_path / "query.png",
        prompt="a red ball circles",
        out=tmp_path / "out",
        num_inference_steps=1,
    )
    [result] = done.results
    assert result.source.truth is None
    assert result.references[0].clip.caption == "a red ball circles"


def test_folder_without_a_readable_clip(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"No clip in .* can be read"):
        demo.run_demo(tmp_path, out=tmp_path / "out")
