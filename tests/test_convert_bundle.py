"""Published files become a bundle: what is in it gives the published numbers, and nothing unclear passes."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors import safe_open
from transformers import VideoMAEModel

from motionrag.bundle import MotionBundle
from motionrag.conversion import convert_files
from motionrag.encoders import VideoMAEEncoder
from tests.encoders.tiny import videomae_config
from tests.parity.golden import assert_golden, load_case, published_keys
from tests.test_cli import run, run_json

BASE_MODELS = {"cogvideox": "THUDM/CogVideoX-5b-I2V", "svd": "stabilityai/stable-video-diffusion-img2vid"}
WEIGHTS_PAGE = Path(__file__).parent.parent / "docs" / "weights.md"
MILLION = 1_000_000


@pytest.fixture
def save(tmp_path):
    """Write a checkpoint; the wrapping is that of the published file of this name."""

    def write(name, state):
        content = state if name == "motion_proj.ckpt" else {"state_dict": state, "epoch": 1}
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def convert(files, folder, **changes):
    options = {"backbone": "cogvideox", "base_model": BASE_MODELS["cogvideox"], "head_dim": 8}
    return convert_files(files, folder, **{**options, **changes})


def cama_state(*without):
    return {key: value for key, value in load_case("cama_ref3").state.items() if not key.startswith(without)}


def under(state, prefix):
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def adapter_state(width=32, prefix="transformer.", token_dim=32):
    return {
        f"{prefix}transformer_blocks.0.attn1.processor.{name}_ip.0.weight": torch.randn(width, columns)
        for name, columns in (("to_q", width), ("to_k", token_dim), ("to_v", token_dim))
    }


@pytest.fixture
def published(save):
    """The three files of one small model, as the authors name and wrap them."""
    state = cama_state("sos_token", "vision_proj.")
    return [
        save("motion_proj.ckpt", under(load_case("cama_ref3").state, "vision_proj.")),
        save("motion_transformer.ckpt", state),
        save("Motion-Adapter.ckpt", adapter_state()),
    ]


# What comes out


def test_a_converted_bundle_gives_the_published_numbers(published, tmp_path, save):
    """Resamplers, CAMA and its heads: the recorded numbers come from the published code."""
    case = load_case("cama_ref3")
    token = save("sos.ckpt", {"sos_token": case.state["sos_token"]})
    convert(published, tmp_path / "bundle", sos_token=token)
    bundle = MotionBundle.from_pretrained(tmp_path / "bundle")
    with torch.no_grad():
        motion = bundle.motion_resampler(case.inputs["motion_features"].flatten(0, 1)).unflatten(0, (-1, 4))
        context = bundle.context_resampler(case.inputs["context_features"].flatten(0, 1)).unflatten(0, (-1, 4))
        assert_golden(motion, case.outputs["motion_tokens"])
        assert_golden(bundle.cama(motion[:, :-1], context), case.outputs["predicted_tokens"])


@pytest.mark.parametrize("name", ["resampler_base", "resampler_rect", "resampler_video", "resampler_cls"])
def test_sizes_of_a_resampler_come_from_its_shapes(name, tmp_path, save):
    case = load_case(name)
    convert([save("motion_proj.ckpt", case.state)], tmp_path / "bundle")
    resampler = MotionBundle.from_pretrained(tmp_path / "bundle").motion_resampler
    with torch.no_grad():
        tokens = resampler(case.inputs["x"])
    if name in ("resampler_base", "resampler_rect"):  # the variants give part of their queries, or sort them
        assert_golden(tokens, case.outputs["tokens"])
    assert len(resampler.layers) == case.config["args"]["depth"]


def test_heads_come_from_the_base_model_where_its_config_is_here(tmp_path, save):
    """Two heads of 16 do not follow from a width of 32; a wrong number of heads changes every output."""
    case = load_case("cogvideox_rope")
    transformer = CogVideoXTransformer3DModel(**case.config["args"])
    transformer.save_config(tmp_path / "base" / "transformer")
    own = {k.removeprefix("transformer."): v for k, v in case.state.items() if ".processor." not in k}
    transformer.load_state_dict(own, strict=True)
    file = save("Motion-Adapter.ckpt", case.state)  # with the whole backbone in it
    report = convert([file], tmp_path / "bundle", base_model=str(tmp_path / "base"))
    injection = MotionBundle.from_pretrained(tmp_path / "bundle").motion_injection
    injection.attach(transformer.eval())
    with torch.no_grad(), injection.condition(case.inputs["motion_tokens"]):
        output = transformer(
            case.inputs["hidden_states"],
            case.inputs["encoder_hidden_states"],
            case.inputs["timestep"],
            image_rotary_emb=(case.inputs["rope_cos"], case.inputs["rope_sin"]),
        ).sample
    assert_golden(output, case.outputs["scale_1"])
    assert report.notes == [f"Heads of the injection: from the config of {tmp_path / 'base'}"]
    [left_out] = report.left_out
    assert left_out.reason == "weights of the frozen backbone"
    assert len(left_out.keys) == len(own)


def test_precision_stays_as_it_is_in_the_file(tmp_path, save):
    state = {key: value.bfloat16() for key, value in load_case("resampler_base").state.items()}
    report = convert([save("motion_proj.ckpt", state)], tmp_path / "bundle")
    assert [part.dtype for part in report.parts] == ["bfloat16"]
    with safe_open(tmp_path / "bundle" / "motion_resampler.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("queries"), state["latents"][0])
        assert file.get_tensor("queries").dtype == torch.bfloat16


def test_the_report_counts_every_tensor_once(published, tmp_path):
    report = run_json(
        *("convert", *published, "--out", tmp_path / "bundle", "--backbone", "cogvideox", "--head-dim", 8),
        *("--base-model", "THUDM/CogVideoX-5b-I2V", "--sos-token", "zeros", "--licence", "MIT"),
    )
    parts = {part.pop("part"): part for part in report["parts"]}
    state = load_case("cama_ref3").state
    for name, prefix, file in (
        ("motion_resampler", "vision_proj.", 0),
        ("context_resampler", "condition_proj.", 1),
        ("cama", ("transformer.", "sos_token"), 1),
    ):
        own = [value for key, value in state.items() if key.startswith(prefix)]
        counts = {"tensors": len(own), "parameters": sum(map(torch.numel, own))}
        assert parts[name] == {"file": str(published[file]), "dtype": "float32", **counts}
    assert parts["motion_injection"]["parameters"] == 3 * 32 * 32
    assert report["left_out"] == []
    assert f"sos_token: zeros, since {published[1]} holds none" in report["notes"]
    info = run_json("info", tmp_path / "bundle")
    assert info["licences"]["bundle"] == "MIT"
    assert info["licences"]["THUDM/CogVideoX-5b-I2V"] == "CogVideoX License"
    assert info["licences"]["MCG-NJU/videomae-base-finetuned-ssv2"] == "CC-BY-NC-4.0"
    assert not MotionBundle.from_pretrained(tmp_path / "bundle").cama.sos_token.any()


def test_any_subset_of_parts_makes_a_bundle(published, tmp_path):
    convert(published[2:], tmp_path / "bundle")
    bundle = MotionBundle.from_pretrained(tmp_path / "bundle")
    assert list(bundle.config.parts) == ["motion_injection"]
    assert bundle.motion_injection.config()["sites"] == {"transformer_blocks.0.attn1.to_out.0": [32, 4]}


def test_one_file_of_everything(tmp_path, save):
    """As the third training stage saves it: `condition_transformer.` in front, encoders and backbone included."""
    state = {f"condition_transformer.{key}": value for key, value in load_case("cama_ref3").state.items()}
    state |= {**adapter_state(), "transformer.patch_embed.proj.weight": torch.ones(1)}
    state |= {
        "condition_transformer.vision_model.x": torch.ones(1),
        "condition_transformer.condition_model.y": torch.ones(1),
    }
    report = convert([save("all.ckpt", state)], tmp_path / "bundle")
    bundle = MotionBundle.from_pretrained(tmp_path / "bundle")
    assert list(bundle.config.parts) == ["motion_resampler", "context_resampler", "cama", "motion_injection"]
    assert torch.equal(bundle.cama.sos_token, state["condition_transformer.sos_token"].reshape(5, 32))
    assert sum(len(each.keys) for each in report.left_out) == 3
    assert sum(part.tensors for part in report.parts) + 3 == len(state)


def test_an_adapters_own_resampler_counts_only_where_no_file_holds_one(tmp_path, save):
    """The published pipelines never read it."""
    vision = under(load_case("cama_ref3").state, "vision_proj.")
    own = {f"action_proj_model.{key}": value + 1 for key, value in vision.items()}
    stage1 = save("Motion-Adapter.ckpt", {**adapter_state(), **own})
    report = convert([stage1, save("motion_proj.ckpt", vision)], tmp_path / "both")
    queries = MotionBundle.from_pretrained(tmp_path / "both").motion_resampler.queries
    assert torch.equal(queries, vision["latents"][0])
    assert [(each.file, sorted(each.keys)) for each in report.left_out] == [(str(stage1), sorted(own))]
    convert([stage1], tmp_path / "one")
    queries = MotionBundle.from_pretrained(tmp_path / "one").motion_resampler.queries
    assert torch.equal(queries, vision["latents"][0] + 1)


# Unconditional tokens


@pytest.fixture
def video_encoder(tmp_path):
    """A tiny VideoMAE, as a folder, as wide as the resampler reads."""
    width = load_case("cama_ref3").state["vision_proj.proj_in.weight"].shape[1]
    config = videomae_config(hidden_size=width, num_attention_heads=1)
    VideoMAEEncoder(VideoMAEModel(config), size=32).save_pretrained(tmp_path / "videomae")
    return tmp_path / "videomae"


def grey_tokens(bundle, video_encoder):
    """By hand: a grey picture is 0 in [-1, 1], 0.5 in [0, 1], then ImageNet's statistics."""
    model = VideoMAEModel.from_pretrained(video_encoder).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((0.5 - mean) / std).view(1, 1, 3, 1, 1).expand(1, 4, 3, 32, 32)
    with torch.no_grad():
        return bundle.motion_resampler(model(pixels).last_hidden_state)[0]


