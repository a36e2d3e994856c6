"""Published checkpoints: every wrapping is opened, no code runs, nothing unknown or missing passes."""

import logging
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from motionrag import convert
from motionrag.backbones import BACKBONES
from motionrag.models import CAMA, Resampler

RESAMPLER = {"input_dim": 6, "dim": 8, "output_dim": 10, "num_queries": 3, "depth": 2, "num_heads": 2, "head_dim": 4}
CAMA_SIZES = {"dim": 10, "depth": 2, "num_heads": 2, "ff_dim": 16, "num_tokens": 3}


def published_resampler(prefix=""):
    """A state dict as the published class names it, with the tensors of a fresh one of ours."""
    torch.manual_seed(0)
    ours = Resampler(**RESAMPLER).state_dict()
    names = {
        "attention.norm_features": "0.norm1",
        "attention.norm_queries": "0.norm2",
        "attention": "0",
        "feed_forward.norm": "1.0",
        "feed_forward.up": "1.1",
        "feed_forward.down": "1.3",
    }
    state = {}
    for key, value in ours.items():
        if key == "queries":
            key, value = "latents", value[None]
        for name, published in names.items():
            key = key.replace(f".{name}.", f".{published}.")
        state[prefix + key] = value
    return state


def published_cama(sos_token=True):
    torch.manual_seed(1)
    state = dict(CAMA(**CAMA_SIZES).state_dict())
    if not sos_token:
        del state["sos_token"]
    return {**state, **published_resampler("condition_proj.")}


def published_adapter(prefix, layer="transformer_blocks.0.attn1"):
    return {
        f"{prefix}{layer}.processor.{name}_ip.0.weight": torch.full((4, 4), index)
        for index, name in enumerate(("to_q", "to_k", "to_v"), 1)
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Files


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.5"},
        lambda state: {"module": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {"module": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["flat", "state_dict", "module.module", "module", "flat module", "state_dict module"],
)
def test_every_wrapping_is_opened(tmp_path, wrap, suffix):
    state = published_resampler()
    torch.save(wrap(state), tmp_path / f"file{suffix}")
    assert same(convert.load_published(tmp_path / f"file{suffix}"), state)


def test_safetensors(tmp_path):
    state = published_resampler()
    save_file(state, tmp_path / "file.safetensors")
    assert same(convert.load_published(str(tmp_path / "file.safetensors")), state)


def test_bfloat16_stays_as_it_is(tmp_path):
    torch.save({"state_dict": {"latents": torch.ones(1, 2, 3, dtype=torch.bfloat16)}}, tmp_path / "a.ckpt")
    assert convert.load_published(tmp_path / "a.ckpt")["latents"].dtype == torch.bfloat16


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, legacy):
    file, trace = tmp_path / "evil.ckpt", tmp_path / "trace"
    if legacy:
        file.write_bytes(pickle.dumps({"state_dict": Bomb(str(trace))}))
    else:
        torch.save({"state_dict": {"latents": torch.ones(1)}, "extra": Bomb(str(trace))}, file)
    with pytest.raises(ValueError, match=r"evil\.ckpt cannot be read as tensors alone"):
        convert.load_published(file)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04N."])
def test_a_damaged_file_is_named(tmp_path, suffix, content):
    file = tmp_path / f"broken{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="broken"):
        convert.load_published(file)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    file = tmp_path / f"broken{suffix}"
    (torch.save if suffix == ".ckpt" else save_file)(published_resampler(), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="broken"):
        convert.load_published(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        convert.load_published(tmp_path / "nothing.ckpt")


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, torch.ones(2), {3: torch.ones(1)}, {"state_dict": 5}])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="holds no state dict"):
        convert.load_published(tmp_path / "a.ckpt")


# Resampler


@pytest.mark.parametrize("prefix", ["", "action_proj_model.", "vision_proj.", "condition_transformer.vision_proj."])
def test_resampler_with_and_without_prefix(prefix, caplog):
    state = published_resampler(prefix)
    torch.manual_seed(0)
    expected = Resampler(**RESAMPLER).state_dict()
    assert same(convert.resampler(state), expected)
    Resampler(**RESAMPLER).load_state_dict(convert.resampler(state), strict=True)


