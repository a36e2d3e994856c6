"""Feature modulation on a real diffusers UNet: what it leaves alone, what it refuses, batches, training, compiling."""

import json
from functools import partial

import pytest
import torch
import torch._dynamo
from diffusers import UNetSpatioTemporalConditionModel
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from motionrag.adapters import AttentionInjection, FeatureModulation
from tests.adapters.denoisers import Denoiser, svd

FRAMES = 3
SITES = {
    "down_blocks.0.resnets.0.spatial_res_block.conv1": [32, 0],
    "down_blocks.1.resnets.0.spatial_res_block.conv1": [64, 1],
    "up_blocks.0.resnets.0.spatial_res_block.conv1": [64, 1],
    "up_blocks.1.resnets.0.spatial_res_block.conv1": [32, 0],
}


@pytest.fixture(scope="module")
def denoiser():
    return svd()


@pytest.fixture(autouse=True)
def left_as_found(request):
    """A UNet that tests share has no hooks and no gradients afterwards."""
    yield
    if "denoiser" in request.fixturenames:
        model = request.getfixturevalue("denoiser").model
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
        model.requires_grad_(True).eval()
        model.disable_gradient_checkpointing()


@pytest.fixture
def modulation(denoiser):
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    yield adapter
    adapter.detach()


def trained(unet, **options) -> FeatureModulation:
    """An adapter whose last convolutions are no longer zero."""
    adapter = FeatureModulation.for_model(unet, **options)
    torch.manual_seed(1)
    for layer in adapter.sites.values():
        for convolution in (layer.gamma, layer.beta):
            torch.nn.init.normal_(convolution.temporal.weight, std=0.1)
            torch.nn.init.normal_(convolution.temporal.bias, std=0.1)
    return adapter.eval()


def draw_flow(videos=2, frames=FRAMES, height=64, width=64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    flow = 4 * torch.randn(videos, frames, 3, height, width, generator=generator)
    flow[:, :, 2] = (flow[:, :, 2] > 0).float()
    return flow


# Attaching


@torch.no_grad()
def test_nothing_changes_until_a_condition_is_set_and_after_it(denoiser):
    plain, keys = denoiser.run(), list(denoiser.model.state_dict())
    adapter = trained(denoiser.model)
    assert torch.equal(denoiser.run(), plain)
    adapter.attach(denoiser.model)
    assert adapter.is_attached
    assert torch.equal(denoiser.run(), plain)
    with adapter.condition(draw_flow()):
        assert (denoiser.run() - plain).abs().max() > 1e-2
    assert torch.equal(denoiser.run(), plain)
    assert list(denoiser.model.state_dict()) == keys
    adapter.detach()
    assert not adapter.is_attached
    assert torch.equal(denoiser.run(), plain)


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(denoiser):
    adapter = FeatureModulation.for_model(denoiser.model)
    plain = denoiser.run()
    adapter.attach(denoiser.model)
    with adapter.condition(draw_flow()):
        assert torch.equal(denoiser.run(), plain)
    adapter.detach()


@torch.no_grad()
def test_the_condition_is_removed_also_on_an_error(denoiser, modulation):
    plain = denoiser.run()
    with pytest.raises(KeyboardInterrupt), modulation.condition(draw_flow()):
        raise KeyboardInterrupt
    assert torch.equal(denoiser.run(), plain)


def test_sites_and_levels(denoiser):
    assert FeatureModulation.for_model(denoiser.model).config() == {
        "sites": SITES,
        "channels": 32,
        "level_multipliers": [1, 2],
    }


@torch.no_grad()
def test_config_and_state_dict_build_it_again(denoiser):
    plain = svd().run()
    adapter = trained(denoiser.model)
    again = FeatureModulation(**json.loads(json.dumps(adapter.config())))
    again.load_state_dict(adapter.state_dict(), strict=True)
    outputs = []
    for each in (adapter, again):
        each.attach(denoiser.model)
        with each.condition(draw_flow()):
            outputs.append(denoiser.run())
        each.detach()
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], plain)


