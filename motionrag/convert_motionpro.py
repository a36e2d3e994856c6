"""Key maps from the published MotionPro checkpoints to this package's feature modulation and diffusers' SVD UNet.

One file holds both: the frozen UNet with its LoRA, and the trajectory networks in it. Which numbers stand for which
blocks follows from how many levels the UNet has and how many residual blocks a level; both are read off the keys, the
whole table of names is made from them, and what is missing or left over is named.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise

from torch import Tensor

from motionrag.key_maps import StateDict, refuse, report_left_out

Table = dict[str, str]

PREFIX = "model.diffusion_model."
# Other networks that the same file may hold: CLIP and the autoencoder.
OTHER_NETWORKS = ("conditioner.", "first_stage_model.")
UNET_PARTS = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.", "output_blocks.", "out.")

_ENCODER_STEM = {
    "0": "stem.0.spatial",
    "1": "stem.0.temporal",
    "2": "stem_norms.0",
    "4": "stem.1.spatial",
    "5": "stem.1.temporal",
    "6": "stem_norms.1",
    "8": "stem.2.spatial",
    "9": "stem.2.temporal",
}
_ENCODER_LEVEL = {"0": "norm", "2": "convolution.spatial", "3": "convolution.temporal", "4.op": "downsample"}
_SITE = {
    "flow_cond_norm": "norm",
    "flow_gamma_spatial": "gamma.spatial",
    "flow_gamma_temporal": "gamma.temporal",
    "flow_beta_spatial": "beta.spatial",
    "flow_beta_temporal": "beta.temporal",
}
_RESIDUAL_HALF = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def is_motionpro(state: Mapping[str, Tensor]) -> bool:
    """Tell a published MotionPro checkpoint by its keys.

    Args:
        state: Published state dict.

    Returns:
        True if it holds a flow encoder.
    """
    return any(key.removeprefix(PREFIX).startswith("flow_blocks.") for key in state)


def trajectory_encoder(state: Mapping[str, Tensor]) -> StateDict:
    """Convert the published flow encoder.

    Args:
        state: Published state dict; what is not of the flow encoder is left out.

    Returns:
        State dict of `motionrag.models.TrajectoryEncoder`.

    Raises:
        ValueError: If keys are missing or unknown.
    """
    flow = {key: value for key, value in _unet_part(state).items() if key.startswith("flow_blocks.")}
    return _rename("flow encoder", flow, _encoder_table(_number_of_levels(flow)))


def modulation(state: Mapping[str, Tensor]) -> StateDict:
    """Convert the published trajectory networks: the flow encoder, and γ, β and norm of every level.

    Args:
        state: Published state dict; the UNet's own keys and its LoRA are left out.

    Returns:
        State dict of `motionrag.adapters.FeatureModulation`.

    Raises:
        ValueError: If keys are missing or unknown.
    """
    state = _unet_part(state)
    flow = {key: value for key, value in state.items() if key.startswith("flow_") or ".flow_" in key}
    others = [key for key in state if key not in flow]
    refuse("feature modulation", unknown=[key for key in others if not key.startswith(UNET_PARTS)])
    report_left_out("feature modulation", others)

    levels = _number_of_levels(flow)
    table = {official: f"encoder.{ours}" for official, ours in _encoder_table(levels).items()}
    per_level = _blocks_per_level(flow)
    for level in range(levels):
        for official, ours in (
            (f"input_blocks.{1 + level * per_level}.0", f"down_blocks/{level}"),
            (f"output_blocks.{level * per_level}.0", f"up_blocks/{level}"),
        ):
            site = f"sites.{ours}/resnets/0/spatial_res_block/conv1"
            table |= _with_bias({f"{official}.{key}": f"{site}.{name}" for key, name in _SITE.items()})
    return _rename("feature modulation", flow, table)


def svd_unet(state: Mapping[str, Tensor]) -> StateDict:
    """Convert the published UNet, its LoRA merged: every Linear becomes W + up · down.

    Args:
        state: Published state dict, with or without LoRA; the trajectory networks are left out.

    Returns:
        State dict of diffusers' `UNetSpatioTemporalConditionModel`, in the dtypes of the file.

    Raises:
        ValueError: If keys are missing or unknown.
    """
    state = _unet_part(state)
    flow = [key for key in state if key.startswith("flow_") or ".flow_" in key]
    report_left_out("UNet", flow)
    merged = _merge_lora({key: value for key, value in state.items() if key not in set(flow)})
    return _rename("UNet", merged, _unet_table(merged))


def _unet_part(state: Mapping[str, Tensor]) -> StateDict:
    """The UNet's keys without their prefix."""
    others = [key for key in state if key.startswith(OTHER_NETWORKS)]
    report_left_out("UNet", others)
    state = {key: value for key, value in state.items() if key not in set(others)}
    if not any(key.startswith(PREFIX) for key in state):
        return state
    refuse("checkpoint of MotionPro", unknown=[key for key in state if not key.startswith(PREFIX)])
    return {key.removeprefix(PREFIX): value for key, value in state.items()}


