"""The video encoder against transformers' own model and image processor."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel

from motionrag.encoders import VideoMAEEncoder
from motionrag.encoders.preprocessing import frames_to_tensor
from tests.encoders.test_preprocessing import SIZES, photo
from tests.encoders.tiny import edit_weights, videomae_config


@pytest.fixture
def encoder():
    return VideoMAEEncoder.from_pretrained(videomae_config())


def video(batch=2, frames=4, height=40, width=56, seed=0):
    return torch.rand(batch, frames, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_equals_the_library(size, tmp_path):
    from motionrag.encoders.videomae import IMAGENET_MEAN, IMAGENET_STD

    VideoMAEEncoder.from_pretrained(videomae_config(image_size=224)).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    encoder = VideoMAEEncoder.from_pretrained(tmp_path)
    assert (encoder.image_mean, encoder.image_std) == (IMAGENET_MEAN, IMAGENET_STD)
    frames = [photo(*size, seed=i) for i in range(4)]
    theirs = processor(frames, return_tensors="pt")["pixel_values"]
    ours = encoder.preprocess(frames_to_tensor(np.stack(frames))[None])
    # Theirs is rounded to 8 bits after resizing: half a level, and 1e-3 for torchvision's integer weights.
    in_levels = (ours - theirs).abs() * torch.tensor(IMAGENET_STD)[:, None, None] * 255
    assert in_levels.max() < 1.01
    assert in_levels.mean() < 0.3
    exact = processor([f / np.float32(255) for f in frames], do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=0)


def test_features_are_the_models_last_hidden_state(encoder):
    clip = video(height=32, width=32)
    expected = encoder.model(pixel_values=encoder.preprocess(clip)).last_hidden_state
    assert torch.equal(encoder(clip), expected)
    assert expected.shape == (2, 8, 32)


def test_published_size():
    config = videomae_config(
        image_size=224, num_frames=16, hidden_size=768, num_attention_heads=12, num_hidden_layers=1
    )
    assert VideoMAEEncoder.from_pretrained(config)(video(1, 16)).shape == (1, 1568, 768)


def test_clips_do_not_see_each_other(encoder):
    clips = video(3)
    torch.testing.assert_close(encoder(clips)[1:2], encoder(clips[1:2]), atol=1e-5, rtol=1e-5)


def test_letterbox_sees_the_sides_that_a_crop_ignores():
    config = videomae_config()
    crop, box = (VideoMAEEncoder.from_pretrained(config, fit=fit) for fit in ("crop", "letterbox"))
    box.model.load_state_dict(crop.model.state_dict())
    wide = video(1, height=32, width=96)
    changed = wide.clone()
    changed[..., :20] = -changed[..., :20]
    assert torch.equal(crop(wide), crop(changed))
    assert not torch.allclose(box(wide), box(changed))
    assert VideoMAEEncoder(crop.model, size=32, fit="letterbox").fingerprint != crop.fingerprint
    with pytest.raises(ValueError, match="letterbox"):
        VideoMAEEncoder(crop.model, size=32, fit="stretch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.float16])
def test_every_precision_takes_every_input(encoder, dtype, input_dtype):
    clip = video().to(input_dtype)
    expected = encoder(clip)
    fingerprint = encoder.fingerprint
    features = encoder.to(dtype=dtype)(clip)
    assert features.dtype == encoder.dtype == dtype
    assert encoder.fingerprint == fingerprint
    torch.testing.assert_close(features.float(), expected, atol=0.05, rtol=0.05)


def test_it_stays_frozen(encoder):
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    clip = video().requires_grad_()
    features = encoder(clip)
    assert not features.requires_grad
    assert torch.equal(features, encoder(clip))
    torch.nn.Linear(32, 1)(features).sum().backward()  # an ordinary tensor, not an inference tensor


def test_saving_and_loading(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    again = VideoMAEEncoder.from_pretrained(tmp_path)
    assert torch.equal(again(video()), encoder(video()))
    assert again.fingerprint == encoder.fingerprint
    assert VideoMAEEncoder.from_pretrained(str(tmp_path), dtype=torch.bfloat16).fingerprint == encoder.fingerprint


@pytest.mark.parametrize("mean_pooling", [True, False])
def test_a_fine_tuned_classifier_gives_its_encoder(mean_pooling, tmp_path, caplog):
    classifier = VideoMAEForVideoClassification(videomae_config(use_mean_pooling=mean_pooling)).eval()
    classifier.save_pretrained(tmp_path)
    with caplog.at_level("INFO", logger="motionrag.encoders.pretrained"):
        encoder = VideoMAEEncoder.from_pretrained(tmp_path)
    assert (encoder.model.layernorm is None) == mean_pooling
    clip = video(height=32, width=32)
    expected = classifier.videomae(pixel_values=encoder.preprocess(clip)).last_hidden_state
    assert torch.equal(encoder(clip), expected)
    assert "classifier.weight" in caplog.text


def test_a_pretraining_checkpoint_gives_its_encoder(tmp_path):
    VideoMAEForPreTraining(videomae_config()).save_pretrained(tmp_path)
    assert VideoMAEEncoder.from_pretrained(tmp_path)(video()).shape == (2, 8, 32)


def test_names_of_the_published_checkpoint_are_understood(tmp_path):
    """Published files call the attention biases q_bias and v_bias."""
    classifier = VideoMAEForVideoClassification(videomae_config())
    classifier.save_pretrained(tmp_path)
    encoder = VideoMAEEncoder.from_pretrained(tmp_path)
    weights = classifier.state_dict()
    for name in list(weights):
        published = name.replace("query.bias", "q_bias").replace("value.bias", "v_bias")
        weights[published] = weights.pop(name)
    assert any("q_bias" in name for name in weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert VideoMAEEncoder.from_pretrained(tmp_path).fingerprint == encoder.fingerprint


def test_missing_unexpected_and_misshapen_weights_are_named(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    victim = next(name for name in stored if name.endswith("layernorm_before.weight"))

    edit_weights(tmp_path / "model.safetensors", lambda weights: weights.pop(victim))
    with pytest.raises(ValueError, match=rf"missing: {victim}"):
        VideoMAEEncoder.from_pretrained(tmp_path)

    edit_weights(
        tmp_path / "model.safetensors",
        lambda weights: weights.update({victim: torch.zeros(32), "stray": torch.zeros(1)}),
    )
    with pytest.raises(ValueError, match="unexpected: stray"):
        VideoMAEEncoder.from_pretrained(tmp_path)

    edit_weights(
        tmp_path / "model.safetensors",
        lambda weights: weights.update({victim: torch.zeros(31)}) or weights.pop("stray"),
    )
    with pytest.raises(ValueError, match=rf"of another shape: {victim}"):
        VideoMAEEncoder.from_pretrained(tmp_path)

    edit_weights(tmp_path / "model.safetensors", lambda weights: weights.update({victim: torch.full((32,), torch.nan)}))
    with pytest.raises(ValueError, match=r"layernorm_before\.weight holds NaN"):
        VideoMAEEncoder.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    torch.save(encoder.model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        VideoMAEEncoder.from_pretrained(tmp_path)


def test_preprocessing_is_read_from_the_folder_or_refused(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    stored = json.loads(path.read_text())

    path.write_text(json.dumps({**stored, "image_mean": [0.5, 0.5, 0.5]}))
    other = VideoMAEEncoder.from_pretrained(tmp_path)
    assert other.image_mean == (0.5, 0.5, 0.5)
    assert other.fingerprint != encoder.fingerprint

    path.write_text(json.dumps({"size": 32, "image_mean": stored["image_mean"], "image_std": stored["image_std"]}))
    assert VideoMAEEncoder.from_pretrained(tmp_path).fingerprint == encoder.fingerprint  # the oldest form

    for change, message in (
        ({"do_center_crop": False}, "do_center_crop"),
        ({"resample": 3}, "resample"),
        ({"rescale_factor": 1.0}, "1/255"),
        ({"size": {"shortest_edge": 40}}, "square crop"),
        ({"size": {"height": 32, "width": 32}}, "square crop"),
        ({"size": {"shortest_edge": 40}, "crop_size": 40}, "built for 32 pixels"),
    ):
        path.write_text(json.dumps({**stored, **change}))
        with pytest.raises(ValueError, match=message):
            VideoMAEEncoder.from_pretrained(tmp_path)

    path.unlink()
    assert VideoMAEEncoder.from_pretrained(tmp_path).fingerprint == encoder.fingerprint


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (video(frames=5), "4 frames, got 5"),
        (video()[0], r"\(b t c h w\)"),
        (video()[:, :, :2], "c = 3"),
        (video().mul(127).to(torch.int8), "floating-point"),
        (video() * 255, "in \\[-1, 1\\]"),
        (video() * torch.nan, "finite"),
    ],
)
def test_bad_clips_are_refused(encoder, clip, message):
    with pytest.raises(ValueError, match=message):
        encoder(clip)


def test_the_folder_is_an_ordinary_transformers_folder(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    model = VideoMAEModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), encoder.parameters(), strict=True))
