"""What differs between backbones, one file per family: data and a few functions.

A backbone is a frozen, pretrained diffusers image-to-video model. To add one, write a file like `cogvideox.py` and
add its `Backbone` to `BACKBONES`; CONTRIBUTING.md walks through it.
"""

from collections.abc import Iterable

from torch import nn

from motionrag.backbones.backbone import Backbone
from motionrag.backbones.cogvideox import COGVIDEOX
from motionrag.backbones.svd import SVD

BACKBONES: dict[str, Backbone] = {backbone.name: backbone for backbone in (COGVIDEOX, SVD)}


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
    """Find the family of a diffusers pipeline that motionrag generates with, by the names of its classes.

    Args:
        pipeline_class: For example `CogVideoXImageToVideoPipeline`, or a subclass of it.

    Returns:
        Its family.

    Raises:
        ValueError: If no family generates with this class.
    """
    return _find(pipeline_class, _pipelines(backbone for backbone in BACKBONES.values() if backbone.output_size))


def trainable_backbone(pipeline_class: type) -> Backbone:
    """Find the family of a diffusers pipeline that motionrag trains, by the names of its classes.

    Args:
        pipeline_class: For example `StableVideoDiffusionPipeline`.

    Returns:
        Its family.

    Raises:
        ValueError: If motionrag cannot train with this class.
    """
    return _find(pipeline_class, _pipelines(backbone for backbone in BACKBONES.values() if backbone.encode))


def _pipelines(backbones: Iterable[Backbone]) -> dict[str, Backbone]:
    return {backbone.pipeline_class: backbone for backbone in backbones if backbone.pipeline_class is not None}


def _find(cls: type, families: dict[str, Backbone]) -> Backbone:
    for base in cls.__mro__:
        if base.__name__ in families:
            return families[base.__name__]
    raise ValueError(f"No backbone family knows {cls.__name__}; known are {', '.join(sorted(families))}.")


__all__ = ["BACKBONES", "Backbone", "backbone_of_denoiser", "backbone_of_pipeline", "trainable_backbone"]