def test_a_stage_one_file_gives_its_resampler_and_its_adapter(caplog):
    caplog.set_level(logging.INFO)
    state = {**published_resampler("action_proj_model."), **published_adapter("transformer.")}
    assert same(convert.resampler(state), convert.resampler(published_resampler()))
    assert "left out 3 keys" in caplog.text
    caplog.clear()
    assert len(convert.injection(state, "cogvideox")) == 3
    assert f"left out {len(published_resampler())} keys" in caplog.text


@pytest.mark.parametrize("first", ["condition_transformer.condition_proj.", "condition_proj.", "action_proj_model."])
def test_several_resamplers_in_one_file_are_never_chosen_among(first):
    state = {**published_resampler(first), **published_resampler("condition_transformer.vision_proj.")}
    with pytest.raises(ValueError, match=rf"several resamplers.*{first}"):
        convert.resampler(state)


def test_a_resampler_with_unknown_or_missing_keys_names_them():
    state = published_resampler()
    state["layers.0.2.weight"] = torch.ones(1)
    del state["latents"]
    with pytest.raises(ValueError, match=r"missing keys: latents; unknown keys: layers\.0\.2\.weight\."):
        convert.resampler(state)
    with pytest.raises(ValueError, match="missing keys: latents"):
        convert.resampler({})


def test_a_resampler_that_lacks_a_weight_does_not_load():
    state = published_resampler()
    del state["layers.1.0.to_kv.weight"]
    with pytest.raises(RuntimeError, match=r"layers\.1\.attention\.to_kv\.weight"):
        Resampler(**RESAMPLER).load_state_dict(convert.resampler(state), strict=True)


# CAMA


@pytest.mark.parametrize("prefix", ["", "condition_transformer."])
def test_cama_with_both_resamplers(prefix):
    state = {**published_cama(), **published_resampler("vision_proj.")}
    converted = convert.cama({prefix + key: value for key, value in state.items()})
    assert converted.keys() == {"cama", "context_resampler", "motion_resampler"}
    CAMA(**CAMA_SIZES).load_state_dict(converted["cama"], strict=True)
    Resampler(**RESAMPLER).load_state_dict(converted["context_resampler"], strict=True)
    Resampler(**RESAMPLER).load_state_dict(converted["motion_resampler"], strict=True)


def test_the_published_file_has_no_sos_token_and_one_must_be_chosen():
    state = published_cama(sos_token=False)
    with pytest.raises(ValueError, match=r"no 'sos_token'.*torch\.zeros"):
        convert.cama(state)
    chosen = torch.randn(3, 10)
    for given in (chosen, chosen[None]):
        converted = convert.cama(state, sos_token=given)
        assert torch.equal(converted["cama"]["sos_token"], chosen)
        assert converted.keys() == {"cama", "context_resampler"}


def test_the_sos_token_of_the_file_comes_first():
    state = published_cama()
    converted = convert.cama(state, sos_token=torch.zeros(3, 10))
    assert torch.equal(converted["cama"]["sos_token"], state["sos_token"])


def test_frozen_encoders_in_the_file_are_left_out(caplog):
    caplog.set_level(logging.INFO)
    state = {**published_cama(), "vision_model.encoder.weight": torch.ones(1), "condition_model.x": torch.ones(1)}
    assert "cama" in convert.cama(state)
    assert "left out 2 keys" in caplog.text


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"missing keys: condition_proj\.\*, transformer\.\*"),
        (published_adapter("transformer."), r"missing keys: condition_proj\.\*"),
        (published_adapter("unet."), r"unknown keys: unet\."),
        ({**published_cama(), "optimizer.step": torch.ones(1)}, r"unknown keys: optimizer\.step"),
        (published_resampler("condition_proj."), r"missing keys: transformer\.\*"),
    ],
    ids=["nothing", "cogvideox adapter", "svd adapter", "one more", "context only"],
)
def test_what_is_no_condition_transformer_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        convert.cama(state)


# Injection


