"""Real diffusers denoisers at one or two layers, with inputs and adapters for them. No test lives here."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from motionrag.adapters import AttentionInjection

TOKEN_DIM = 12


@dataclass
class Denoiser:
    """A small model, arguments for a batch of two videos, and the sites for the adapter (None: its family's own)."""

    model: nn.Module
    arguments: dict[str, Any]
    sites: list[str] | None = None

    def run(self, model: nn.Module | None = None, **changes: Any) -> torch.Tensor:
        """Call the model, or one that wraps it."""
        return (self.model if model is None else model)(**{**self.arguments, **changes}).sample


def cogvideox() -> Denoiser:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=8,
        time_embed_dim=4,
        max_text_seq_length=6,
        sample_height=8,
        sample_width=8,
        sample_frames=9,
    )
    return Denoiser(
        model.eval(),
        {
            "hidden_states": torch.randn(2, 3, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 8),
            "timestep": torch.tensor([3, 3]),
        },
    )


def svd() -> Denoiser:
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(0)
    model = UNetSpatioTemporalConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        cross_attention_dim=16,
        layers_per_block=1,
        num_attention_heads=(2, 4),
        num_frames=3,
    )
    return Denoiser(
        model.eval(),
        {
            "sample": torch.randn(2, 3, 8, 8, 8),
            "timestep": torch.tensor(0.5),
            "encoder_hidden_states": torch.randn(2, 1, 16),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]] * 2),
        },
    )


def wan() -> Denoiser:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return Denoiser(
        model.eval(),
        {
            "hidden_states": torch.randn(2, 4, 3, 8, 8),
            "encoder_hidden_states": torch.randn(2, 5, 16),
            "timestep": torch.tensor([3, 3]),
        },
        sites=["blocks.0.attn2", "blocks.1.attn2.to_out.0"],
    )


def ltx() -> Denoiser:
    from diffusers import LTXVideoTransformer3DModel

    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )
    return Denoiser(
        model.eval(),
        {
            "hidden_states": torch.randn(2, 12, 4),
            "encoder_hidden_states": torch.randn(2, 5, 16),
            "timestep": torch.tensor([3, 3]),
            "encoder_attention_mask": torch.ones(2, 5),
            "num_frames": 3,
            "height": 2,
            "width": 2,
        },
        sites=["transformer_blocks.0.attn2", "transformer_blocks.1.attn1"],
    )


DENOISERS = {"cogvideox": cogvideox, "svd": svd, "wan": wan, "ltx": ltx}


def trained(model, sites=None, seed=1):
    """An adapter whose values are not zero, as after training."""
    torch.manual_seed(seed)
    adapter = AttentionInjection.for_model(model, token_dim=TOKEN_DIM, sites=sites)
    for name, weight in adapter.named_parameters():
        if name.endswith("to_v.weight"):
            nn.init.normal_(weight, std=0.5)
    return adapter


def tokens(rows=2, length=5, seed=2):
    return torch.randn(rows, length, TOKEN_DIM, generator=torch.Generator().manual_seed(seed))
