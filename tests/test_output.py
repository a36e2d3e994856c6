"""What is written beside a video, and the video itself."""

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

from motionrag import Clip, Reference
from motionrag.adapters import InjectedEffect
from motionrag.output import MotionRAGOutput
from motionrag.video import VideoError
from tests.video_files import moving_frames

SETTINGS = {"negative_prompt": None, "num_references": 9, "motion_scale": 1.0, "min_similarity": None, "database": "db"}


def reference(rank=1, **clip):
    return Reference(
        clip=Clip("clips/ä.mp4", caption="ein Kreis dreht sich", licence="CC0", metadata={"motion": "orbit"}, **clip),
        id=f"{rank:032x}",
        rank=rank,
        score=0.5,
        scores={"text": 0.5},
        weight=1.0,
        motion_tokens=torch.zeros(2, 3),
        context_tokens=torch.zeros(2, 3),
    )


def output(frames, *, batch=None, **changes):
    """An output for one image, or for a list of `batch` images."""
    single = batch is None
    fields = {
        "frames": frames,
        "references": [reference(1), reference(2)] if single else [[reference(i + 1)] * i for i in range(batch)],
        "abstained": False if single else [i == 0 for i in range(batch)],
        "injected_effect": InjectedEffect(mean=0.25, per_site={"blocks.0": 0.25}),
        "motion_tokens": torch.zeros(1, 2, 3),
        "fps": 8,
        "settings": {
            **SETTINGS,
            "prompt": "a red ball — schön" if single else [f"prompt {i}" for i in range(batch)],
            "seed": 3 if single else [10 + i for i in range(batch)],
        },
    }
    return MotionRAGOutput(**{**fields, **changes})


def pictures(num_frames=9, size=(64, 48), seed=0):
    return moving_frames(num_frames, size, seed=seed)


def as_type(videos, output_type):
    """`(b t h w c)` uint8 as diffusers gives it."""
    if output_type == "pil":
        return [[Image.fromarray(frame) for frame in video] for video in videos]
    array = np.stack(videos).astype(np.float32) / 255
    return array if output_type == "np" else torch.from_numpy(array).permute(0, 1, 4, 2, 3)


def decode(file):
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, float(stream.average_rate)


def strict_json(file):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("size", [(64, 48), (50, 34), (33, 17)])
def test_mp4_keeps_size_rate_count_and_picture(tmp_path, output_type, size):
    video = pictures(size=size)
    (file,) = output(as_type([video], output_type)).save(tmp_path / "new" / "a.mp4")
    frames, fps = decode(file)
    assert frames.shape == video.shape
    assert fps == 8
    assert np.abs(frames.astype(int) - video).mean() < 6
    assert strict_json(file.with_suffix(".json"))["fps"] == 8


def test_gif(tmp_path):
    video = pictures()
    (file,) = output(as_type([video], "pil")).save(tmp_path / "a.gif")
    frames, _ = decode(file)
    assert frames.shape == video.shape
    with Image.open(file) as animation:
        assert animation.n_frames == 9
        assert animation.size == (64, 48)


def test_the_json_is_complete(tmp_path):
    (file,) = output(as_type([pictures()], "pil")).save(tmp_path / "a.mp4")
    content = strict_json(file.with_suffix(".json"))
    assert content["prompt"] == "a red ball — schön"
    assert content["seed"] == 3
    assert content["abstained"] is False
    assert content["injected_effect"] == {"mean": 0.25, "per_site": {"blocks.0": 0.25}}
    assert content.keys() >= SETTINGS.keys()
    first, second = content["references"]
    assert (first["rank"], second["rank"]) == (1, 2)
    assert first["uri"] == "clips/ä.mp4"
    assert first["caption"] == "ein Kreis dreht sich"
    assert first["licence"] == "CC0"
    assert first["metadata"] == {"motion": "orbit"}
    assert "motion_tokens" not in first


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_numbers_that_json_does_not_know_become_null(tmp_path, odd):
    made = output(
        as_type([pictures()], "pil"),
        settings={**SETTINGS, "min_similarity": odd, "motion_scale": np.float32(0.5)},
        injected_effect=InjectedEffect(mean=odd, per_site={"a": odd}),
        references=[reference(), Reference(**{**vars(reference()), "score": odd, "scores": {"text": odd}})],
    )
    (file,) = made.save(tmp_path / "a.mp4")
    content = strict_json(file.with_suffix(".json"))
    assert content["min_similarity"] is None
    assert content["motion_scale"] == 0.5
    assert content["injected_effect"] == {"mean": None, "per_site": {"a": None}}
    assert content["references"][1]["scores"] == {"text": None}


def test_a_batch_is_numbered_and_every_video_has_its_own_json(tmp_path):
    videos = [pictures(seed=seed) for seed in range(3)]
    settings = {**SETTINGS, "prompt": ["a", "b", "c"], "seed": [1, 2, 3], "negative_prompt": ["x", "y", "z"]}
    files = output(as_type(videos, "np"), batch=3, settings=settings).save(tmp_path / "a.mp4")
    assert [file.name for file in files] == ["a-0.mp4", "a-1.mp4", "a-2.mp4"]
    for index, (file, video) in enumerate(zip(files, videos, strict=True)):
        assert np.abs(decode(file)[0].astype(int) - video).mean() < 6
        content = strict_json(file.with_suffix(".json"))
        assert (content["prompt"], content["seed"], content["negative_prompt"]) == (
            "abc"[index],
            index + 1,
            "xyz"[index],
        )
        assert len(content["references"]) == index
        assert content["abstained"] is (index == 0)


def test_a_list_of_one_image_keeps_the_name(tmp_path):
    (file,) = output(as_type([pictures()], "pil"), batch=1).save(tmp_path / "a.mp4")
    assert file == tmp_path / "a.mp4"
    content = strict_json(tmp_path / "a.json")
    assert content["prompt"] == "prompt 0"
    assert content["references"] == []


def test_a_shared_seed_is_written_for_each(tmp_path):
    made = output(as_type([pictures()] * 2, "pil"), batch=2, settings={**SETTINGS, "prompt": ["a", "b"], "seed": 7})
    assert [made.to_dict(index)["seed"] for index in range(2)] == [7, 7]


@pytest.mark.parametrize("name", ["a.avi", "a", "a.json", "a.mp4.txt"])
def test_another_suffix_is_refused_by_name(tmp_path, name):
    with pytest.raises(VideoError, match=r"knows \.mp4 and \.gif"):
        output(as_type([pictures()], "pil")).save(tmp_path / name)
    assert list(tmp_path.glob("*.json")) == []


def test_saving_again_replaces(tmp_path):
    output(as_type([pictures(9)], "pil")).save(tmp_path / "a.mp4")
    output(as_type([pictures(17)], "pil")).save(str(tmp_path / "a.mp4"))
    assert len(decode(tmp_path / "a.mp4")[0]) == 17
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.mp4"]
