"""MotionPro's networks against the published ones: the flow encoder, single blocks, whole UNets, a checkpoint."""

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.resnet import SpatioTemporalResBlock
from einops import rearrange

from motionrag import convert_motionpro
from motionrag.adapters import FeatureModulation, published_group_norm
from motionrag.adapters.modulation import LayerModulation
from motionrag.convert import load_published
from motionrag.models import TrajectoryEncoder
from tests.parity.golden import assert_golden
from tests.parity.golden_motionpro import FOLDER, load_networks, read_json

BLOCKS = ["encoder", "decoder", "flow_scale", "half_channel", "identity_skip"]
LAYERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= tolerance


@torch.no_grad()
def test_flow_encoder():
    case = load_networks("flow_encoder")
    encoder = TrajectoryEncoder(channels=case.config["model_channels"], level_multipliers=case.config["channel_mult"])
    encoder.load_state_dict(convert_motionpro.trajectory_encoder(case.state), strict=True)
    features = encoder(case.inputs["flow"])
    assert len(features) == 4
    for level, feature in enumerate(features):
        assert_golden(rearrange(feature, "b f c h w -> (b f) c h w"), case.outputs[f"feat.{level}"])


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCKS)
def test_single_block(name):
    case = load_networks(f"modulation_{name}")
    config = case.config
    spatial, temporal, ours = {}, {}, {}
    for key, value in case.state.items():
        layer, _, kind = key.rpartition(".")
        if layer.startswith("flow_"):
            _, what, part = layer.split("_")
            ours[f"norm.{kind}" if what == "cond" else f"{what}.{part}.{kind}"] = value
        elif layer.startswith("time_stack."):
            temporal[f"{LAYERS[layer.removeprefix('time_stack.')]}.{kind}"] = value
        elif layer in LAYERS:
            spatial[f"{LAYERS[layer]}.{kind}"] = value
    block = SpatioTemporalResBlock(
        config["channels"], config["out_channels"], config["emb_channels"], eps=1e-5, merge_factor=0.5
    )
    block.spatial_res_block.load_state_dict(spatial, strict=True)
    block.temporal_res_block.load_state_dict(temporal, strict=True)
    block.time_mixer.mix_factor.copy_(case.state["time_mixer.mix_factor"])
    modulation = LayerModulation(feature_channels=config["flow_in_channels"], channels=config["out_channels"])
    modulation.load_state_dict(ours, strict=True)

    inputs = case.inputs
    images = inputs["image_only_indicator"].to(inputs["x"])
    assert_golden(block(inputs["x"], inputs["emb"], images), case.outputs["y_zeroed_modulation"])
    gamma, beta = modulation.gamma_beta(rearrange(inputs["flow"], "(b f) c h w -> b f c h w", b=2))
    assert_golden(gamma, case.outputs["gamma"])
    assert_golden(beta, case.outputs["beta"])
    block.spatial_res_block.conv1.register_forward_hook(lambda _layer, _args, hidden: modulation(hidden, gamma, beta))
    assert_golden(block(inputs["x"], inputs["emb"], images), case.outputs["y"])


def build(case, state=None):
    """A golden UNet and its modulation, attached."""
    state = case.state if state is None else state
    unet = UNetSpatioTemporalConditionModel(**case.config["diffusers_config"]).eval()
    unet.load_state_dict(convert_motionpro.svd_unet(state), strict=True)
    modulation = FeatureModulation.for_model(unet, flow_scale=case.config["flow_dim_scale"])
    modulation.load_state_dict(convert_motionpro.modulation(state), strict=True)
    modulation.attach(unet)
    return unet, modulation


@pytest.fixture(scope="module", params=["unet_narrow", "unet_wide"])
def network(request):
    case = load_networks(request.param)
    return request.param, case, *build(case)


def run(unet, case):
    inputs = case.inputs
    out = unet(
        rearrange(inputs["x"], "(b f) c h w -> b f c h w", b=2),
        inputs["timestep_per_video"],
        inputs["encoder_hidden_states_per_video"],
        added_time_ids=inputs["added_time_ids"],
    ).sample
    return rearrange(out, "b f c h w -> (b f) c h w")


@torch.no_grad()
def test_unet(network):
    _, case, unet, modulation = network
    flow = case.inputs["flow"]
    with published_group_norm(unet):
        assert_close(run(unet, case), case.outputs["sample_zeroed_modulation"], 2e-5)
        with modulation.condition(flow):
            assert_close(run(unet, case), case.outputs["sample"], 2e-5)
        with modulation.condition(torch.zeros_like(flow)):
            assert_close(run(unet, case), case.outputs["sample_zero_flow_input"], 2e-5)