@pytest.mark.parametrize(
    ("backbone", "prefix", "layer"),
    [
        ("cogvideox", "transformer.", "transformer_blocks.17.attn1"),
        ("svd", "unet.", "mid_block.attentions.0.transformer_blocks.0.attn2"),
    ],
)
def test_injection_with_and_without_prefix(backbone, prefix, layer):
    slashed = layer.replace(".", "/")
    expected = {f"sites.{slashed}/to_out/0.{name}.weight" for name in ("to_q", "to_k", "to_v")}
    for start in ("", prefix):
        converted = convert.injection(published_adapter(start, layer), backbone)
        assert converted.keys() == expected
        assert [converted[f"sites.{slashed}/to_out/0.to_{name}.weight"][0, 0].item() for name in "qkv"] == [1, 2, 3]


def test_a_full_module_leaves_out_its_backbone(caplog):
    caplog.set_level(logging.INFO)
    state = {
        **published_adapter("transformer."),
        "transformer.transformer_blocks.0.attn1.to_q.weight": torch.ones(1),
        "condition_transformer.sos_token": torch.ones(1),
    }
    assert len(convert.injection(state, "cogvideox")) == 3
    assert "left out 2 keys" in caplog.text


@pytest.mark.parametrize(
    ("prefix", "backbone"), [("unet.", "cogvideox"), ("transformer.", "svd")], ids=["svd file", "cogvideox file"]
)
def test_the_file_of_another_backbone_is_refused(prefix, backbone):
    with pytest.raises(ValueError, match=rf"unknown keys: {prefix}transformer_blocks"):
        convert.injection(published_adapter(prefix), backbone)


def test_a_site_that_lacks_a_projection_is_named():
    state = published_adapter("transformer.")
    del state["transformer.transformer_blocks.0.attn1.processor.to_v_ip.0.weight"]
    with pytest.raises(ValueError, match=r"missing keys: transformer_blocks\.0\.attn1\.to_out\.0: to_v"):
        convert.injection(state, "cogvideox")


@pytest.mark.parametrize(
    "extra", ["transformer.transformer_blocks.0.attn1.processor.to_q_ip.1.weight", "lora.weight", "vae.x"]
)
def test_an_unknown_key_is_named(extra):
    with pytest.raises(ValueError, match=f"unknown keys: {extra}"):
        convert.injection({**published_adapter("transformer."), extra: torch.ones(1)}, "cogvideox")


def test_a_file_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match=r"missing keys: processor\.to_q_ip"):
        convert.injection({}, "cogvideox")
    with pytest.raises(ValueError, match=r"missing keys: processor\.to_q_ip"):
        convert.injection(published_resampler("action_proj_model."), "svd")


def test_an_unknown_backbone_is_named():
    with pytest.raises(ValueError, match="Unknown backbone 'sora'; known are cogvideox, svd"):
        convert.injection(published_adapter(""), "sora")


def test_a_backbone_that_nothing_was_published_for_is_named(monkeypatch):
    monkeypatch.setitem(BACKBONES, "other", replace(BACKBONES["cogvideox"], name="other", published_prefix=None))
    with pytest.raises(ValueError, match=r"No MotionRAG weights were published for other, .*there are some for cogvid"):
        convert.injection(published_adapter("transformer."), "other")
    # Its missing prefix must not be taken for one that every key has.
    assert len(convert.injection(published_adapter("transformer."), "cogvideox")) == 3


def test_tensors_of_a_file_are_mapped_and_not_read(tmp_path):
    """Changing the file changes the tensors: they are the file."""
    torch.save({"latents": torch.full((1, 2, 3), 7.0)}, tmp_path / "a.ckpt")
    latents = convert.load_published(tmp_path / "a.ckpt")["latents"]
    content = bytearray((tmp_path / "a.ckpt").read_bytes())
    start = content.index(torch.full((6,), 7.0).numpy().tobytes())
    with open(tmp_path / "a.ckpt", "r+b") as file:
        file.seek(start)
        file.write(torch.full((6,), 9.0).numpy().tobytes())
    assert torch.equal(latents, torch.full((1, 2, 3), 9.0))