def test_flow_scale_makes_the_features_narrower():
    unet = svd_with((64, 128))
    adapter = FeatureModulation.for_model(unet, flow_scale=2)
    assert adapter.encoder.channels == 32
    assert [layer.gamma.spatial.in_channels for layer in adapter.sites.values()] == [32, 64, 64, 32]
    # γ and β pass through a quarter of the layer's width, whatever the features have.
    assert [layer.gamma.spatial.out_channels for layer in adapter.sites.values()] == [16, 32, 32, 16]


def svd_with(widths):
    torch.manual_seed(0)
    return UNetSpatioTemporalConditionModel(
        down_block_types=("DownBlockSpatioTemporal",) * len(widths),
        up_block_types=("UpBlockSpatioTemporal",) * len(widths),
        block_out_channels=widths,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        cross_attention_dim=16,
        layers_per_block=1,
        num_attention_heads=2,
    )


# What it computes


@torch.no_grad()
def test_what_a_layer_puts_out(denoiser, modulation):
    """h + scale · (GroupNorm32(h) · γ + β), γ and β of the right level, video and frame; written out by hand."""
    site, (_, level) = list(SITES.items())[1]
    seen = []
    layer = denoiser.model.get_submodule(site)
    handles = [layer.register_forward_hook(lambda _l, _a, out: seen.append(out), prepend=True)]
    handles.append(layer.register_forward_hook(lambda _l, _a, out: seen.append(out)))
    flow, scale = draw_flow(), torch.tensor([0.5, 2.0])
    with modulation.condition(flow, scale):
        denoiser.run()
    for handle in handles:
        handle.remove()
    before, after = seen
    own = modulation.sites[site.replace(".", "/")]
    for video in range(2):
        feature = modulation.encoder(flow[video : video + 1])[level]
        gamma, beta = own.gamma(feature)[0], own.beta(feature)[0]
        for frame in range(FRAMES):
            hidden = before[video * FRAMES + frame]
            groups = hidden.reshape(32, -1)
            normed = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            expected = hidden + scale[video] * (normed.reshape(hidden.shape) * gamma[frame] + beta[frame])
            torch.testing.assert_close(after[video * FRAMES + frame], expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_scale(denoiser, modulation):
    plain, flow = denoiser.run(), draw_flow()
    outputs = {}
    for scale in (0, 0.0, 0.5, 1.0):
        with modulation.condition(flow, scale):
            outputs[scale] = denoiser.run()
    assert torch.equal(outputs[0.0], plain)
    assert 0.1 < (outputs[0.5] - plain).norm() / (outputs[1.0] - plain).norm() < 0.9
    with modulation.condition(flow, torch.tensor([0.0, 0.5])):
        mixed = denoiser.run()
    assert torch.equal(mixed[0], plain[0])
    torch.testing.assert_close(mixed[1], outputs[0.5][1], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_with_guidance_both_halves_take_the_same_flow(denoiser, modulation):
    flow = draw_flow()
    doubled = {
        name: torch.cat([value, value.flip(0)]) if value.ndim else value for name, value in denoiser.arguments.items()
    }
    both = denoiser.run  # a batch of two videos, alone
    with modulation.condition(flow):
        expected_first = both()
        second = {name: value[2:] if value.ndim else value for name, value in doubled.items()}
        expected_second = both(**second)
        actual = both(**doubled)
    torch.testing.assert_close(actual, torch.cat([expected_first, expected_second]), atol=1e-5, rtol=1e-5)
    with modulation.condition(flow.flip(0)):
        assert (both() - expected_first).abs().max() > 1e-2


@torch.no_grad()
def test_zero_flow_is_not_off(denoiser, modulation):
    plain = denoiser.run()
    with modulation.condition(torch.zeros_like(draw_flow())):
        assert (denoiser.run() - plain).abs().max() > 1e-3


@torch.no_grad()
def test_encoding_happens_once_for_a_condition(denoiser, modulation):
    calls = []
    modulation.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    for layer in modulation.sites.values():
        for convolution in (layer.gamma, layer.beta):
            convolution.register_forward_hook(lambda *_: calls.append("layer"))
    with modulation.condition(draw_flow()):
        for _ in range(3):
            denoiser.run()
    assert sorted(calls) == ["encoder"] + ["layer"] * 8
    with modulation.condition(draw_flow(), scale=0):
        denoiser.run()
    assert len(calls) == 9


@torch.no_grad()
@pytest.mark.parametrize("first", ["modulation", "injection"])
def test_together_with_motion_injection_in_either_order(denoiser, first):
    unet = denoiser.model
    plain = denoiser.run()
    modulation, injection = trained(unet), AttentionInjection.for_model(unet, token_dim=12)
    for weight in injection.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    for adapter in (modulation, injection) if first == "modulation" else (injection, modulation):
        adapter.attach(unet)
    tokens, flow = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)), draw_flow()
    with injection.condition(tokens):
        injected = denoiser.run()
        with modulation.condition(flow):
            both = denoiser.run()
    with modulation.condition(flow):
        modulated = denoiser.run()
    outputs = [plain, injected, modulated, both]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])
    injection.detach()
    with modulation.condition(flow):
        assert torch.equal(denoiser.run(), modulated)
    modulation.detach()
    assert torch.equal(denoiser.run(), plain)