@torch.no_grad()
def test_unet_with_the_norms_of_diffusers(network):
    _, case, unet, modulation = network
    with modulation.condition(case.inputs["flow"]):
        assert_close(run(unet, case), case.outputs["sample"], 1e-3)


def test_the_drawn_weights_are_the_golden_ones(network):
    name, case, _, _ = network
    if name == "unet_wide":
        sums = read_json("unet_wide_sums.json")
        assert sums.keys() == case.state.keys()
        for key, (total, magnitude) in sums.items():
            value = case.state[key].double()
            assert value.sum().item() == pytest.approx(total, abs=1e-9, rel=1e-9)
            assert value.abs().sum().item() == pytest.approx(magnitude, rel=1e-9)


NARROW = {
    "input_blocks.0": "conv_in",
    "input_blocks.1": "down_blocks.0.attentions.0",
    "input_blocks.2": "down_blocks.0.downsamplers.0",
    "input_blocks.3": "down_blocks.1.attentions.0",
    "input_blocks.4": "down_blocks.1.downsamplers.0",
    "input_blocks.5": "down_blocks.2.resnets.0",
    "middle_block": "mid_block",
    "output_blocks.0": "up_blocks.0.resnets.0",
    "output_blocks.1": "up_blocks.0.upsamplers.0",
    "output_blocks.2": "up_blocks.1.attentions.0",
    "output_blocks.3": "up_blocks.1.upsamplers.0",
    "output_blocks.4": "up_blocks.2.attentions.0",
    "output_blocks.5": "up_blocks.2.attentions.1",
}
WIDE = {
    "input_blocks.1": "down_blocks.0.attentions.0",
    "middle_block": "mid_block",
    "output_blocks.0": "up_blocks.0.resnets.0",
}


@torch.no_grad()
def test_every_block_on_the_way(network):
    name, case, unet, modulation = network
    if name == "unet_narrow":
        blocks, expected = NARROW, load_networks("unet_narrow_trace").outputs
    else:
        blocks, expected = WIDE, {key.removeprefix("trace."): value for key, value in case.outputs.items()}
    seen = {}
    handles = [
        unet.get_submodule(path).register_forward_hook(lambda _l, _a, out, key=official: seen.update({key: out}))
        for official, path in blocks.items()
    ]
    handles.append(
        modulation.encoder.register_forward_hook(
            lambda _l, _a, features: seen.update({f"flow_feat.{level}": each for level, each in enumerate(features)})
        )
    )
    with published_group_norm(unet), modulation.condition(case.inputs["flow"]):
        run(unet, case)
    for handle in handles:
        handle.remove()
    assert set(seen) == {key for key in expected if key.startswith(("flow_feat", *blocks))}
    for key, value in seen.items():
        value = value[0] if isinstance(value, tuple) else value
        value = value.flatten(0, 1) if value.ndim == 5 else value
        # Values up to 21: in float32 the golden ones are themselves 1.6e-5 · (1 + |x|) away from those in float64.
        assert_close(value / (1 + expected[key].abs()), expected[key] / (1 + expected[key].abs()), 2e-5)


@torch.no_grad()
def test_checkpoint_with_lora():
    case = load_networks("checkpoint_tiny_io")
    state = load_published(FOLDER / "checkpoint_tiny.pt")
    unet, modulation = build(case, state)
    with published_group_norm(unet):
        with modulation.condition(case.inputs["flow"]):
            assert_close(run(unet, case), case.outputs["sample"], 2e-5)
        without = {key: torch.zeros_like(value) if ".lora_up." in key else value for key, value in state.items()}
        unet.load_state_dict(convert_motionpro.svd_unet(without), strict=True)
        with modulation.condition(case.inputs["flow"]):
            assert_close(run(unet, case), case.outputs["sample_without_lora"], 2e-5)


def test_the_published_norm_is_put_back_also_on_an_error():
    unet = UNetSpatioTemporalConditionModel(**load_networks("checkpoint_tiny_io").config["diffusers_config"])
    norms = {path: module for path, module in unet.named_modules() if isinstance(module, torch.nn.GroupNorm)}
    before = {path: norm.eps for path, norm in norms.items()}
    inside = {}

    def fail():
        inside.update({path: norm.eps for path, norm in norms.items()})
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), published_group_norm(unet):
        fail()
    # Those of the attentions were 1e-6 in both networks.
    assert inside == {path: 1e-6 if ".attentions." in path else 1e-5 for path in norms}
    assert {path: norm.eps for path, norm in norms.items()} == before
    assert 1e-6 in {eps for path, eps in before.items() if ".attentions." not in path}
