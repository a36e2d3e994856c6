"""Offloading, casting, quantised weights and LoRA under every family: in either order, call after call."""

import copy
from functools import cache, partial

import pytest
import torch

from motionrag import MotionRAGPipeline
from motionrag.backbones import backbone_of_pipeline
from tests.backbones.every.families import (
    FAMILIES,
    bundle,
    diffusers_pipeline,
    injected_by_hand,
    motion_pipeline,
    run,
    run_plain,
    tokens,
)
from tests.backbones.support import cells

CPU = torch.device("cpu")
ORDERS = pytest.mark.parametrize("order", ["before", "after"])


@cache
def video(family):
    return run(motion_pipeline(family), family)


def denoisers(pipe):
    return backbone_of_pipeline(type(pipe)).denoisers(pipe)


def by_hand(pipe, family):
    """The video of a diffusers pipeline with the injection by hand, on the bundle for the family's usual weights."""
    made = bundle(diffusers_pipeline(family))
    with injected_by_hand(pipe, made, tokens(), FAMILIES[family].calls_a_step):
        return run_plain(pipe, family)


def with_feature(enable, family, order):
    """A pipeline on which diffusers' feature was enabled before or after the injection was attached."""
    pipe = diffusers_pipeline(family)
    made = bundle(pipe)
    if order == "before":
        enable(pipe)
    made_pipe = MotionRAGPipeline(pipe, made)
    if order == "after":
        enable(pipe)
    return made_pipe


def twice(pipe, family):
    """The video of two calls, which must be the same: diffusers takes hooks away after a call and places them anew."""
    first = run(pipe, family)
    assert torch.equal(run(pipe, family), first)
    return first


# Offloading, all of it to the CPU: the hooks are those that move weights to an accelerator


@ORDERS
@cells("`enable_model_cpu_offload`")
def test_model_offload(family, verdict, order):
    pipe = with_feature(lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), family, order)
    assert hasattr(pipe.denoisers[0], "_hf_hook")
    assert torch.equal(twice(pipe, family), video(family))


@ORDERS
@cells("accelerate's `cpu_offload` (sequential)")
def test_offload_of_every_leaf_by_accelerate(family, verdict, order):
    """Between calls the weights are on no device at all."""
    from accelerate import cpu_offload

    def enable(pipe):
        for denoiser in denoisers(pipe):
            cpu_offload(denoiser, execution_device=CPU)

    pipe = with_feature(enable, family, order)
    assert {weight.device.type for weight in pipe.denoisers[0].parameters()} == {"meta"}
    assert torch.equal(twice(pipe, family), video(family))


@cells("group offload: blocks, leaves, disk")
@pytest.mark.parametrize(
    ("kind", "order"), [("block_level", "after"), ("leaf_level", "before"), ("leaf_level", "after"), ("disk", "after")]
)
def test_group_offload(family, verdict, kind, order, tmp_path):
    def enable(pipe):
        for number, denoiser in enumerate(denoisers(pipe)):
            options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
            if kind == "disk":  # a folder for each: diffusers names the files by the layer alone
                options["offload_to_disk_path"] = str(tmp_path / str(number))
            level = "leaf_level" if kind == "disk" else kind
            denoiser.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=level, **options)

    pipe = with_feature(enable, family, order)
    # Weights mapped from a file lie at other addresses, for which the CPU's kernels round otherwise, without us too.
    torch.testing.assert_close(twice(pipe, family), video(family), atol=1e-5 if kind == "disk" else 0, rtol=0)


# Weights of another kind


@ORDERS
@cells("`enable_layerwise_casting` to float8")
def test_layerwise_casting(family, verdict, order):
    def enable(pipe, compute=torch.float32):
        for denoiser in denoisers(pipe):
            denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)

    pipe = with_feature(enable, family, order)
    ours = twice(pipe, family)
    # The same rounding without diffusers' hooks.
    rounded = diffusers_pipeline(family)
    for model, cast in zip(denoisers(rounded), pipe.denoisers, strict=True):
        stored = {name: weight.float() for name, weight in cast.state_dict().items()}
        assert any(not torch.equal(weight, stored[name]) for name, weight in model.state_dict().items())
        model.load_state_dict(stored)
    torch.testing.assert_close(ours, by_hand(rounded, family), atol=5e-5, rtol=0)