def encoders(video_encoder):
    from motionrag.bundle import ENCODERS, EncoderSource

    return {**ENCODERS, "video": EncoderSource(str(video_encoder), "MIT")}


def test_unconditional_tokens_are_made_where_the_video_encoder_is_here(published, tmp_path, video_encoder):
    report = convert(published[:1], tmp_path / "bundle", encoders=encoders(video_encoder))
    bundle = MotionBundle.from_pretrained(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "unconditional_tokens.safetensors").is_file()
    torch.testing.assert_close(bundle.unconditional_tokens, grey_tokens(bundle, video_encoder), atol=1e-5, rtol=0)
    assert any("guidance: made with" in note for note in report.notes)


def test_else_they_are_made_when_first_used(published, tmp_path, video_encoder):
    away = video_encoder.rename(tmp_path / "away")
    report = convert(published[:1], tmp_path / "bundle", encoders=encoders(video_encoder))
    assert any(note.startswith("Unconditional tokens, for guidance: left for their first use") for note in report.notes)
    assert not (tmp_path / "bundle" / "unconditional_tokens.safetensors").exists()
    bundle = MotionBundle.from_pretrained(tmp_path / "bundle")
    with pytest.raises(ValueError, match=r"lacks unconditional_tokens\.safetensors.*hf download .*videomae"):
        _ = bundle.unconditional_tokens
    away.rename(video_encoder)
    torch.testing.assert_close(bundle.unconditional_tokens, grey_tokens(bundle, video_encoder), atol=1e-5, rtol=0)
    bundle.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "unconditional_tokens.safetensors").is_file()


