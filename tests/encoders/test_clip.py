"""The joint encoder against open_clip's own model and image transform."""

import json

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from motionrag.encoders import CLIPEncoder
from motionrag.encoders.preprocessing import image_to_tensor
from tests.encoders.test_preprocessing import SIZES, photo
from tests.encoders.tiny import clip_config, edit_weights

TEXTS = ["a red ball blicks", "a blue box", "", "word " * 50]


@pytest.fixture
def encoder():
    return CLIPEncoder.from_pretrained(clip_config())


def images(batch=2, height=40, width=56):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interpolation": "bilinear"},
        {"resize_mode": "squash"},
        {"resize_mode": "longest", "fill_color": 127},
        {"size": (24, 48)},
        {"size": (24, 48), "resize_mode": "longest"},
        {"size": (24, 48), "resize_mode": "squash"},
        {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    ],
)
def test_preprocessing_equals_open_clips(size, changes, encoder):
    settings = {"size": 32, **changes}
    encoder.model.visual.preprocess_cfg.update(settings)
    encoder = CLIPEncoder(encoder.model, tokenizer=encoder.tokenizer, model_config=encoder.model_config)
    transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    picture = photo(*size)
    ours = encoder.preprocess(image_to_tensor(picture)[None])[0]
    theirs = transform(Image.fromarray(picture))
    assert ours.shape == theirs.shape
    in_levels = (ours - theirs).abs() * torch.tensor(encoder.preprocessing["std"])[:, None, None] * 255
    assert in_levels.max() < 1.5  # theirs is rounded to 8 bits after each of Pillow's two passes
    assert in_levels.mean() < 0.4


def test_embeddings_equal_open_clips(encoder):
    embedded = encoder.encode_image(images(height=32, width=32))
    expected = encoder.model.encode_image(encoder.preprocess(images(height=32, width=32)), normalize=True)
    torch.testing.assert_close(embedded, expected)
    tokens = open_clip.SimpleTokenizer(context_length=12)(TEXTS)
    torch.testing.assert_close(encoder.encode_text(TEXTS), encoder.model.encode_text(tokens, normalize=True))
    assert embedded.shape == (2, encoder.embedding_dim) == (2, 16)
    torch.testing.assert_close(encoder.encode_text(TEXTS).norm(dim=-1), torch.ones(4))


def test_batches_do_not_mix(encoder):
    torch.testing.assert_close(encoder.encode_image(images(3))[1:2], encoder.encode_image(images(3)[1:2]))
    alone = torch.cat([encoder.encode_text([text]) for text in TEXTS])
    torch.testing.assert_close(alone, encoder.encode_text(TEXTS), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_precision_gives_float32_unit_vectors(encoder, dtype):
    before = encoder.encode_image(images()), encoder.encode_text(TEXTS)
    fingerprint = encoder.fingerprint
    encoder.to(dtype=dtype)
    assert encoder.dtype == dtype
    for embedded, expected in zip(
        (encoder.encode_image(images().half()), encoder.encode_text(TEXTS)), before, strict=True
    ):
        assert embedded.dtype == torch.float32
        torch.testing.assert_close(embedded, expected, atol=0.03, rtol=0)
        torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(len(embedded)))
    assert encoder.fingerprint == fingerprint


def test_it_stays_frozen(encoder):
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.encode_image(images().requires_grad_()).requires_grad


def test_saving_and_loading_here_and_in_open_clip(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    again = CLIPEncoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode_image(images()), encoder.encode_image(images()))
    assert torch.equal(again.encode_text(TEXTS), encoder.encode_text(TEXTS))
    assert again.fingerprint == encoder.fingerprint
    theirs = open_clip.create_model(f"local-dir:{tmp_path}", require_pretrained=True)
    assert all(torch.equal(value, encoder.model.state_dict()[name]) for name, value in theirs.state_dict().items())


def test_preprocessing_of_the_folder_is_used_and_counts(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    path = tmp_path / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"].update(resize_mode="squash", mean=[0.5, 0.5, 0.5])
    path.write_text(json.dumps(config))
    other = CLIPEncoder.from_pretrained(tmp_path)
    assert other.preprocessing["resize_mode"] == "squash"
    assert other.fingerprint != encoder.fingerprint


def test_a_published_architecture_loads_from_a_weights_file(tmp_path):
    """`pretrained` takes a file as well as a tag; only the tag needs the network."""
    from safetensors.torch import save_file

    save_file(open_clip.create_model("RN50", precision="fp32").state_dict(), tmp_path / "weights.safetensors")
    encoder = CLIPEncoder.from_pretrained("RN50", str(tmp_path / "weights.safetensors"), dtype=torch.bfloat16)
    assert encoder.encode_text(["a"]).shape == (1, 1024)


def test_faulty_sources_are_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match="needs its weights"):
        CLIPEncoder.from_pretrained("ViT-B-32")
    with pytest.raises(ValueError, match="knows no model"):
        CLIPEncoder.from_pretrained("ViT-B-33", "openai")
    with pytest.raises(ValueError, match="not a known tag"):
        CLIPEncoder.from_pretrained("ViT-B-32", "no_such_tag")

    encoder.save_pretrained(tmp_path)
    weights = tmp_path / "open_clip_model.safetensors"
    edit_weights(weights, lambda tensors: tensors.pop("visual.ln_post.bias"))
    with pytest.raises(ValueError, match=r"visual\.ln_post\.bias"):
        CLIPEncoder.from_pretrained(tmp_path)
    edit_weights(weights, lambda tensors: tensors.update({"visual.ln_post.bias": torch.full((32,), torch.inf)}))
    with pytest.raises(ValueError, match=r"visual\.ln_post\.bias holds NaN or infinite"):
        CLIPEncoder.from_pretrained(tmp_path)

    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        CLIPEncoder.from_pretrained(tmp_path)

    weights.rename(tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="is missing"):
        CLIPEncoder.from_pretrained(tmp_path)


def test_bad_input_is_refused(encoder):
    with pytest.raises(ValueError, match="b c h w"):
        encoder.encode_image(images()[0])
    with pytest.raises(ValueError, match="list of strings"):
        encoder.encode_text("a red ball")
    assert encoder.encode_text([]).shape == (0, 16)
