"""Key lists and parameter counts of the published checkpoints, on the meta device."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, UNetSpatioTemporalConditionModel
from transformers import Dinov2Config, Dinov2Model, VideoMAEConfig, VideoMAEModel

from motionrag import convert
from motionrag.adapters import AttentionInjection
from motionrag.models import CAMA, Resampler
from tests.parity.golden import published_keys

# The known configuration of CogVideoX-5B-I2V.
COGVIDEOX_5B_I2V = {
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "in_channels": 32,
    "out_channels": 16,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
}
# SVD's own class has these as its defaults, except for the number of heads.
SVD = {"num_attention_heads": (5, 10, 20, 20)}
RESAMPLER = {"dim": 1024, "output_dim": 1024, "num_queries": 25, "depth": 4, "num_heads": 12, "head_dim": 64}


def meta_state(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in published_keys(name).items()}


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(
    ("model_class", "config", "backbone", "num_sites", "num_parameters"),
    [
        (CogVideoXTransformer3DModel, COGVIDEOX_5B_I2V, "cogvideox", 42, 660_602_880),
        (UNetSpatioTemporalConditionModel, SVD, "svd", 16, 37_949_440),
    ],
    ids=["cogvideox", "svd"],
)
def test_injection(model_class, config, backbone, num_sites, num_parameters):
    with torch.device("meta"):
        adapter = AttentionInjection.for_model(model_class(**config), token_dim=1024)
    assert len(adapter.sites) == num_sites
    assert sum(parameter.numel() for parameter in adapter.parameters()) == num_parameters
    converted = convert.injection(meta_state(f"Motion-Adapter.{backbone}"), backbone)
    assert shapes(converted) == shapes(adapter.state_dict())


@pytest.mark.parametrize("backbone", ["cogvideox", "svd"])
def test_resampler_and_cama(backbone):
    with torch.device("meta"):
        motion = Resampler(input_dim=768, **RESAMPLER)
        context = Resampler(input_dim=1024, **RESAMPLER)
        cama = CAMA(dim=1024, depth=4, num_heads=16, ff_dim=4096, num_tokens=25)
    assert shapes(convert.resampler(meta_state(f"motion_proj.{backbone}"))) == shapes(motion.state_dict())
    states = convert.cama(meta_state(f"motion_transformer.{backbone}"), sos_token=torch.zeros(1, 25, 1024))
    assert shapes(states["context_resampler"]) == shapes(context.state_dict())
    assert shapes(states["cama"]) == shapes(cama.state_dict())
    assert "motion_resampler" not in states


def test_tokens_of_the_published_encoders():
    with torch.device("meta"), torch.no_grad():
        video_encoder = VideoMAEModel(VideoMAEConfig(use_mean_pooling=False))
        image_encoder = Dinov2Model(
            Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518)
        )
        motion_features = video_encoder(torch.empty(1, 16, 3, 224, 224)).last_hidden_state
        context_features = image_encoder(torch.empty(1, 3, 224, 224)).last_hidden_state
        motion_tokens = Resampler(input_dim=768, **RESAMPLER)(motion_features)
        context_tokens = Resampler(input_dim=1024, **RESAMPLER)(context_features)
    assert motion_features.shape == (1, 1568, 768)
    assert context_features.shape == (1, 257, 1024)
    assert motion_tokens.shape == context_tokens.shape == (1, 25, 1024)
