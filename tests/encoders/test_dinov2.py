"""The image encoder against transformers' own model and both of its image processors."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, BitImageProcessor, BitImageProcessorPil, Dinov2ForImageClassification

from motionrag.encoders import DINOv2Encoder
from motionrag.encoders.dinov2 import IMAGENET_STD
from motionrag.encoders.preprocessing import image_to_tensor
from tests.encoders.test_preprocessing import SIZES, photo
from tests.encoders.tiny import dinov2_config, edit_weights


@pytest.fixture
def encoder():
    return DINOv2Encoder.from_pretrained(dinov2_config())


def images(batch=2, height=40, width=56):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_equals_both_processors(size, tmp_path):
    from transformers import Dinov2Model

    encoder = DINOv2Encoder(Dinov2Model(dinov2_config()))  # the published sizes: 256, then 224
    encoder.save_pretrained(tmp_path)
    picture = photo(*size)
    ours = encoder.preprocess(image_to_tensor(picture)[None])
    assert ours.shape == (1, 3, 224, 224)
    for processor_class in (BitImageProcessor, BitImageProcessorPil):
        processor = processor_class.from_pretrained(tmp_path)
        theirs = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
        # Both round to 8 bits after resizing, Pillow after each of its two passes.
        in_levels = (ours - theirs).abs() * torch.tensor(IMAGENET_STD)[:, None, None] * 255
        assert in_levels.max() < 1.5
        assert in_levels.mean() < 0.4


def test_features_are_the_models_last_hidden_state_with_class_token(encoder):
    picture = images(height=28, width=28)
    expected = encoder.model(pixel_values=encoder.preprocess(picture)).last_hidden_state
    assert torch.equal(encoder(picture), expected)
    assert expected.shape == (2, 1 + 4, 32)


def test_published_size(tmp_path):
    config = dinov2_config(image_size=518, hidden_size=1024, num_attention_heads=16, num_hidden_layers=1)
    DINOv2Encoder.from_pretrained(config).model.save_pretrained(tmp_path)
    encoder = DINOv2Encoder.from_pretrained(tmp_path)
    assert (encoder.resize_size, encoder.crop_size) == (256, 224)
    assert encoder(images(1)).shape == (1, 257, 1024)


def test_images_do_not_see_each_other(encoder):
    torch.testing.assert_close(encoder(images(3))[1:2], encoder(images(3)[1:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_precision(encoder, dtype):
    expected, fingerprint = encoder(images()), encoder.fingerprint
    features = encoder.to(dtype=dtype)(images().to(torch.float16))
    assert features.dtype == dtype
    assert encoder.fingerprint == fingerprint
    torch.testing.assert_close(features.float(), expected, atol=0.06, rtol=0.06)


def test_it_stays_frozen(encoder):
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(images().requires_grad_()).requires_grad


def test_saving_and_loading(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    again = DINOv2Encoder.from_pretrained(tmp_path)
    assert torch.equal(again(images()), encoder(images()))
    assert again.fingerprint == encoder.fingerprint
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), BitImageProcessor)


def test_a_classifier_gives_its_encoder(tmp_path):
    Dinov2ForImageClassification(dinov2_config()).save_pretrained(tmp_path)
    assert DINOv2Encoder.from_pretrained(tmp_path)(images()).shape == (2, 257, 32)


def test_faulty_folders_are_refused(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    stored = json.loads(path.read_text())
    for change, message in (
        ({"do_resize": False}, "do_resize"),
        ({"resample": 2}, "resample"),
        ({"size": {"height": 32, "width": 32}}, "shorter side"),
        ({"crop_size": {"height": 28, "width": 14}}, "square"),
        ({"crop_size": {"height": 30, "width": 30}}, "multiple of the patch size"),
    ):
        path.write_text(json.dumps({**stored, **change}))
        with pytest.raises(ValueError, match=message):
            DINOv2Encoder.from_pretrained(tmp_path)
    path.write_text(json.dumps(stored))
    victim = next(name for name in load_file(tmp_path / "model.safetensors") if "norm1.weight" in name)
    edit_weights(tmp_path / "model.safetensors", lambda weights: weights.pop(victim))
    with pytest.raises(ValueError, match=rf"missing: .*{victim.split('.', 1)[1]}"):
        DINOv2Encoder.from_pretrained(tmp_path)


def test_bad_images_are_refused(encoder):
    for bad, message in ((images()[0], "b c h w"), (images() * 9, "in \\[-1, 1\\]"), (images().byte(), "floating")):
        with pytest.raises(ValueError, match=message):
            encoder(bad)
