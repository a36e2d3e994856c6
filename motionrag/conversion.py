"""Published files become a bundle: what each file holds, how large the parts are, and a report of what was left out.

`convert.py` knows the names of the tensors; here files are told apart by them, sizes are read from the tensors'
shapes, and everything is checked before the folder of the bundle appears. Nothing is downloaded.

What no shape shows are numbers of attention heads. All released files have 64 channels a head (CogVideoX-5B: 48 heads;
SVD: 5, 10, 20 and 20; resamplers: 12; CAMA: 16). Where the base model's config is on this machine, the injection's
heads are read from it.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from motionrag import convert
from motionrag.adapters import AttentionInjection, FeatureModulation
from motionrag.backbones import BACKBONES, Backbone
from motionrag.bundle import ENCODERS, PARTS, BundleConfig, EncoderSource, MotionBundle, check_tensors
from motionrag.convert import StateDict
from motionrag.convert_motionpro import OTHER_NETWORKS, is_motionpro

HEAD_DIM = 64
# How MotionPro was trained and is sampled: guidance from 1 at the first frame to 2.5 at the last.
MOTIONPRO_CALL: dict[str, Any] = {
    "guidance_scale": 2.5,
    "num_inference_steps": 25,
    "height": 320,
    "width": 512,
    "num_frames": 16,
    "fps": 8,
}

# What keys belong to, beside the parts.
_FROZEN_ENCODER = "weights of a frozen encoder"
_FROZEN_BACKBONE = "weights of the frozen backbone"
_ADAPTERS_RESAMPLER = "the resampler that an adapter was trained with"
_UNKNOWN = "unknown"

_BARE_RESAMPLER = ("latents", "proj_in.", "proj_out.", "norm_out.", "layers.")
# Files of the whole condition transformer keep these names, with or without `condition_transformer.` in front.
_CONDITION = "condition_transformer."


@dataclass(frozen=True)
class ConvertedPart:
    """A part of the bundle, and where it comes from.

    Attributes:
        part: Name, as in the bundle.
        file: The published file.
        tensors: How many.
        parameters: How many.
        dtype: Of the tensors, kept as it is.
    """

    part: str
    file: str
    tensors: int
    parameters: int
    dtype: str


@dataclass(frozen=True)
class LeftOut:
    """Tensors of a file that are in no part.

    Attributes:
        file: The published file.
        keys: Their names.
        reason: Why they are left out.
    """

    file: str
    keys: list[str]
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What became of the published files.

    Attributes:
        bundle: Folder that was written.
        parts: What it holds.
        left_out: What it does not hold.
        notes: What was decided, or is missing.
    """

    bundle: str
    parts: list[ConvertedPart] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values.

        Returns:
            Its fields.
        """
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{each.part}: {each.tensors} tensors, {each.parameters} parameters, {each.dtype}, from {each.file}"
            for each in self.parts
        ]
        lines += [
            f"Left out of {each.file}: {len(each.keys)} keys such as {each.keys[0]}: {each.reason}"
            for each in self.left_out
        ]
        return "\n".join([*lines, *self.notes])


def convert_files(
    files: Sequence[str | Path],
    folder: str | Path,
    *,
    backbone: str,
    base_model: str,
    sos_token: str | Path | None = None,
    licence: str = "",
    head_dim: int = HEAD_DIM,
    encoders: Mapping[str, EncoderSource] = ENCODERS,
) -> ConversionReport:
    """Write a bundle of published files, in their own precision. Any subset of parts makes a bundle.

    Args:
        files: Checkpoints, in any order; what they hold is recognised by their keys. A resampler on its own is taken
            for the motion resampler, as published.
        folder: Of the bundle; must not exist. It appears when all is done, or not at all.
        backbone: "cogvideox" or "svd"; MotionPro's file belongs to the latter.
        base_model: Diffusers pipeline that the injection belongs to: hub id or folder.
        sos_token: "zeros", or a file with a tensor `sos_token`, for a condition transformer that has none of its own.
        licence: Of the parts.
        head_dim: Channels of an attention head, where no config says how many heads there are.
        encoders: "video", "image", "clip" and "text" → frozen encoder.

    Returns:
        What was converted and what was left out.

    Raises:
        FileExistsError: If there is something at `folder`.
        FileNotFoundError: If there is no such file, or the base model is neither a folder nor a hub id.
        ValueError: If keys are unknown or missing, two files hold the same part, or parts do not fit together.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; a converted bundle would replace what is in it.")
    convert.published_prefix(backbone)
    if Path(base_model).is_dir():
        base_model = str(Path(base_model).resolve())
    report = ConversionReport(str(folder))
    MotionBundle(BundleConfig(backbone, base_model, encoders={})).path_or_id(base_model)  # refuses a misspelt one
    contents = {Path(file): convert.load_published(file) for file in files}
    controls = {file: state for file, state in contents.items() if is_motionpro(state)}
    others = {file: state for file, state in contents.items() if file not in controls}
    states = _read_parts(others, backbone, sos_token, report)
    sizes = {name: _sizes(name, state, head_dim) for name, state in states.items()}
    denoiser = None
    if controls:
        denoiser = _read_control(controls, BACKBONES[backbone], base_model, states, sizes, report)
    if not states:
        raise ValueError("There is no file to convert; name at least one.")
    if "motion_injection" in sizes:
        _read_heads(sizes["motion_injection"], BACKBONES[backbone], base_model, report)
    _check_agreement(sizes)
    config = BundleConfig(
        backbone=backbone,
        base_model=base_model,
        encoders=dict(encoders) if sizes.keys() != {"feature_modulation"} else {},  # it needs none
        parts={name: sizes[name] for name in PARTS if name in sizes},
        licence=licence,
        base_model_licence=BACKBONES[backbone].public_weights.get(base_model, ""),
        **({} if denoiser is None else {**MOTIONPRO_CALL, "denoiser": BACKBONES[backbone].denoiser}),
    )
    bundle = _bundle(config, states, report)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        bundle.save_pretrained(Path(aside, "bundle"))
        if denoiser is not None:
            denoiser.save_pretrained(Path(aside, "bundle", BACKBONES[backbone].denoiser))  # type: ignore[operator]
        os.rename(Path(aside, "bundle"), folder)
    return report