# What is refused


def refused(files, tmp_path, message, error=ValueError, **options):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        convert(files, tmp_path / "bundle", **options)
    assert sorted(tmp_path.iterdir()) == before, "something half-written stayed"


def test_a_missing_sos_token_must_be_chosen(published, tmp_path):
    refused(published, tmp_path, r"motion_transformer\.ckpt: it holds no 'sos_token'.*--sos-token zeros or --sos-token")
    done = run("convert", *published, "--out", tmp_path / "b", "--backbone", "cogvideox", "--base-model", "a/b")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "--sos-token zeros" in done.stderr


def test_a_file_for_the_sos_token_holds_nothing_else(published, tmp_path, save):
    other = save("other.ckpt", {"x": torch.ones(1), "sos_token": torch.ones(1)})
    refused(published, tmp_path, r"other\.ckpt must hold one tensor 'sos_token', got: x, sos_token", sos_token=other)
    wrong = save("wrong.ckpt", {"sos_token": torch.ones(4, 32)})
    refused(published, tmp_path, r"parts do not fit together.*CAMA 4×32", sos_token=wrong)


def test_keys_that_are_unknown_or_missing_are_named_with_their_file(tmp_path, save):
    state = load_case("resampler_base").state
    more = save("more.ckpt", {**state, "optimizer.step": torch.ones(1)})
    refused([more], tmp_path, r"more\.ckpt: unknown keys: optimizer\.step\.")
    less = {key: value for key, value in state.items() if key != "layers.1.0.to_kv.weight"}
    refused([save("less.ckpt", less)], tmp_path, r"missing: \['layers\.1\.attention\.to_kv\.weight'\]")
    less = {key: value for key, value in state.items() if key != "proj_in.weight"}
    refused([save("less.ckpt", less)], tmp_path, r"motion resampler is incomplete: missing keys: proj_in\.weight")
    no_queries = {key: value for key, value in adapter_state().items() if "to_q" not in key}
    refused([save("a.ckpt", no_queries)], tmp_path, r"a\.ckpt: .*missing keys: transformer_blocks\.0\.attn1.*: to_q")