def test_layerwise_casting_computes_in_bfloat16():
    """The adapter follows the compute type, not the one byte in which weights are stored."""
    pipe = motion_pipeline("LTX")
    exact = run(pipe, "LTX")
    for part in (pipe.pipeline.transformer, pipe.pipeline.text_encoder, pipe.pipeline.vae):
        part.to(torch.bfloat16)
    pipe.denoisers[0].enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    rough = run(pipe, "LTX")
    assert next(pipe.injection.parameters()).dtype == torch.bfloat16
    plain = run_plain(diffusers_pipeline("LTX"), "LTX")
    assert (rough.float() - exact).norm() < 0.2 * (exact - plain).norm()


@cells("torchao int8 weights")
def test_int8_weights(family, verdict):
    quantization = pytest.importorskip("torchao.quantization")
    pipe = motion_pipeline(family)
    reference = diffusers_pipeline(family)
    for model in (*pipe.denoisers, *denoisers(reference)):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    torch.testing.assert_close(twice(pipe, family), by_hand(reference, family), atol=5e-5, rtol=0)
    assert not torch.equal(run(pipe, family), video(family))


# LoRA


def lora_file(family, folder):
    """Write a LoRA for the layers that carry the hooks, and others, as diffusers writes it; merge it by hand.

    Returns:
        A diffusers pipeline with the merged weights.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    merged = diffusers_pipeline(family)
    denoiser = denoisers(merged)[0]
    trained = copy.deepcopy(denoiser)
    torch.manual_seed(7)
    trained.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_out.0", "to_q"], init_lora_weights=False))
    state = get_peft_model_state_dict(trained)
    type(merged).save_lora_weights(folder, transformer_lora_layers=state)
    for name, down in state.items():
        if name.endswith("lora_A.weight"):
            layer = denoiser.get_submodule(name.removesuffix(".lora_A.weight"))
            layer.weight.data += state[name.replace("lora_A", "lora_B")] @ down
    return merged


@cells("LoRA file before or after attaching")
def test_lora_file(family, verdict, tmp_path):
    if verdict.startswith("no"):
        assert not hasattr(diffusers_pipeline(family), "load_lora_weights")
        return
    expected = by_hand(lora_file(family, tmp_path), family)
    assert (expected - video(family)).abs().max() > 1e-2
    for order in ("before", "after"):
        pipe = with_feature(lambda pipe: pipe.load_lora_weights(tmp_path), family, order)
        torch.testing.assert_close(twice(pipe, family), expected, atol=5e-5, rtol=0)
    pipe.pipeline.unload_lora_weights()
    assert torch.equal(run(pipe, family), video(family))


@pytest.mark.parametrize("order", ["LoRA, attach, offload", "attach, LoRA, offload", "attach, offload, LoRA"])
def test_lora_with_group_offload(order, tmp_path):
    """When a LoRA comes, diffusers takes its offloading away and puts it back."""
    expected = by_hand(lora_file("LTX", tmp_path), "LTX")
    pipe = diffusers_pipeline("LTX")
    made, steps = bundle(pipe), order.split(", ")
    actions = {
        "LoRA": partial(pipe.load_lora_weights, tmp_path),
        "offload": partial(
            pipe.transformer.enable_group_offload, onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
        ),
    }
    for step in steps:
        if step == "attach":
            pipe_with_motion = MotionRAGPipeline(pipe, made)
        else:
            actions[step]()
    torch.testing.assert_close(twice(pipe_with_motion, "LTX"), expected, atol=5e-5, rtol=0)