def _read_parts(
    files: Mapping[Path, StateDict], backbone: str, sos_token: str | Path | None, report: ConversionReport
) -> dict[str, StateDict]:
    """Tensors of MotionRAG's parts in all files, under this package's names."""
    contents = {file: _groups(file, state, convert.published_prefix(backbone)) for file, state in files.items()}
    _leave_out(contents, report)
    states: dict[str, StateDict] = {}
    origins: dict[str, Path] = {}
    for file, groups in contents.items():
        try:
            found = _convert_groups(groups, file, backbone, sos_token, report)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        for name, state in found.items():
            if name in states:
                raise ValueError(f"{origins[name]} and {file} both hold the {_words(name)}; leave one of them out.")
            states[name], origins[name] = state, file
            report.parts.append(_converted_part(name, file, state))
    return states


def _converted_part(name: str, file: Path, state: StateDict) -> ConvertedPart:
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    count = sum(value.numel() for value in state.values())
    return ConvertedPart(name, str(file), len(state), count, ", ".join(dtypes))


def _read_control(
    files: Mapping[Path, StateDict],
    backbone: Backbone,
    base_model: str,
    states: dict[str, StateDict],
    sizes: dict[str, dict[str, Any]],
    report: ConversionReport,
) -> nn.Module:
    """MotionPro's trajectory networks as a part, and its UNet, which was trained with them, as a denoiser."""
    if len(files) > 1:
        raise ValueError(f"{' and '.join(map(str, files))} both hold MotionPro's networks; leave one of them out.")
    [(file, state)] = files.items()
    if backbone.name != "svd":
        raise ValueError(f"{file} holds MotionPro's networks, which belong to svd, not to {backbone.name}.")
    try:
        control, unet_state = convert.modulation(state), convert.svd_unet(state)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    unet = _meta_denoiser(backbone, base_model) or _published_svd(base_model, report)
    check_tensors(unet, unet_state, f"{file}: MotionPro's UNet, compared with that of {base_model},")
    unet.load_state_dict(unet_state, strict=True, assign=True)
    unet.register_to_config(num_frames=MOTIONPRO_CALL["num_frames"])
    others = [key for key in state if key.startswith(OTHER_NETWORKS)]
    if others:
        report.left_out.append(LeftOut(str(file), others, "the frozen autoencoder and image encoder"))
    flow_scale = unet_state["conv_in.weight"].shape[0] // control["encoder.stem.2.spatial.weight"].shape[0]
    states["feature_modulation"] = control
    with torch.device("meta"):
        sizes["feature_modulation"] = FeatureModulation.for_model(unet, flow_scale).config()
    report.parts.append(_converted_part("feature_modulation", file, control))
    report.notes.append(f"Denoiser: MotionPro's UNet from {file}, its LoRA merged; it takes the base model's place")
    return unet