def test_the_file_of_another_backbone_is_refused(tmp_path, save):
    refused([save("a.ckpt", adapter_state(prefix="unet."))], tmp_path, r"a\.ckpt: .*unknown keys: unet\.transformer_bl")
    refused([save("b.ckpt", adapter_state())], tmp_path, r"b\.ckpt: .*unknown keys: transf", backbone="svd")
    refused([save("c.ckpt", adapter_state())], tmp_path, "Unknown backbone 'sora'", backbone="sora")


def test_a_file_of_frozen_weights_alone_is_refused(tmp_path, save):
    """As the backbone that the authors fine-tuned to 17 frames."""
    file = save("17_frames.ckpt", {"transformer.transformer_blocks.0.ff.net.2.weight": torch.ones(1)})
    refused([file], tmp_path, r"17_frames\.ckpt: the file holds no part of a bundle.*stay frozen; leave it out")


def test_one_part_in_two_files_is_refused(published, tmp_path, save):
    again = save("again.ckpt", cama_state())
    refused([published[0], again], tmp_path, r"motion_proj\.ckpt and .*again\.ckpt both hold the motion resampler")


def test_parts_of_different_models_are_refused(published, tmp_path, save):
    other = save("other.ckpt", adapter_state(token_dim=48))
    refused([published[0], other], tmp_path, r"do not fit together; tokens: motion resampler 5×32, motion inj.* …×48")


def test_heads_that_do_not_divide_the_width_are_refused(published, tmp_path):
    refused(
        published[:1],
        tmp_path,
        "resampler's attention has 24 channels, which heads of 5 do not.*--head-dim",
        head_dim=5,
    )


def test_an_injection_that_does_not_fit_the_base_model_is_refused(tmp_path, save):
    args = load_case("cogvideox_rope").config["args"]
    CogVideoXTransformer3DModel(**args).save_config(tmp_path / "base" / "transformer")
    base = str(tmp_path / "base")
    wide = save("wide.ckpt", adapter_state(width=48))
    refused(
        [wide], tmp_path, r"does not fit .*at transformer_blocks\.0.* has 48 channels, the model 32", base_model=base
    )
    state = {key.replace("blocks.0", "blocks.7"): value for key, value in adapter_state().items()}
    refused([save("deep.ckpt", state)], tmp_path, r"no layer at 'transformer_blocks\.7\.attn1", base_model=base)
    config = json.loads((tmp_path / "base" / "transformer" / "config.json").read_text())
    config["_class_name"] = "WanTransformer3DModel"
    (tmp_path / "base" / "transformer" / "config.json").write_text(json.dumps(config))
    refused([wide], tmp_path, r"holds a WanTransformer3DModel, not the CogVideoXTransformer3DModel", base_model=base)


