"""Diffusers' caches under every family: without a skip nothing changes, and a skip neither doubles nor loses motion.

What a cache must give is computed by hand: diffusers' pipeline with the injection by hand, and with blocks or
attentions whose results are kept and reused as the cache's paper says.
"""

from collections import defaultdict
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from motionrag.backbones import backbone_of_pipeline
from tests.backbones.every.families import (
    FAMILIES,
    bundle,
    diffusers_pipeline,
    image,
    injected_by_hand,
    motion_pipeline,
    run,
    run_plain,
    settings,
    tokens,
)
from tests.backbones.support import cells, words

STEPS = 4
ALWAYS, NEVER = (-1, 1001), (-2, -1)  # timesteps are 0 to 1000


@cache
def video(family, guidance_scale=3.0):
    return run(motion_pipeline(family), family, num_inference_steps=STEPS, guidance_scale=guidance_scale)


def timestep(pipe):
    """What a cache asks for the current timestep."""
    return lambda: pipe.current_timestep


def cached_pipeline(family, config):
    """A pipeline whose denoisers have the cache that `config(diffusers pipeline)` describes."""
    pipe = motion_pipeline(family)
    for denoiser in pipe.denoisers:
        denoiser.enable_cache(config(pipe.pipeline))
    return pipe


def cached_video(family, config, **options):
    """Video of a pipeline with the cache, the same in two calls."""
    pipe = cached_pipeline(family, config)
    made = run(pipe, family, num_inference_steps=STEPS, **options)
    assert torch.equal(run(pipe, family, num_inference_steps=STEPS, **options), made)
    return made


def is_without_cache(family, verdict):
    """True for a cell that says that diffusers has no caches here, after asserting it."""
    if not verdict.startswith("no"):
        return False
    assert not hasattr(motion_pipeline(family).denoisers[0], "enable_cache")
    return True


class ByHand:
    """A diffusers pipeline with the injection by hand, which keeps what parts of its denoisers gave.

    Attributes:
        step: Of a denoiser, how often it has run the present pass before.
        guidance_pass: Which of the passes the present call of a denoiser is.
    """

    def __init__(self, family, guidance_scale=3.0):
        self.family, self.guidance_scale = family, guidance_scale
        self.passes = FAMILIES[family].calls_a_step if guidance_scale > 1 else 0
        self.pipe = diffusers_pipeline(family)
        self.made = bundle(self.pipe)
        self.denoisers = backbone_of_pipeline(type(self.pipe)).denoisers(self.pipe)
        self.calls = defaultdict(int)
        for denoiser in self.denoisers:
            denoiser.register_forward_pre_hook(self.begin)

    def begin(self, denoiser, args):
        call = self.calls[id(denoiser)]
        self.calls[id(denoiser)] += 1
        self.step, self.guidance_pass = divmod(call, max(1, self.passes))

    def blocks(self, denoiser):
        return denoiser.blocks if hasattr(denoiser, "blocks") else denoiser.transformer_blocks

    def reuse_residual(self, *, first_block_runs):
        """After the first step, all blocks (or all but the first) add what they added in the first step."""
        for denoiser in self.denoisers:
            first, last = self.blocks(denoiser)
            kept = defaultdict(SimpleNamespace)
            self.watch(first, kept, first_block_runs)
            self.replay(last, kept)

    def watch(self, block, kept, runs):
        forward = block.forward

        def watched(hidden, *args, **kwargs):
            present = kept[self.guidance_pass]
            output = forward(hidden, *args, **kwargs)
            hidden_output = output[0] if isinstance(output, tuple) else output
            present.start = hidden_output if runs else hidden
            return output

        block.forward = self.by_name(watched)

    def replay(self, block, kept):
        forward = block.forward

        def replayed(hidden, *args, **kwargs):
            present = kept[self.guidance_pass]
            output = forward(hidden, *args, **kwargs)
            is_tuple = isinstance(output, tuple)
            if self.step == 0:
                present.residual = (output[0] if is_tuple else output) - present.start
                return output
            made = present.start + present.residual
            return (made, *output[1:]) if is_tuple else made

        block.forward = self.by_name(replayed)

    def by_name(self, forward):
        return lambda *args, **kwargs: (
            forward(*args, **kwargs) if args else forward(kwargs.pop("hidden_states"), **kwargs)
        )

    def reuse_attention(self, *, full_steps=(0,)):
        """In other steps than these, every attention gives what it gave last."""
        for denoiser in self.denoisers:
            for name, module in denoiser.named_modules():
                if name.rpartition(".")[2] in ("attn1", "attn2"):
                    self.keep_output(module, full_steps)

    def keep_output(self, attention, full_steps):
        forward, kept = attention.forward, {}

        def reused(*args, **kwargs):
            if self.step in full_steps:
                kept[self.guidance_pass] = forward(*args, **kwargs)
            return kept[self.guidance_pass]

        attention.forward = reused

    def video(self):
        with injected_by_hand(self.pipe, self.made, tokens(), self.passes):
            return run_plain(self.pipe, self.family, self.guidance_scale, num_inference_steps=STEPS)