def _meta_denoiser(backbone: Backbone, base_model: str) -> Any:
    """The base model's denoiser without weights; None if its config is not on this machine."""
    import diffusers

    denoiser_class = getattr(diffusers, backbone.denoiser_class)
    try:
        config = denoiser_class.load_config(base_model, subfolder=backbone.denoiser, local_files_only=True)
    except OSError:
        return None
    if config.get("_class_name") != backbone.denoiser_class:
        raise ValueError(
            f"{base_model} holds a {config.get('_class_name')}, not the {backbone.denoiser_class} of {backbone.name}."
        )
    with torch.device("meta"):  # gigabytes, of which the shapes are needed
        return denoiser_class.from_config(config)


def _published_svd(base_model: str, report: ConversionReport) -> Any:
    """SVD's UNet of the published sizes, which are diffusers' defaults, without weights."""
    from diffusers import UNetSpatioTemporalConditionModel

    report.notes.append(f"Sizes of the UNet: SVD's published ones, since the config of {base_model} is not here")
    with torch.device("meta"):
        return UNetSpatioTemporalConditionModel()


def _groups(file: Path, state: StateDict, prefix: str) -> dict[str, StateDict]:
    """The tensors of a file by what they belong to."""
    groups: dict[str, StateDict] = {}
    for key, value in state.items():
        groups.setdefault(_group_of(key, prefix), {})[key] = value
    if _UNKNOWN in groups:
        raise ValueError(f"{file}: unknown keys: {', '.join(sorted(groups[_UNKNOWN]))}.")
    if not groups.keys() - {_FROZEN_ENCODER, _FROZEN_BACKBONE}:
        raise ValueError(f"{file}: the file holds no part of a bundle, at most weights that stay frozen; leave it out.")
    return groups


def _leave_out(contents: Mapping[Path, dict[str, StateDict]], report: ConversionReport) -> None:
    """Take away what is frozen, and the adapters' own resamplers if there is a file for the resampler."""
    has_resampler = any("motion_resampler" in groups for groups in contents.values())
    for file, groups in contents.items():
        for reason in (_FROZEN_ENCODER, _FROZEN_BACKBONE):
            if reason in groups:
                report.left_out.append(LeftOut(str(file), list(groups.pop(reason)), reason))
        if _ADAPTERS_RESAMPLER in groups:
            own = groups.pop(_ADAPTERS_RESAMPLER)
            if has_resampler:
                reason = "another file holds the motion resampler, and wins as in the published pipelines"
                report.left_out.append(LeftOut(str(file), list(own), reason))
            else:
                groups["motion_resampler"] = own


def _convert_groups(
    groups: Mapping[str, StateDict],
    file: Path,
    backbone: str,
    sos_token: str | Path | None,
    report: ConversionReport,
) -> dict[str, StateDict]:
    converted: dict[str, StateDict] = {}
    if "motion_injection" in groups:
        converted["motion_injection"] = convert.injection(groups["motion_injection"], backbone)
    if "motion_resampler" in groups:
        converted["motion_resampler"] = convert.resampler(groups["motion_resampler"])
    if "cama" in groups:
        token = _sos_token(groups["cama"], sos_token, file, report)
        converted.update(convert.cama(groups["cama"], sos_token=token))
    return converted


