"""Every family's video against diffusers' own pipeline with the injection written out by hand."""

import threading
from contextlib import nullcontext
from functools import cache

import pytest
import torch

from motionrag import MotionRAGPipeline
from motionrag.backbones import backbone_of_pipeline
from motionrag.generation import SteeredPipeline
from tests.backbones.every.families import (
    FAMILIES,
    NUM_TOKENS,
    TOKEN_DIM,
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

TOLERANCE = {"atol": 5e-5, "rtol": 0}


@cache
def shared(family):
    """One pipeline for the tests that leave it as it was."""
    return motion_pipeline(family)


@cache
def plain_video(family, guidance_scale=3.0):
    return run_plain(diffusers_pipeline(family), family, guidance_scale)


def by_hand(family, guidance_scale=3.0, every=1, motion=None, **options):
    """Video of diffusers' pipeline with the injection by hand, and which rows its calls saw."""
    pipe = diffusers_pipeline(family)
    passes = FAMILIES[family].calls_a_step if guidance_scale > 1 else 0
    with injected_by_hand(pipe, bundle(pipe, every=every), tokens() if motion is None else motion, passes) as seen:
        return run_plain(pipe, family, guidance_scale, **options), seen


@cells("guidance on and off")
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_the_video_is_that_of_the_injection_by_hand(family, verdict, guidance_scale):
    expected, seen = by_hand(family, guidance_scale)
    per_step = (
        (["cond", "uncond"] if FAMILIES[family].calls_a_step == 2 else ["both"]) if guidance_scale > 1 else ["cond"]
    )
    assert seen == per_step * 2
    pipe = shared(family)
    torch.testing.assert_close(run(pipe, family, guidance_scale=guidance_scale), expected, **TOLERANCE)
    assert (expected - plain_video(family, guidance_scale)).abs().max() > 0.05
    # Written out, too, not only folded and shortened.
    pipe.injection.takes_shortcuts = False
    written_out = run(pipe, family, guidance_scale=guidance_scale)
    pipe.injection.takes_shortcuts = True
    torch.testing.assert_close(written_out, expected, **TOLERANCE)


@pytest.mark.parametrize("missing", ["transformer", "transformer_2"])
def test_wan_with_one_of_its_two_transformers(missing):
    pipe = diffusers_pipeline("Wan 2.2")
    setattr(pipe, missing, None)
    pipe.register_to_config(boundary_ratio=1.0 if missing == "transformer" else None)
    made = bundle(pipe)
    with injected_by_hand(pipe, made, tokens(), 2):
        expected = run_plain(pipe, "Wan 2.2")
    torch.testing.assert_close(run(MotionRAGPipeline(pipe, made), "Wan 2.2"), expected, **TOLERANCE)


def test_both_transformers_of_wan_take_part():
    """At two steps each has one; without the injection in either of them, the video is another."""
    pipe = shared("Wan 2.2")
    video = run(pipe, "Wan 2.2")
    calls = {"transformer": 0, "transformer_2": 0}
    handles = []
    for name in calls:
        site = getattr(pipe.pipeline, name).blocks[0].attn2.to_out[0]
        handles.append(site.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1})))
    run(pipe, "Wan 2.2")
    for handle in handles:
        handle.remove()
    assert calls == {"transformer": 2, "transformer_2": 2}
    for name in calls:
        pipe.injection.detach()
        pipe.injection.attach(getattr(pipe.pipeline, name))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                SteeredPipeline, "denoisers", property(lambda self, name=name: [getattr(self.pipeline, name)])
            )
            assert (run(pipe, "Wan 2.2") - video).abs().max() > 1e-3
    pipe.injection.reattach(*pipe.denoisers)
    assert torch.equal(run(pipe, "Wan 2.2"), video)


@cells("scale 0, detaching and errors leave no trace")
def test_no_trace(family, verdict):
    pipe = motion_pipeline(family)
    untouched = backbone_of_pipeline(type(pipe.pipeline)).denoisers(diffusers_pipeline(family))
    plain, video = plain_video(family), run(pipe, family)

    def keys(models):
        return [list(model.state_dict()) for model in models]

    assert keys(pipe.denoisers) == keys(untouched)
    assert torch.equal(run(pipe, family, motion_scale=0.0), plain)
    assert torch.equal(run_plain(pipe.pipeline, family), plain)

    class Stop(Exception):
        pass

    def stop(pipeline, step, *_):
        raise Stop

    with pytest.raises(Stop):
        run(pipe, family, callback_on_step_end=stop)
    assert torch.equal(run_plain(pipe.pipeline, family), plain)
    assert torch.equal(run(pipe, family), video)
    pipe.injection.detach()
    assert torch.equal(run_plain(pipe.pipeline, family), plain)
    for model, other in zip(pipe.denoisers, untouched, strict=True):
        assert model.__dict__.keys() - {"_diffusers_hook"} == other.__dict__.keys()  # diffusers' own, of every call
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@cells("several images in a call")
def test_two_images_with_their_own_tokens(family, verdict):
    pipe, motion = shared(family), tokens(2)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(2)]

    both = run(pipe, family, motion, generator=generators())
    for number in range(2):
        options = settings(family, generator=generators()[number])
        one = motion[number : number + 1]
        alone = pipe(image(number, family), "a red ball", motion_tokens=one, guidance_scale=3.0, **options).frames
        torch.testing.assert_close(both[number : number + 1], alone, atol=1e-4, rtol=0)
    assert (both[0] - both[1]).abs().max() > 0.05