def test_nan_is_refused(tmp_path, save):
    state = dict(load_case("resampler_base").state)
    state["proj_in.bias"] = torch.full_like(state["proj_in.bias"], float("nan"))
    refused([save("a.ckpt", state)], tmp_path, "converted motion resampler holds NaN or infinity in proj_in.bias")


def test_what_does_not_exist_and_what_does(published, tmp_path):
    refused([tmp_path / "none.ckpt"], tmp_path, r"no checkpoint .*none\.ckpt", FileNotFoundError)
    refused(
        published[:1],
        tmp_path,
        "'nowhere', which is no folder in it and no hub id",
        FileNotFoundError,
        base_model="nowhere",
    )
    refused([], tmp_path, "no file to convert")
    (tmp_path / "bundle").mkdir()
    refused(published[:1], tmp_path, "bundle exists; a converted bundle would replace", FileExistsError)


def test_an_error_while_writing_leaves_nothing(published, tmp_path, monkeypatch):
    from safetensors import torch as safetensors_torch

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors_torch, "save_file", full)
    refused(published[:1], tmp_path, "No space left", OSError)


# Real size

EXPECTED = {
    "cogvideox": {"motion_injection": 660_602_880, "sites": 42, "first": [3072, 48], "heads": {48}},
    "svd": {"motion_injection": 37_949_440, "sites": 16, "first": [320, 5], "heads": {5, 10, 20}},
}


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["cogvideox", "svd"])
def test_real_sizes(backbone, tmp_path):
    """Files of exactly the published keys and shapes, in bfloat16, in a process of its own: memory is measured.

    Every tensor is one number, stretched: the files stay small, and what conversion writes has its full size.
    """
    files = []
    for name in ("motion_proj", "motion_transformer", "Motion-Adapter"):
        one = torch.ones((), dtype=torch.bfloat16)
        state = {key: one.expand(shape) for key, shape in published_keys(f"{name}.{backbone}").items()}
        torch.save({"state_dict": state}, tmp_path / f"{name}.ckpt")
        files.append(tmp_path / f"{name}.ckpt")
        assert files[-1].stat().st_size < MILLION
    command = ["convert", *(file.name for file in files), "--backbone", backbone, "--base-model", BASE_MODELS[backbone]]
    command += ["--sos-token", "zeros", "--licence", "MIT", "--out", "bundle"]
    start = [sys.executable, "-c", "from motionrag.cli import main; main()"]
    done = subprocess.run([*start, *command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if backbone == "cogvideox":
        assert f"$ motionrag {' '.join(command)}\n{done.stdout}```" in WEIGHTS_PAGE.read_text()
    parameters = dict(re.findall(r"^(\w+): \d+ tensors, (\d+) parameters", done.stdout, re.MULTILINE))
    parameters = {name: int(count) for name, count in parameters.items()}
    counted = {
        name: sum(torch.Size(shape).numel() for shape in published_keys(f"{name}.{backbone}").values())
        for name in ("motion_proj", "motion_transformer", "Motion-Adapter")
    }
    expected = EXPECTED[backbone]
    assert parameters["motion_injection"] == counted["Motion-Adapter"] == expected["motion_injection"]
    assert parameters["motion_resampler"] == counted["motion_proj"]
    assert parameters["cama"] + parameters["context_resampler"] == counted["motion_transformer"] + 25 * 1024
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())["parts"]
    resampler = {"dim": 1024, "output_dim": 1024, "num_queries": 25, "depth": 4, "num_heads": 12, "head_dim": 64}
    assert config["motion_resampler"] == {"input_dim": 768, **resampler}
    assert config["context_resampler"] == {"input_dim": 1024, **resampler}
    assert config["cama"] == {"dim": 1024, "depth": 4, "num_heads": 16, "ff_dim": 4096, "num_tokens": 25}
    sites = config["motion_injection"]["sites"]
    assert len(sites) == expected["sites"]
    assert expected["first"] in sites.values()
    assert {heads for _, heads in sites.values()} == expected["heads"]
    assert (tmp_path / "bundle" / "motion_injection.safetensors").stat().st_size > 2 * expected["motion_injection"]
    assert re.search(r"`motion_injection` \| [\d ]+ \| bfloat16", (tmp_path / "bundle" / "README.md").read_text())
    # Kilobytes, the largest child so far. Stretched tensors are written out in memory; real ones stay in their file.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3 * MILLION