def _number_of_levels(flow: Iterable[str]) -> int:
    return 1 + max((int(match[1]) for key in flow if (match := re.match(r"flow_blocks\.(\d+)\.", key))), default=0)


def _blocks_per_level(flow: Iterable[str]) -> int:
    """Distance between the modulated blocks of neighbouring levels in the published numbering."""
    distances = []
    for side in ("input_blocks", "output_blocks"):
        numbers = sorted({int(match[1]) for key in flow if (match := re.match(rf"{side}\.(\d+)\.0\.flow_", key))})
        distances += [after - before for before, after in pairwise(numbers)]
    return min(distances, default=1)


def _encoder_table(levels: int) -> Table:
    table = {f"flow_blocks.0.{key}": ours for key, ours in _ENCODER_STEM.items()}
    for level in range(1, levels):
        table |= {f"flow_blocks.{level}.{key}": f"levels.{level - 1}.{ours}" for key, ours in _ENCODER_LEVEL.items()}
    return _with_bias(table)


def _unet_table(state: Mapping[str, Tensor]) -> Table:
    """Published name → diffusers' name, for a UNet of the size that the keys tell."""
    inputs = 1 + max((int(match[1]) for key in state if (match := re.match(r"input_blocks\.(\d+)\.", key))), default=0)
    downsamplers = [int(match[1]) for key in state if (match := re.match(r"input_blocks\.(\d+)\.0\.op\.", key))]
    # A level is its residual blocks and one downsampler, which the last level lacks; block 0 is the first convolution.
    per_level = min(downsamplers, default=inputs)
    levels = inputs // per_level

    table = _with_bias(_ENDS)
    for level in range(levels):
        for slot in range(per_level - 1):
            official, ours = f"input_blocks.{1 + level * per_level + slot}", f"down_blocks.{level}"
            table |= _residual_table(state, f"{official}.0", f"{ours}.resnets.{slot}")
            table |= _transformer_table(state, f"{official}.1", f"{ours}.attentions.{slot}")
        if level < levels - 1:
            sampler = f"input_blocks.{(level + 1) * per_level}.0.op"
            table |= _with_bias({sampler: f"down_blocks.{level}.downsamplers.0.conv"})
    for level in range(levels):
        for slot in range(per_level):
            official, ours = f"output_blocks.{level * per_level + slot}", f"up_blocks.{level}"
            table |= _residual_table(state, f"{official}.0", f"{ours}.resnets.{slot}")
            transformer = _transformer_table(state, f"{official}.1", f"{ours}.attentions.{slot}")
            table |= transformer
            if slot == per_level - 1 and level < levels - 1:
                sampler = f"{official}.{2 if transformer else 1}.conv"
                table |= _with_bias({sampler: f"{ours}.upsamplers.0.conv"})
    for number, slot in ((0, 0), (2, 1)):
        table |= _residual_table(state, f"middle_block.{number}", f"mid_block.resnets.{slot}")
    return table | _transformer_table(state, "middle_block.1", "mid_block.attentions.0")


