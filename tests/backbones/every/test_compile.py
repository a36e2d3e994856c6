"""Compiled and parallel denoisers of every family, and diffusers' features all at once, in any order."""

from functools import cache, partial
from itertools import permutations

import pytest
import torch

from motionrag import MotionRAGPipeline
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
from tests.backbones.every.test_memory import lora_file
from tests.backbones.support import cells, words

COMPILE = {"fullgraph": True, "backend": "eager"}
SLOW = ("SVD", "Wan 2.1", "Wan 5B")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@cache
def video(family):
    return run(motion_pipeline(family), family)


def compile_whole(pipe):
    """As users do it: the compiled model takes the place of the model in the pipeline."""
    for name in ("transformer", "transformer_2", "unet"):
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, torch.compile(getattr(pipe, name), **COMPILE))


@cells("`torch.compile`, fullgraph", slow=("Wan 2.2", *SLOW))
def test_a_compiled_denoiser(family, verdict):
    pipe = motion_pipeline(family)
    compile_whole(pipe.pipeline)
    torch.testing.assert_close(run(pipe, family), video(family), atol=1e-5, rtol=0)
    plain = run_plain(diffusers_pipeline(family), family)
    without = run(pipe, family, motion_scale=0.0)
    torch.testing.assert_close(without, plain, atol=1e-5, rtol=0)


@cells("`compile_repeated_blocks`", slow=SLOW)
def test_compiled_blocks(family, verdict):
    pipe = motion_pipeline(family)
    if verdict.startswith("no"):
        with pytest.raises(ValueError, match="`_repeated_blocks` attribute is empty"):
            pipe.denoisers[0].compile_repeated_blocks(**COMPILE)
        return
    for denoiser in pipe.denoisers:
        denoiser.compile_repeated_blocks(**COMPILE)
    torch.testing.assert_close(run(pipe, family), video(family), atol=1e-5, rtol=0)


@cells("`enable_parallelism`")
def test_parallelism(family, verdict, monkeypatch):
    """On one device diffusers cannot enable it; what it leaves on the model is put there instead."""
    from diffusers import ContextParallelConfig

    pipe = motion_pipeline(family)
    denoiser = pipe.denoisers[-1]
    if verdict.startswith("no"):
        assert denoiser._cp_plan is None
        return
    assert denoiser._cp_plan is not None
    assert denoiser._parallel_config is None
    monkeypatch.setattr(denoiser, "_parallel_config", ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(ValueError, match=rf"{words(verdict)} by enable_parallelism"):
        run(pipe, family)


# All at once


def actions(pipe, made, folder):
    """What a user may do with a pipeline, by the words of the documented order."""
    from diffusers import FirstBlockCacheConfig

    def save_memory():
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        cpu = torch.device("cpu")
        pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))

    return {
        "LoRA": partial(pipe.load_lora_weights, folder),
        "attach": partial(MotionRAGPipeline, pipe, made),
        "offload, cast or cache": save_memory,
        "compile": partial(pipe.transformer.compile_repeated_blocks, backend="eager"),
    }


def rounded_by_hand(folder):
    """The video with the LoRA's weights beside those that casting has rounded, and the injection by hand."""
    pipe = diffusers_pipeline("LTX")
    made = bundle(pipe)
    pipe.load_lora_weights(folder)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with injected_by_hand(pipe, made, tokens(), FAMILIES["LTX"].calls_a_step):
        return run_plain(pipe, "LTX")


@pytest.mark.slow
@pytest.mark.parametrize("order", list(permutations(["LoRA", "attach", "offload, cast or cache", "compile"])), ids=str)
def test_every_order_is_right_or_an_error(order, tmp_path):
    lora_file("LTX", tmp_path)
    expected = rounded_by_hand(tmp_path)
    pipe = diffusers_pipeline("LTX")
    steps = actions(pipe, bundle(pipe), tmp_path)
    made = {step: steps[step]() for step in order}["attach"]
    if order.index("LoRA") > order.index("offload, cast or cache"):  # PEFT gives its layers the base layer's float8
        with pytest.raises(NotImplementedError, match="Float8"):
            run(made, "LTX")
        return
    ours = run(made, "LTX")
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=0)


def test_the_documented_order_all_at_once(tmp_path):
    lora_file("LTX", tmp_path)
    expected = rounded_by_hand(tmp_path)
    pipe = diffusers_pipeline("LTX")
    steps = actions(pipe, bundle(pipe), tmp_path)
    made = {step: do() for step, do in steps.items()}["attach"]
    for _ in range(2):
        torch.testing.assert_close(run(made, "LTX"), expected, atol=5e-5, rtol=0)
    assert (expected - video("LTX")).abs().max() > 1e-2
