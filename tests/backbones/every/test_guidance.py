"""Guidance of the injected motion under every family, against diffusers' pipeline with everything written by hand."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_first_block_cache

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
from tests.backbones.every.test_video import TOLERANCE
from tests.backbones.support import cells, words

SCALE = 2.5


def guided_by_hand(family, guidance_scale):
    """Each call goes on from what a second, plain model gives through what the first gives with motion."""
    pipe, plain = diffusers_pipeline(family), diffusers_pipeline(family)
    denoisers_of = backbone_of_pipeline(type(pipe)).denoisers

    def guide(second, _denoiser, args, kwargs, output):
        without = second(*args, **kwargs)[0]
        return (without + SCALE * (output[0] - without),)

    passes = FAMILIES[family].calls_a_step if guidance_scale > 1 else 0
    with injected_by_hand(pipe, bundle(pipe), tokens(), passes):
        for denoiser, second in zip(denoisers_of(pipe), denoisers_of(plain), strict=True):
            denoiser.register_forward_hook(lambda *given, second=second: guide(second, *given), with_kwargs=True)
        return run_plain(pipe, family, guidance_scale)


@cells("`motion_guidance_scale`")
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_the_video_is_that_of_guidance_by_hand(family, verdict, guidance_scale):
    pipe = motion_pipeline(family)
    options = {"guidance_scale": guidance_scale}
    unguided = run(pipe, family, **options)
    guided = run(pipe, family, motion_guidance_scale=SCALE, **options)
    torch.testing.assert_close(guided, guided_by_hand(family, guidance_scale), **TOLERANCE)
    assert not torch.equal(guided, unguided)
    assert torch.equal(run(pipe, family, motion_guidance_scale=1, **options), unguided)


@cells("`motion_guidance_scale` with a cache")
@pytest.mark.parametrize("how", ["method", "function"])
def test_caches_are_refused(family, verdict, how):
    pipe = motion_pipeline(family)
    if verdict.startswith("no"):
        assert not hasattr(pipe.denoisers[0], "enable_cache")
        return
    for denoiser in pipe.denoisers:
        if how == "method":
            denoiser.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        else:
            apply_first_block_cache(denoiser, FirstBlockCacheConfig(threshold=0.0))
    with pytest.raises(ValueError, match=words(verdict)):
        run(pipe, family, motion_guidance_scale=SCALE)
    if how == "method":
        run(pipe, family)
        for denoiser in pipe.denoisers:
            denoiser.disable_cache()
        run(pipe, family, motion_guidance_scale=SCALE)