@torch.no_grad()
def test_the_order_of_attaching_makes_no_difference(denoiser):
    unet, outputs = denoiser.model, []
    modulation, injection = trained(unet), AttentionInjection.for_model(unet, token_dim=12)
    for weight in injection.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    tokens = torch.randn(2, 5, 12)
    for order in ((modulation, injection), (injection, modulation)):
        for adapter in order:
            adapter.attach(unet)
        with modulation.condition(draw_flow()), injection.condition(tokens):
            outputs.append(denoiser.run())
        for adapter in order:
            adapter.detach()
    assert torch.equal(*outputs)


# What it refuses


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (torch.zeros(2, FRAMES, 2, 64, 64), r"must be \(b, f, 3, h, w\).*got \(2, 3, 2, 64, 64\)"),
        (torch.zeros(FRAMES, 3, 64, 64), r"must be \(b, f, 3, h, w\)"),
        (torch.zeros(0, FRAMES, 3, 64, 64), r"must be \(b, f, 3, h, w\)"),
        (torch.zeros(2, FRAMES, 3, 64, 72), r"multiples of 16, got 64×72"),
        (torch.full((2, FRAMES, 3, 64, 64), float("nan")), "NaN or infinity"),
        (torch.full((2, FRAMES, 3, 64, 64), float("inf")), "NaN or infinity"),
    ],
)
def test_a_bad_flow_is_refused(modulation, flow, message):
    with pytest.raises(ValueError, match=message):
        modulation.set_condition(flow)


@torch.no_grad()
@pytest.mark.parametrize(
    ("flow", "message"),
    [
        # Six frames of one video would fill the same rows as three frames of two.
        (draw_flow(videos=1, frames=2 * FRAMES), "runs on 3 frames, but the flow has 6"),
        (draw_flow(frames=1), "runs on 3 frames, but the flow has 1"),
        (draw_flow(videos=3), "batch of 2, but there is flow for 3 videos"),
        (draw_flow(height=32), "flow is 32×64, but the UNet makes 64×64"),
        (draw_flow(width=128), "flow is 64×128, but the UNet makes 64×64"),
    ],
)
def test_a_flow_that_does_not_fit_the_call_is_refused(denoiser, modulation, flow, message):
    plain = denoiser.run()
    with pytest.raises(ValueError, match=message), modulation.condition(flow):
        denoiser.run()
    assert torch.equal(denoiser.run(), plain)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(3), r"must be \(2,\), got \(3,\)"),
        (torch.ones(()), r"must be \(2,\), got \(\)"),
        (float("nan"), "finite, got nan"),
        (torch.tensor([1.0, float("inf")]), "finite"),
    ],
)
def test_a_bad_scale_is_refused(modulation, scale, message):
    with pytest.raises(ValueError, match=message):
        modulation.set_condition(draw_flow(), scale)


