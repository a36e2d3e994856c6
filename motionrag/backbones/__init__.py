"""What differs between backbones, one file per family: data and a few functions.

A backbone is a frozen, pretrained diffusers image-to-video model. To add one, write a file like `cogvideox.py` and
add its `Backbone` to `BACKBONES`; docs/backbones.md walks through it.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from motionrag.backbones.backbone import Backbone
from motionrag.backbones.cogvideox import COGVIDEOX
from motionrag.backbones.ltx import LTX
from motionrag.backbones.svd import SVD
from motionrag.backbones.wan import WAN

BACKBONES: dict[str, Backbone] = {backbone.name: backbone for backbone in (COGVIDEOX, SVD, LTX, WAN)}


def backbone_of_denoiser(model: nn.Module) -> Backbone:
    """Find the family of a denoising network (transformer or UNet), by the names of its classes.

    Args:
        model: The network, also compiled.

    Returns:
        Its family.

    Raises:
        ValueError: If no family knows this class.
    """
    model = getattr(model, "_orig_mod", model)
    return _find(type(model), {backbone.denoiser_class: backbone for backbone in BACKBONES.values()})


def backbone_of_pipeline(pipeline_class: type) -> Backbone:
    """Find the family of a diffusers pipeline, by the names of its classes.

    Args:
        pipeline_class: For example `CogVideoXImageToVideoPipeline`, or a subclass of it.

    Returns:
        Its family.

    Raises:
        ValueError: If no family has this class.
    """
    return _find(pipeline_class, {backbone.pipeline_class: backbone for backbone in BACKBONES.values()})


def backbone_of_index(index: Mapping[str, Any]) -> Backbone:
    """Find the family of stored weights.

    Args:
        index: Content of `model_index.json`, as diffusers' `load_config` gives it.

    Returns:
        Its family; load the weights with its `pipeline_class`, which may be another than the one named there.

    Raises:
        ValueError: If diffusers does not have the class that is named there, no family has it, or the weights make
            videos from text alone.
    """
    import diffusers

    name = index["_class_name"]
    for backbone in BACKBONES.values():
        if name in backbone.stored_as:
            wrong = {key: value for key, value in backbone.stored_as[name].items() if index.get(key) != value}
            if wrong:
                raise ValueError(f"These {name} weights make videos from text, not from an image: {wrong} is missing.")
            return backbone
    pipeline_class = getattr(diffusers, name, None)
    if pipeline_class is None:
        raise ValueError(f"The weights are of a {name}, which diffusers {diffusers.__version__} does not have.")
    return backbone_of_pipeline(pipeline_class)


def _find(cls: type, families: dict[str, Backbone]) -> Backbone:
    for base in cls.__mro__:
        if base.__name__ in families:
            return families[base.__name__]
    raise ValueError(f"No backbone family knows {cls.__name__}; known are {', '.join(sorted(families))}.")


__all__ = ["BACKBONES", "Backbone", "backbone_of_denoiser", "backbone_of_index", "backbone_of_pipeline"]
