"""Clips of one's own: which frames are taken, at what size, what happens with bad files; and where training starts."""

import numpy as np
import pytest
import torch

from motionrag.bundle import EncoderSource, MotionBundle
from motionrag.training import ClipFolder, start
from motionrag.video import read_clip
from tests.training.parts import pipeline
from tests.video_files import make_video


def counted(num_frames, size=(32, 32)):
    """Frames whose brightness tells which they are."""
    return np.stack([np.full((size[1], size[0], 3), 5 * index, np.uint8) for index in range(num_frames)])


def test_frames_are_taken_at_the_rate_from_the_middle(tmp_path):
    make_video(tmp_path / "a.mp4", fps=24, frames=counted(45), options={"crf": "0"})
    clips = ClipFolder(str(tmp_path), num_frames=5, height=32, width=32, fps=8)
    video = clips[0]["video"]
    brightness = (video.mean(dim=(1, 2, 3)) + 1) * 127.5 / 5
    # Every third of 24 frames a second; 13 frames of 45, 16 before them and 16 after.
    assert brightness.round().tolist() == [16, 19, 22, 25, 28]
    assert read_clip(clips.spans[0], num_frames=5).num_frames == 13


def test_a_short_clip_is_taken_whole(tmp_path):
    make_video(tmp_path / "a.mp4", fps=24, frames=counted(9), options={"crf": "0"})
    clips = ClipFolder(str(tmp_path), num_frames=5, height=32, width=32, fps=8)
    brightness = (clips[0]["video"].mean(dim=(1, 2, 3)) + 1) * 127.5 / 5
    assert brightness.round().tolist() == [0, 2, 4, 6, 8]


def test_clips_fill_the_size_and_lose_what_sticks_out(tmp_path):
    frames = counted(6, (96, 32))
    frames[:, :, :32], frames[:, :, 32:64], frames[:, :, 64:] = 0, 255, 0
    make_video(tmp_path / "wide.mp4", frames=frames)
    video = ClipFolder(str(tmp_path), num_frames=3, height=48, width=48)[0]["video"]
    assert video.shape == (3, 3, 48, 48)
    assert video.abs().max() <= 1
    assert video[:, :, 4:-4, 4:-4].mean() > 0.9  # the white middle


def test_captions_sources_and_identity(tmp_path):
    for name in ("a", "b"):
        make_video(tmp_path / f"{name}.mp4", num_frames=6)
    (tmp_path / "clips.csv").write_text("file,caption,source\na.mp4,a ball,x\nb.mp4,a box,\n")
    options = {"num_frames": 3, "height": 16, "width": 16}
    clips = ClipFolder(str(tmp_path), captions=str(tmp_path / "clips.csv"), **options)
    assert (clips.texts, clips[1]["caption"]) == (["a ball", "a box"], "a box")
    assert clips.sources == ["x", str((tmp_path / "b.mp4").resolve())]
    same = ClipFolder(str(tmp_path), captions=str(tmp_path / "clips.csv"), **options)
    assert clips.identity == same.identity
    for other in ({"num_frames": 4}, {"height": 32}, {"fps": 4.0}):
        changed = ClipFolder(str(tmp_path), captions=str(tmp_path / "clips.csv"), **{**options, **other})
        assert changed.identity != clips.identity
    make_video(tmp_path / "b.mp4", num_frames=7)
    assert ClipFolder(str(tmp_path), captions=str(tmp_path / "clips.csv"), **options).identity != clips.identity


def test_a_file_that_is_no_video_stops_before_training_or_is_named_and_left_out(tmp_path, caplog):
    make_video(tmp_path / "good.mp4", num_frames=6)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    options = {"num_frames": 3, "height": 16, "width": 16}
    with pytest.raises(ValueError, match=r"1 of 2 clips of .*bad\.mp4.*set leave_out_unreadable"):
        ClipFolder(str(tmp_path), **options)
    clips = ClipFolder(str(tmp_path), **options, leave_out_unreadable=True)
    assert len(clips) == 1
    assert "bad.mp4" in caplog.text
    (tmp_path / "good.mp4").unlink()
    with pytest.raises(ValueError, match="holds no clip to train on"):
        ClipFolder(str(tmp_path), **options, leave_out_unreadable=True)


def test_a_new_bundle_fits_its_backbone_and_changes_nothing(made_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "TOKEN_DIM", 32)  # at the published 1 024 it takes half a gigabyte
    encoders = {**start.ENCODERS}
    encoders["video"], encoders["image"] = (EncoderSource(str(made_bundle / name)) for name in ("video", "image"))
    base = str(made_bundle / "backbone")
    start.new_bundle(base, tmp_path / "new", encoders=encoders)
    bundle = MotionBundle.from_pretrained(tmp_path / "new")
    assert not bundle.config.trained
    assert bundle.path_or_id(bundle.config.base_model) == base
    assert bundle.motion_resampler(torch.randn(1, 7, 32)).shape == (1, 25, 32)
    transformer = pipeline().transformer
    assert bundle.motion_injection.site_names == [f"transformer_blocks.{i}.attn1.to_out.0" for i in range(2)]
    inputs = {
        "hidden_states": torch.randn(1, 5, 8, 8, 8),
        "encoder_hidden_states": torch.randn(1, 4, 8),
        "timestep": torch.tensor([3]),
        "image_rotary_emb": (torch.ones(80, 16), torch.zeros(80, 16)),
    }
    plain = transformer(**inputs).sample
    bundle.motion_injection.attach(transformer)
    with bundle.motion_injection.condition(torch.randn(1, 25, 32)):
        assert torch.equal(transformer(**inputs).sample, plain)
    with pytest.raises(FileExistsError, match="would replace what is in it"):
        start.new_bundle(base, tmp_path / "new", encoders=encoders)