def test_misuse_is_refused(denoiser, modulation):
    unet = denoiser.model
    with pytest.raises(RuntimeError, match="already attached to a UNetSpatioTemporalConditionModel"):
        modulation.attach(unet)
    with modulation.condition(draw_flow()), pytest.raises(RuntimeError, match="already carries a condition"):
        modulation.set_condition(draw_flow())
    free = FeatureModulation.for_model(unet)
    with pytest.raises(RuntimeError, match=r"not attached.*attach\(model\)"):
        free.set_condition(draw_flow())
    with pytest.raises(RuntimeError, match="not attached"):
        free.reattach()
    with pytest.raises(ValueError, match=r"resnets\.0\.spatial_res_block\.conv1 has 64 output channels.*expects 32"):
        free.attach(svd_with((64, 128)))
    with pytest.raises(ValueError, match="fits diffusers' UNetSpatioTemporalConditionModel, not Linear"):
        FeatureModulation.for_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\[64, 96\] channels"):
        FeatureModulation.for_model(svd_with((64, 96)))
    with pytest.raises(ValueError, match="flow_scale 3"):
        FeatureModulation.for_model(unet, flow_scale=3)
    with pytest.raises(ValueError, match=r"conv1 has 48 channels and takes level 0"):
        FeatureModulation({"conv1": (48, 0)}, channels=32, level_multipliers=[1])
    with pytest.raises(ValueError, match=r"takes level 1; .*one of 1 levels"):
        FeatureModulation({"conv1": (32, 1)}, channels=32, level_multipliers=[1])


@torch.no_grad()
def test_a_layer_that_was_replaced_later_is_noticed_and_followed():
    denoiser = svd()
    unet = denoiser.model
    adapter = trained(unet)
    adapter.attach(unet)
    with adapter.condition(draw_flow()):
        expected = denoiser.run()
    block = unet.down_blocks[0].resnets[0].spatial_res_block
    old, block.conv1 = block.conv1, torch.nn.Conv2d(32, 32, 3, padding=1)
    block.conv1.load_state_dict(old.state_dict())
    with pytest.raises(RuntimeError, match=r"down_blocks\.0.*was replaced"):
        adapter.set_condition(draw_flow())
    adapter.reattach()
    with adapter.condition(draw_flow()):
        assert torch.equal(denoiser.run(), expected)


@torch.no_grad()
def test_moves_to_another_unet(denoiser, modulation):
    other = svd()
    with modulation.condition(draw_flow()):
        expected = denoiser.run()
    plain = other.run()
    modulation.reattach(other.model)
    with modulation.condition(draw_flow()):
        assert torch.equal(other.run(), expected)
        assert torch.equal(denoiser.run(), plain)


def test_a_convolution_that_lora_has_wrapped():
    from peft import LoraConfig, inject_adapter_in_model

    denoiser = svd()
    unet = denoiser.model
    adapter = trained(unet)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False), unet)
    adapter.attach(unet)
    with torch.no_grad():
        plain = denoiser.run()
        with adapter.condition(draw_flow()):
            assert (denoiser.run() - plain).abs().max() > 1e-2
    again = FeatureModulation.for_model(unet)
    assert again.config() == adapter.config()


# Training


def gradients(adapter: FeatureModulation) -> list[torch.Tensor]:
    return [weight.grad.clone() for weight in adapter.parameters()]


def train_step(denoiser: Denoiser, adapter: FeatureModulation, flow: torch.Tensor) -> torch.Tensor:
    arguments = dict(denoiser.arguments, sample=denoiser.arguments["sample"].clone().requires_grad_())
    adapter.zero_grad()
    adapter.set_condition(flow)
    return denoiser.run(**arguments).square().mean()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_the_backward_pass_outside(denoiser, modulation, reentrant):
    """As in Lightning: the step returns its loss, then the backward pass runs the forward pass again."""
    unet = denoiser.model.requires_grad_(False)
    found = []
    for is_checkpointing in (False, True):
        if is_checkpointing:
            unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
            unet.train()
        loss = train_step(denoiser, modulation, draw_flow())
        loss.backward()
        modulation.clear_condition()
        found.append(gradients(modulation))
    assert all(gradient.abs().max() > 0 for gradient in found[0])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)


def test_gradients_are_those_of_the_loss(denoiser, modulation):
    """A step along the gradient of one parameter of the encoder changes the loss as the gradient says."""
    denoiser.model.requires_grad_(False)
    modulation.double()
    arguments = {name: value.double() for name, value in denoiser.arguments.items()}
    denoiser.model.double()
    flow = draw_flow().double()

    def loss():
        with modulation.condition(flow):
            return denoiser.run(**arguments).square().mean()

    loss().backward()
    weight = modulation.encoder.stem[0].temporal.weight
    with torch.no_grad():
        step = 1e-6 * weight.grad / weight.grad.norm()
        weight.add_(step)
        up = loss()
        weight.sub_(2 * step)
        down = loss()
    denoiser.model.float()
    torch.testing.assert_close((up - down) / 2e-6, weight.grad.norm(), atol=0, rtol=1e-4)