def assert_skips_as(by_hand, cached, family, guidance_scale=3.0):
    """The cached video is the one by hand, and something was skipped."""
    expected = by_hand.video()
    torch.testing.assert_close(cached, expected, atol=2e-5, rtol=0)
    assert (expected - video(family, guidance_scale)).abs().max() > 2e-4


@cells("FirstBlockCache")
def test_first_block_cache(family, verdict):
    from diffusers import FirstBlockCacheConfig

    if is_without_cache(family, verdict):
        return
    never = cached_video(family, lambda pipe: FirstBlockCacheConfig(threshold=0.0))
    torch.testing.assert_close(never, video(family), atol=1e-5, rtol=0)
    by_hand = ByHand(family)
    by_hand.reuse_residual(first_block_runs=True)
    assert_skips_as(by_hand, cached_video(family, lambda pipe: FirstBlockCacheConfig(threshold=1e9)), family)


@cells("MagCache")
def test_mag_cache(family, verdict):
    from diffusers import MagCacheConfig

    if is_without_cache(family, verdict):
        return

    def config(**changes):
        return lambda pipe: MagCacheConfig(
            num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, max_skip_steps=STEPS, **changes
        )

    never = cached_video(family, config(retention_ratio=1.0))
    torch.testing.assert_close(never, video(family), atol=1e-5, rtol=0)
    by_hand = ByHand(family)
    by_hand.reuse_residual(first_block_runs=False)
    assert_skips_as(by_hand, cached_video(family, config(threshold=1e9)), family)


@cells("TaylorSeer")
def test_taylor_seer(family, verdict):
    """diffusers' own patterns name no layer of these models, so the attentions are named here."""
    from diffusers import TaylorSeerCacheConfig

    if is_without_cache(family, verdict):
        return

    def config(**changes):
        return lambda pipe: TaylorSeerCacheConfig(
            cache_identifiers=[r".*blocks\.\d+\.attn\d"], taylor_factors_dtype=torch.float32, max_order=0, **changes
        )

    never = cached_video(family, config(disable_cache_before_step=STEPS))
    torch.testing.assert_close(never, video(family), atol=1e-5, rtol=0)
    by_hand = ByHand(family)
    by_hand.reuse_attention(full_steps=(0, 2))  # a full step, then at the second after it, as diffusers counts
    reused = cached_video(family, config(disable_cache_before_step=1, cache_interval=STEPS))
    assert_skips_as(by_hand, reused, family)


def broadcast(within):
    from diffusers import PyramidAttentionBroadcastConfig

    return lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=STEPS,
        cross_attention_block_skip_range=STEPS,
        spatial_attention_timestep_skip_range=within,
        cross_attention_timestep_skip_range=within,
        current_timestep_callback=timestep(pipe),
    )


