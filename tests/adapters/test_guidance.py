"""Guidance of adapters: the formula on real denoisers, alone and for two adapters, and what it leaves behind."""

import pytest
import torch
import torch._dynamo

from motionrag.adapters import AdapterGuidance, AttentionInjection, FeatureModulation
from tests.adapters.denoisers import DENOISERS, cogvideox, svd, tokens, trained

FRAMES = 3


def draw_flow(seed=2):
    return 4 * torch.randn(2, FRAMES, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def modulation_of(unet) -> FeatureModulation:
    torch.manual_seed(3)
    adapter = FeatureModulation.for_model(unet)
    for name, weight in adapter.named_parameters():
        if name.startswith("sites") and ".temporal." in name:
            torch.nn.init.normal_(weight, std=0.1)
    return adapter.eval()


def injection_of(denoiser) -> AttentionInjection:
    return trained(denoiser.model, denoiser.sites)


@pytest.fixture
def guidance():
    made = AdapterGuidance()
    yield made
    made.detach()


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.5])
@pytest.mark.parametrize("family", DENOISERS)
def test_it_goes_on_from_without_the_adapter_through_with_it(guidance, family, scale):
    denoiser = DENOISERS[family]()
    model, adapter = denoiser.model, injection_of(denoiser)
    adapter.attach(model)
    plain = denoiser.run()
    with adapter.condition(tokens(), torch.tensor([0.7, 0.0])):
        with_it = denoiser.run()
        with guidance.guide([model], {adapter: scale}):
            guided = denoiser.run()
            [in_a_tuple] = model(**denoiser.arguments, return_dict=False)
        assert torch.equal(denoiser.run(), with_it)
    torch.testing.assert_close(guided, plain + scale * (with_it - plain), atol=1e-5, rtol=1e-5)
    assert torch.equal(guided[1], plain[1])  # nothing is injected there
    assert torch.equal(in_a_tuple, guided)
    assert torch.equal(denoiser.run(), plain)


@torch.no_grad()
@pytest.mark.parametrize("first", ["injection", "modulation"])
def test_two_adapters_are_guided_each_by_its_own_difference(guidance, first):
    denoiser = svd()
    unet = denoiser.model
    injection, modulation = injection_of(denoiser), modulation_of(unet)
    for adapter in (injection, modulation) if first == "injection" else (modulation, injection):
        adapter.attach(unet)
    with injection.condition(tokens()):
        only_motion = denoiser.run()
    with modulation.condition(draw_flow()):
        only_control = denoiser.run()
        with injection.condition(tokens()):
            both = denoiser.run()
            with guidance.guide([unet], {injection: 3.0, modulation: 1.5}):
                guided = denoiser.run()
            with guidance.guide([unet], {injection: 1.0, modulation: 1.5}):
                only_control_guided = denoiser.run()
    expected = both + 2 * (both - only_control) + 0.5 * (both - only_motion)
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(only_control_guided, both + 0.5 * (both - only_motion), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_model_runs_once_more_for_every_adapter_whose_scale_is_not_one(guidance):
    denoiser, runs = svd(), []
    injection, modulation = injection_of(denoiser), modulation_of(denoiser.model)
    injection.attach(denoiser.model)
    modulation.attach(denoiser.model)
    denoiser.model.conv_in.register_forward_hook(lambda *_: runs.append(1))
    counts = []
    with injection.condition(tokens()), modulation.condition(draw_flow()):
        for scales in ((1.0, 1.0), (2.0, 1.0), (2.0, 2.0)):
            runs.clear()
            with guidance.guide([denoiser.model], dict(zip((injection, modulation), scales, strict=True))):
                denoiser.run()
            counts.append(len(runs))
    assert counts == [1, 2, 3]


@torch.no_grad()
def test_an_error_in_the_second_run_leaves_the_conditions(guidance):
    denoiser, runs = svd(), []
    adapter = injection_of(denoiser)
    adapter.attach(denoiser.model)

    def fail_second(*_):
        runs.append(1)
        if len(runs) == 2:
            raise MemoryError

    with adapter.condition(tokens()):
        expected = denoiser.run()
        handle = denoiser.model.conv_in.register_forward_hook(fail_second)
        with pytest.raises(MemoryError), guidance.guide([denoiser.model], {adapter: 2.0}):
            denoiser.run()
        handle.remove()
        assert torch.equal(denoiser.run(), expected)


@torch.no_grad()
def test_it_moves_to_other_models_and_leaves_nothing(guidance):
    first, second = svd(), svd()
    adapter = injection_of(first)
    for denoiser in (first, second):
        adapter.attach(denoiser.model)
        with adapter.condition(tokens()), guidance.guide([denoiser.model], {adapter: 2.0}):
            denoiser.run()
        adapter.detach()
    assert not first.model._forward_hooks
    guidance.detach()
    assert not second.model._forward_hooks


@torch.no_grad()
@pytest.mark.parametrize("order", ["guide, compile", "compile, run, guide"])
@pytest.mark.parametrize("adapter", ["injection", "modulation"])
def test_a_compiled_model_is_guided_the_same(guidance, adapter, order):
    torch._dynamo.reset()
    denoiser = cogvideox() if adapter == "injection" else svd()
    model = denoiser.model
    made, condition = (
        (injection_of(denoiser), tokens()) if adapter == "injection" else (modulation_of(model), draw_flow())
    )
    made.attach(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    if order == "compile, run, guide":
        denoiser.run(compiled)
    with made.condition(condition):
        with guidance.guide([model], {made: 2.0}):
            expected = denoiser.run()
        with guidance.guide([compiled], {made: 2.0}):
            assert torch.equal(denoiser.run(compiled), expected)
        with_it = denoiser.run()
        assert torch.equal(denoiser.run(compiled), with_it)
    assert (expected - with_it).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(guidance, scale):
    denoiser = svd()
    adapter = injection_of(denoiser)
    with (
        pytest.raises(ValueError, match="guidance scale of AttentionInjection must be finite, got"),
        guidance.guide([denoiser.model], {adapter: scale}),
    ):
        pass
    assert not denoiser.model._forward_hooks