def test_two_backward_passes_under_one_condition(denoiser, modulation):
    denoiser.model.requires_grad_(False)
    train_step(denoiser, modulation, draw_flow()).backward()
    once = gradients(modulation)
    denoiser.run().square().mean().backward()
    modulation.clear_condition()
    for one, two in zip(once, gradients(modulation), strict=True):
        torch.testing.assert_close(two, 2 * one, atol=1e-7, rtol=1e-4)


def test_weights_changed_between_training_steps_are_used_at_once(denoiser, modulation):
    modulation.set_condition(draw_flow())
    before = denoiser.run().detach()
    with torch.no_grad():
        for weight in modulation.parameters():
            weight.mul_(2)
        assert (denoiser.run() - before).abs().max() > 1e-2
    assert (denoiser.run().detach() - before).abs().max() > 1e-2


def test_what_was_computed_without_gradients_is_not_used_with_them(denoiser, modulation):
    denoiser.model.requires_grad_(False)
    train_step(denoiser, modulation, draw_flow()).backward()
    modulation.clear_condition()
    expected = gradients(modulation)
    modulation.zero_grad()
    with torch.no_grad():
        modulation.set_condition(draw_flow())
    denoiser.run().square().mean().backward()
    modulation.clear_condition()
    for actual, each in zip(gradients(modulation), expected, strict=True):
        torch.testing.assert_close(actual, each, atol=1e-7, rtol=1e-4)


# Dtypes and compiling


@torch.no_grad()
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_in_bfloat16(adapter_dtype):
    denoiser = svd()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    plain = denoiser.run()
    with adapter.condition(draw_flow()):
        expected = denoiser.run()
    denoiser.model.to(torch.bfloat16)
    adapter.to(adapter_dtype)
    arguments = {name: value.to(torch.bfloat16) for name, value in denoiser.arguments.items()}
    with adapter.condition(draw_flow()):
        actual = denoiser.run(**arguments)
    assert actual.dtype == torch.bfloat16
    error = (actual.float() - expected).norm() / (expected - plain).norm()
    assert error < 0.05, f"{error:.3f} of the effect"


@torch.no_grad()
@pytest.mark.parametrize("order", ["attach, compile", "compile, run, attach"])
def test_compiled_models_modulate_the_same(order):
    torch._dynamo.reset()
    unet = svd_with((32,)).eval()
    denoiser = Denoiser(unet, svd().arguments)
    adapter = trained(unet)
    plain = denoiser.run()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    if order == "attach, compile":
        adapter.attach(unet)
    else:
        assert torch.equal(denoiser.run(compiled), plain)
        adapter.attach(compiled)
    effects = []
    for seed in (3, 4):
        with adapter.condition(draw_flow(seed=seed)):
            expected = denoiser.run(unet)
            with torch._dynamo.config.patch(error_on_recompile=bool(effects)):
                assert torch.equal(denoiser.run(compiled), expected)
        effects.append((expected - plain).abs().max())
    assert min(effects) > 1e-2
    with pytest.raises(ValueError, match="flow has 1"), adapter.condition(draw_flow(frames=1)):
        denoiser.run(unet)
    adapter.detach()
    assert torch.equal(denoiser.run(compiled), plain)


def test_the_norm_is_that_of_torch():
    """32 groups, epsilon 1e-5, with its own weights; the layer's output is normalised, not its input."""
    layer = trained(svd().model).sites["down_blocks/0/resnets/0/spatial_res_block/conv1"]
    torch.nn.init.normal_(layer.norm.weight)
    hidden = torch.randn(4, 32, 5, 6)
    gamma, beta = torch.randn(2, 2, 32, 5, 6)
    normed = F.group_norm(hidden, 32, layer.norm.weight, layer.norm.bias, 1e-5)
    expected = hidden + normed * gamma.repeat(2, 1, 1, 1) + beta.repeat(2, 1, 1, 1)
    torch.testing.assert_close(layer(hidden, gamma, beta), expected)