def _group_of(key: str, prefix: str) -> str:
    """What a published key belongs to."""
    inner = key.removeprefix(_CONDITION)
    if convert.ADAPTER_KEY.fullmatch(key):
        return "motion_injection"
    if inner == "sos_token" or inner.startswith(("transformer.layers.", "condition_proj.")):
        return "cama"
    if inner.startswith("vision_proj.") or key.startswith(_BARE_RESAMPLER):
        return "motion_resampler"
    if key.startswith("action_proj_model."):
        return _ADAPTERS_RESAMPLER
    if inner.startswith(("condition_model.", "vision_model.")):
        return _FROZEN_ENCODER
    return _FROZEN_BACKBONE if key.startswith(prefix) and ".processor." not in key else _UNKNOWN


def _sos_token(state: StateDict, choice: str | Path | None, file: Path, report: ConversionReport) -> Tensor | None:
    """The chosen `sos_token`, unless the file has its own."""
    keys = {key.removeprefix(_CONDITION): value for key, value in state.items()}
    if "sos_token" in keys:
        report.notes.append(f"sos_token: from {file}")
        return None
    if choice is None:
        raise ValueError(
            "it holds no 'sos_token', which the published training neither trains nor saves; choose one with "
            "--sos-token zeros or --sos-token FILE (sos_token=… in Python), see docs/weights.md."
        )
    report.notes.append(f"sos_token: {choice}, since {file} holds none")
    if str(choice) != "zeros":
        chosen = convert.load_published(choice)
        if chosen.keys() != {"sos_token"}:
            raise ValueError(f"{choice} must hold one tensor 'sos_token', got: {', '.join(chosen) or 'nothing'}.")
        return chosen["sos_token"]
    try:
        queries, norm = keys["condition_proj.latents"], keys["condition_proj.norm_out.weight"]
    except KeyError as error:
        raise ValueError(f"missing keys: {error.args[0]}.") from error
    return norm.new_zeros(queries.shape[-2], norm.shape[0])


def _sizes(name: str, state: StateDict, head_dim: int) -> dict[str, Any]:
    """Arguments of a part's class, read from its shapes."""
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    try:
        if name == "cama":
            return _cama_sizes(shapes, head_dim)
        return _injection_sizes(shapes, head_dim) if name == "motion_injection" else _resampler_sizes(shapes, head_dim)
    except KeyError as error:
        raise ValueError(f"The {_words(name)} is incomplete: missing keys: {error.args[0]}.") from error