@cells("`num_videos_per_prompt`")
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_several_videos_of_an_image(family, verdict, guidance_scale):
    options = {"num_videos_per_prompt": 2}
    plain = diffusers_pipeline(family)
    if verdict.startswith("no"):
        with pytest.raises(RuntimeError) if family == "Wan 2.1" else nullcontext():
            assert len(run_plain(plain, family, guidance_scale, **options)) == 1
        return
    expected, _ = by_hand(family, guidance_scale, **options)
    video = run(shared(family), family, guidance_scale=guidance_scale, **options)
    assert len(video) == 2
    torch.testing.assert_close(video, expected, **TOLERANCE)


@cells("a subset of sites")
def test_every_second_site(family, verdict):
    expected, _ = by_hand(family, every=2)
    pipe = motion_pipeline(family, every=2)
    assert len(pipe.injection.sites) * 2 == len(shared(family).injection.sites)
    torch.testing.assert_close(run(pipe, family), expected, **TOLERANCE)
    assert (expected - run(shared(family), family)).abs().max() > 1e-3


@cells("several bundles and pipelines at once")
def test_two_bundles_on_one_backbone(family, verdict):
    """They come and go in any order, and none sees the other's motion."""
    first = motion_pipeline(family)
    video = run(first, family)
    second = MotionRAGPipeline(first.pipeline, bundle(first.pipeline, seed=9))
    other = run(second, family)
    assert (other - video).abs().max() > 1e-2
    assert torch.equal(run(first, family), video)
    first.injection.detach()
    assert torch.equal(run(second, family), other)
    second.injection.detach()
    assert torch.equal(run_plain(first.pipeline, family), plain_video(family))


def test_two_pipelines_in_two_threads():
    families = ("CogVideoX", "Wan 2.2")
    pipes = {family: motion_pipeline(family) for family in families}
    alone = {family: run(pipes[family], family) for family in families}
    together = {}
    meet = threading.Barrier(2, timeout=30)

    def callback(pipeline, step, *_):
        meet.wait()  # every step of the one runs beside a step of the other
        return {}

    def work(family):
        together[family] = run(pipes[family], family, callback_on_step_end=callback)

    threads = [threading.Thread(target=work, args=(family,)) for family in families]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for family in families:
        assert torch.equal(together[family], alone[family])


@cells("a second thread in the same pipeline")
def test_a_second_thread_is_refused_and_the_first_unharmed(family, verdict):
    pipe = shared(family)
    alone = run(pipe, family)
    errors = []

    def intrude(scale):
        try:
            run(pipe, family, motion_scale=scale)
        except RuntimeError as error:
            errors.append(str(error))

    def callback(pipeline, step, *_):
        for scale in (1.0, 0.0):
            thread = threading.Thread(target=intrude, args=(scale,))
            thread.start()
            thread.join()
        return {}

    assert torch.equal(run(pipe, family, callback_on_step_end=callback), alone)
    assert len(errors) == 4
    assert all(words(verdict) in error for error in errors)
    assert torch.equal(run(pipe, family), alone)


# Precision


@cells("bfloat16 model")
def test_a_bfloat16_model(family, verdict):
    exact = run(shared(family), family)
    pipe = motion_pipeline(family)
    for part in pipe.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16)
    rough = run(pipe, family)
    assert next(pipe.injection.parameters()).dtype == torch.bfloat16
    assert is_close_for_its_effect(rough, exact, family)


@cells("autocast to bfloat16 and float16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(family, verdict, dtype):
    exact = run(shared(family), family)
    with torch.autocast("cpu", dtype):
        rough = run(shared(family), family)
    assert is_close_for_its_effect(rough, exact, family)


def is_close_for_its_effect(rough, exact, family):
    """True if rounding changes the video by much less than the motion does."""
    return (rough.float() - exact).norm() < 0.2 * (exact - plain_video(family)).norm()


def test_tokens_of_another_shape_are_refused():
    pipe = shared("LTX")
    with pytest.raises(ValueError, match=rf"must be finite and \(1, {NUM_TOKENS}, {TOKEN_DIM}\)"):
        run(pipe, "LTX", tokens()[:, :2])