def _residual_table(state: Mapping[str, Tensor], official: str, ours: str) -> Table:
    halves = {"": "spatial_res_block", "time_stack.": "temporal_res_block"}
    table = {
        f"{official}.{half}{key}": f"{ours}.{name}.{layer}"
        for half, name in halves.items()
        for key, layer in _RESIDUAL_HALF.items()
    }
    # Only a block that changes the number of channels has one.
    if any(key.startswith(f"{official}.skip_connection.") for key in state):
        table[f"{official}.skip_connection"] = f"{ours}.spatial_res_block.conv_shortcut"
    return _with_bias(table) | {f"{official}.time_mixer.mix_factor": f"{ours}.time_mixer.mix_factor"}


def _transformer_table(state: Mapping[str, Tensor], official: str, ours: str) -> Table:
    """Empty for a block without attention."""
    depths = [
        1 + int(match[1])
        for key in state
        if (match := re.match(rf"{re.escape(official)}\.transformer_blocks\.(\d+)\.", key))
    ]
    if not depths:
        return {}
    table = {key: key for key in ("norm", "proj_in", "proj_out")}
    table |= {"time_pos_embed.0": "time_pos_embed.linear_1", "time_pos_embed.2": "time_pos_embed.linear_2"}
    weights: Table = {}
    for number in range(max(depths)):
        spatial, temporal = f"transformer_blocks.{number}", f"time_stack.{number}"
        layers = ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2", "attn1.to_out.0", "attn2.to_out.0")
        projections = [f"{attention}.to_{name}.weight" for attention in ("attn1", "attn2") for name in "qkv"]
        for block, name, more in (
            (spatial, spatial, ()),
            (temporal, f"temporal_{spatial}", ("norm_in", "ff_in.net.0.proj", "ff_in.net.2")),
        ):
            table |= {f"{block}.{layer}": f"{name}.{layer}" for layer in (*layers, *more)}
            weights |= {f"{block}.{projection}": f"{name}.{projection}" for projection in projections}
    table = _with_bias(table) | weights | {"time_mixer.mix_factor": "time_mixer.mix_factor"}
    return {f"{official}.{key}": f"{ours}.{name}" for key, name in table.items()}


def _with_bias(layers: Mapping[str, str]) -> Table:
    return {f"{key}.{kind}": f"{name}.{kind}" for key, name in layers.items() for kind in ("weight", "bias")}


def _merge_lora(state: Mapping[str, Tensor]) -> StateDict:
    """Names and weights of a UNet without LoRA."""
    plain: StateDict = {}
    surplus = []
    for key, value in state.items():
        name = re.sub(r"\.linear\.(weight|bias)$", r".\1", key)
        if name != key and name in state:
            surplus.append(key)
        elif ".lora_" not in key:
            plain[name] = value
    layers = sorted({key.partition(".lora_")[0] for key in state if ".lora_" in key})
    needed = [f"{layer}.{part}.weight" for layer in layers for part in ("linear", "lora_down", "lora_up")]
    surplus += [key for key in state if ".lora_" in key and key not in set(needed)]
    refuse("UNet with LoRA", unknown=surplus, missing=[key for key in needed if key not in state])
    for layer in layers:
        base, down, up = (state[f"{layer}.{part}.weight"] for part in ("linear", "lora_down", "lora_up"))
        plain[f"{layer}.weight"] = (base.float() + up.float() @ down.float()).to(base.dtype)
    return plain


def _rename(what: str, state: Mapping[str, Tensor], table: Table) -> StateDict:
    refuse(what, unknown=[key for key in state if key not in table], missing=[key for key in table if key not in state])
    return {ours: state[official] for official, ours in table.items()}