def _resampler_sizes(shapes: Mapping[str, tuple[int, ...]], head_dim: int) -> dict[str, Any]:
    dim, input_dim = shapes["proj_in.weight"]
    up, inner = shapes["layers.0.feed_forward.up.weight"][0], shapes["layers.0.attention.to_q.weight"][0]
    sizes = {
        "input_dim": input_dim,
        "dim": dim,
        "output_dim": shapes["proj_out.weight"][0],
        "num_queries": shapes["queries"][0],
        "depth": _depth(shapes, "layers."),
        "num_heads": _heads(inner, head_dim, "the resampler's attention"),
        "head_dim": head_dim,
    }
    # Fingerprints cover these arguments: what equals the default is not written, as in bundles that are trained here.
    return sizes if up == 4 * dim else {**sizes, "ff_mult": up // dim}


def _cama_sizes(shapes: Mapping[str, tuple[int, ...]], head_dim: int) -> dict[str, Any]:
    num_tokens, dim = shapes["sos_token"]
    return {
        "dim": dim,
        "depth": _depth(shapes, "transformer.layers."),
        "num_heads": _heads(dim, head_dim, "CAMA"),
        "ff_dim": shapes["transformer.layers.0.linear1.weight"][0],
        "num_tokens": num_tokens,
    }


def _injection_sizes(shapes: Mapping[str, tuple[int, ...]], head_dim: int) -> dict[str, Any]:
    widths = {
        key.removeprefix("sites.").removesuffix(".to_k.weight").replace("/", "."): shape
        for key, shape in shapes.items()
        if key.endswith(".to_k.weight")
    }
    sites = {site: [hidden, _heads(hidden, head_dim, site)] for site, (hidden, _) in widths.items()}
    return {"sites": sites, "token_dim": next(iter(widths.values()))[1]}


def _depth(shapes: Mapping[str, Any], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in shapes if key.startswith(prefix))


def _heads(width: int, head_dim: int, where: str) -> int:
    if head_dim < 1 or width % head_dim:
        raise ValueError(
            f"{where} has {width} channels, which heads of {head_dim} do not divide; set --head-dim (head_dim=…)."
        )
    return width // head_dim


def _read_heads(sizes: dict[str, Any], backbone: Backbone, base_model: str, report: ConversionReport) -> None:
    """Take the numbers of heads from the base model, if its config is on this machine."""
    model = _meta_denoiser(backbone, base_model)
    if model is None:
        report.notes.append(
            f"Heads of the injection: hidden channels / head dim, since the config of {base_model} is not on this "
            "machine"
        )
        return
    fitting = AttentionInjection.for_model(model, sizes["token_dim"], list(sizes["sites"])).config()["sites"]
    wrong = [site for site, (hidden, _) in fitting.items() if hidden != sizes["sites"][site][0]]
    if wrong:
        raise ValueError(
            f"The injection does not fit {base_model}: at {wrong[0]} it has {sizes['sites'][wrong[0]][0]} channels, "
            f"the model {fitting[wrong[0]][0]}."
        )
    sizes["sites"] = fitting
    report.notes.append(f"Heads of the injection: from the config of {base_model}")


def _check_agreement(sizes: Mapping[str, Mapping[str, Any]]) -> None:
    """All parts must speak of the same tokens."""
    tokens = {name: (each["num_queries"], each["output_dim"]) for name, each in sizes.items() if "num_queries" in each}
    if "cama" in sizes:
        tokens["cama"] = (sizes["cama"]["num_tokens"], sizes["cama"]["dim"])
    widths = {name: width for name, (_, width) in tokens.items()}
    if "motion_injection" in sizes:
        widths["motion_injection"] = sizes["motion_injection"]["token_dim"]
    if len(set(tokens.values())) > 1 or len(set(widths.values())) > 1:
        described = [f"{_words(name)} {number}×{width}" for name, (number, width) in tokens.items()]
        described += [f"{_words(name)} …×{width}" for name, width in widths.items() if name not in tokens]
        raise ValueError(f"The parts do not fit together; tokens: {', '.join(described)}. Are all files of one model?")


def _bundle(config: BundleConfig, states: Mapping[str, StateDict], report: ConversionReport) -> MotionBundle:
    """Parts in the files' own precision, without a copy of their tensors."""
    modules: dict[str, Any] = {}
    for name, sizes in config.parts.items():
        with torch.device("meta"):
            module = PARTS[name](**sizes)
        check_tensors(module, states[name], f"The converted {_words(name)}")
        module.load_state_dict(states[name], strict=True, assign=True)
        modules[name] = module.eval().requires_grad_(False)
    return MotionBundle(config, unconditional_tokens=_unconditional_tokens(config, modules, report), **modules)


def _unconditional_tokens(
    config: BundleConfig, modules: Mapping[str, nn.Module], report: ConversionReport
) -> Tensor | None:
    if "motion_resampler" not in modules:
        return None
    try:
        tokens = MotionBundle(config, motion_resampler=modules["motion_resampler"]).compute_unconditional_tokens()
    except FileNotFoundError as error:
        report.notes.append(f"Unconditional tokens, for guidance: left for their first use. {error}")
        return None
    report.notes.append(f"Unconditional tokens, for guidance: made with {config.encoders['video'].source}")
    return tokens


def _words(part: str) -> str:
    return "CAMA" if part == "cama" else part.replace("_", " ")