@cells("PyramidAttentionBroadcast, guidance on")
def test_pyramid_attention_broadcast(family, verdict):
    if is_without_cache(family, verdict):
        return
    if verdict.startswith("refused"):
        pipe = cached_pipeline(family, broadcast(ALWAYS))
        with pytest.raises(ValueError, match=words(verdict)):
            run(pipe, family)
        for denoiser in pipe.denoisers:
            denoiser.disable_cache()
        torch.testing.assert_close(run(pipe, family, num_inference_steps=STEPS), video(family), atol=1e-5, rtol=0)
        return
    torch.testing.assert_close(cached_video(family, broadcast(NEVER)), video(family), atol=1e-5, rtol=0)
    by_hand = ByHand(family)
    by_hand.reuse_attention()
    assert_skips_as(by_hand, cached_video(family, broadcast(ALWAYS)), family)


@cells("PyramidAttentionBroadcast, guidance off")
def test_pyramid_attention_broadcast_without_guidance(family, verdict):
    if is_without_cache(family, verdict):
        return
    by_hand = ByHand(family, guidance_scale=1.0)
    by_hand.reuse_attention()
    reused = cached_video(family, broadcast(ALWAYS), guidance_scale=1.0)
    assert_skips_as(by_hand, reused, family, guidance_scale=1.0)


@cells("FasterCache")
def test_faster_cache(family, verdict):
    from diffusers import FasterCacheConfig

    if is_without_cache(family, verdict):
        return
    pipe = cached_pipeline(family, lambda pipe: FasterCacheConfig(current_timestep_callback=timestep(pipe)))
    with pytest.raises(ValueError, match=rf"{words(verdict)} runs .*; call disable_cache"):
        run(pipe, family)
    for denoiser in pipe.denoisers:
        denoiser.disable_cache()
    torch.testing.assert_close(run(pipe, family, num_inference_steps=STEPS), video(family), atol=1e-5, rtol=0)


@cells("SeaCache (never skips in these pipelines)")
def test_sea_cache(family, verdict):
    """It skips only where a pipeline tells it the step and the noise level; these tell neither."""
    from diffusers import SeaCacheConfig

    if is_without_cache(family, verdict):
        return
    cached = cached_video(family, lambda pipe: SeaCacheConfig(threshold=1e9, residual_order=0))
    torch.testing.assert_close(cached, video(family), atol=1e-5, rtol=0)


@cells("TextKVCache (made for another model, does nothing here)")
def test_text_kv_cache(family, verdict):
    from diffusers import TextKVCacheConfig

    if is_without_cache(family, verdict):
        return
    cached = cached_video(family, lambda pipe: TextKVCacheConfig())
    torch.testing.assert_close(cached, video(family), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["CogVideoX", "LTX", "Wan 2.2"])
def test_a_call_that_failed_leaves_nothing_in_the_cache(family):
    """diffusers empties its caches at the end of a call, which this one does not reach."""
    from diffusers import FirstBlockCacheConfig

    pipe = cached_pipeline(family, lambda pipe: FirstBlockCacheConfig(threshold=1e9))
    expected = {scale: run(pipe, family, num_inference_steps=STEPS, motion_scale=scale) for scale in (1.0, 0.0)}

    def stop(pipeline, step, *_):
        raise ZeroDivisionError

    for scale in expected:
        with pytest.raises(ZeroDivisionError):
            run(pipe, family, tokens(seed=5), callback_on_step_end=stop)
        assert torch.equal(run(pipe, family, num_inference_steps=STEPS, motion_scale=scale), expected[scale])


@pytest.mark.parametrize("family", ["CogVideoX", "LTX", "Wan 2.1"])
def test_two_images_with_a_cache(family):
    """A row of the cache belongs to its own image; Wan, which makes them in turn, starts each with an empty one."""
    from diffusers import FirstBlockCacheConfig

    pipe = cached_pipeline(family, lambda pipe: FirstBlockCacheConfig(threshold=1e9))
    motion = tokens(2)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(2)]

    both = run(pipe, family, motion, generator=generators(), num_inference_steps=STEPS)
    for number in range(2):
        options = settings(family, generator=generators()[number], num_inference_steps=STEPS)
        one = motion[number : number + 1]
        alone = pipe(image(number, family), "a red ball", motion_tokens=one, guidance_scale=3.0, **options).frames
        torch.testing.assert_close(both[number : number + 1], alone, atol=1e-4, rtol=0)
