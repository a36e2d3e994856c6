"""How a family is found, and that what its record names is there in diffusers."""

import pytest
import torch
from torch import nn

from motionrag.backbones import BACKBONES, backbone_of_denoiser, backbone_of_index, backbone_of_pipeline
from tests.adapters.denoisers import DENOISERS, cogvideox, svd


def test_families_are_found_by_class_also_by_a_subclass():
    cog, unet = cogvideox().model, svd().model
    assert backbone_of_denoiser(cog) is BACKBONES["cogvideox"]
    assert backbone_of_denoiser(unet) is BACKBONES["svd"]
    assert backbone_of_denoiser(torch.compile(cog, backend="eager")) is BACKBONES["cogvideox"]
    assert backbone_of_denoiser(type("Mine", (type(cog),), {}).from_config(cog.config)) is BACKBONES["cogvideox"]


def test_unknown_families_are_named():
    with pytest.raises(ValueError, match=r"knows Linear; known are .*CogVideoXTransformer3DModel"):
        backbone_of_denoiser(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"knows object; known are .*CogVideoXImageToVideoPipeline"):
        backbone_of_pipeline(object)


def test_the_pipeline_of_a_family_has_its_denoiser():
    import diffusers

    for backbone in BACKBONES.values():
        assert hasattr(diffusers, backbone.denoiser_class)
        pipeline_class = getattr(diffusers, backbone.pipeline_class)
        assert backbone_of_pipeline(pipeline_class) is backbone
        assert pipeline_class.__init__.__annotations__[backbone.denoiser].__name__ == backbone.denoiser_class


def test_default_sites_are_attention_projections():
    for name, make in DENOISERS.items():
        if name in BACKBONES:
            model = make().model
            sites = BACKBONES[name].sites(model)
            assert sites
            assert all(isinstance(model.get_submodule(site), nn.Linear) for site in sites)


@pytest.mark.parametrize(
    ("index", "name"),
    [
        ({"_class_name": "CogVideoXImageToVideoPipeline"}, "cogvideox"),
        ({"_class_name": "StableVideoDiffusionPipeline"}, "svd"),
        ({"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9}, "wan"),
        ({"_class_name": "WanPipeline", "expand_timesteps": True}, "wan"),  # TI2V-5B is stored so
        ({"_class_name": "LTXPipeline"}, "ltx"),  # LTX-Video too
        ({"_class_name": "LTXConditionPipeline"}, "ltx"),
    ],
)
def test_the_family_of_stored_weights(index, name):
    assert backbone_of_index(index) is BACKBONES[name]


def test_weights_of_no_family_are_named():
    with pytest.raises(ValueError, match=r"WanPipeline weights make videos from text.*expand_timesteps"):
        backbone_of_index({"_class_name": "WanPipeline", "expand_timesteps": False})
    with pytest.raises(ValueError, match=r"No backbone family knows CogVideoXPipeline; known are .*LTXImageToVideo"):
        backbone_of_index({"_class_name": "CogVideoXPipeline"})
    with pytest.raises(ValueError, match=r"are of a NoSuchPipeline, which diffusers \d.* does not have"):
        backbone_of_index({"_class_name": "NoSuchPipeline"})


def test_a_pipeline_without_its_denoiser_is_refused():
    from tests.training.parts import pipeline

    pipe = pipeline()
    pipe.transformer = None
    with pytest.raises(ValueError, match="CogVideoXImageToVideoPipeline holds no transformer; load it whole"):
        BACKBONES["cogvideox"].denoisers(pipe)
