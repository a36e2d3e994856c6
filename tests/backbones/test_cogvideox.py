"""Size and frame rules of CogVideoX, checked against what diffusers itself accepts."""

import pytest
import torch

from motionrag.backbones import BACKBONES

SPATIAL, TEMPORAL = 4, 4


def pipeline(*, learned_positions=False, patch_size_t=None):
    """CogVideoX image-to-video without text parts: 32×48 pixels (latents of 8×12), patches of 2; 25 frames, or 9."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXTransformer3DModel,
    )

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        num_layers=1,
        text_embed_dim=8,
        time_embed_dim=4,
        max_text_seq_length=6,
        sample_height=8,
        sample_width=12,
        sample_frames=9 if learned_positions else 25,
        patch_size_t=patch_size_t,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=learned_positions,
        **({"patch_bias": False} if patch_size_t else {}),
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        temporal_compression_ratio=TEMPORAL,
        sample_height=32,
        sample_width=48,
    )
    pipe = CogVideoXImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=CogVideoXDDIMScheduler()
    )
    assert pipe.vae_scale_factor_spatial == SPATIAL
    assert pipe.vae_scale_factor_temporal == TEMPORAL
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def free():
    return pipeline()


@pytest.fixture(scope="module")
def learned():
    return pipeline(learned_positions=True)


def size(pipe, *wanted):
    return BACKBONES["cogvideox"].output_size(pipe, *wanted)


def frames_of(pipe, height, width, num_frames):
    """What diffusers makes of a size: (frames, height, width), or the error that it raises."""
    import numpy as np

    video = pipe(
        image=torch.rand(1, 3, height, width),
        prompt_embeds=torch.randn(1, 6, 8),
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="np",
        max_sequence_length=6,
    ).frames
    return np.asarray(video).shape[1:4]


@pytest.mark.parametrize(("kind", "num_frames"), [("free", 25), ("learned", 9)])
def test_own_size_is_filled_in(kind, num_frames, request):
    pipe = request.getfixturevalue(kind)
    assert size(pipe, None, None, None) == (32, 48, num_frames)
    assert size(pipe, 32, None, 1) == (32, 48, 1)


@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [
        ((33, 48), "32×48"),
        ((32, 50), "32×48"),
        ((31, 60), "32×64"),
        ((1, 1), "8×8"),
        ((0, 48), "8×48"),
        ((-8, 8), "8×8"),
    ],
)
def test_another_size_is_refused_with_the_nearest_valid_one(free, wanted, nearest):
    with pytest.raises(ValueError, match=rf"cannot make {wanted[0]}×{wanted[1]} .*nearest valid size is {nearest}\."):
        size(free, *wanted, None)
    assert size(free, *(int(number) for number in nearest.split("×")), None)


@pytest.mark.parametrize(("wanted", "nearest"), [(0, 1), (2, 1), (8, 9), (10, 9), (13, 17), (-3, 1), (23, 25)])
def test_another_number_of_frames_is_refused_with_the_nearest_valid_one(free, wanted, nearest):
    with pytest.raises(ValueError, match=rf"cannot make {wanted} frames; the nearest valid number is {nearest}\."):
        size(free, None, None, wanted)
    assert size(free, None, None, nearest)[2] == nearest


@pytest.mark.parametrize("wanted", [(40, 48), (32, 56), (16, 24), (33, 48)])
def test_learned_positions_know_a_single_size(learned, wanted):
    with pytest.raises(ValueError, match="nearest valid size is 32×48"):
        size(learned, *wanted, None)


@pytest.mark.parametrize(("kind", "longest", "wanted"), [("learned", 9, 17), ("learned", 9, 49), ("free", 25, 33)])
def test_more_frames_than_it_was_trained_on_are_refused(kind, longest, wanted, request):
    with pytest.raises(ValueError, match=rf"{wanted} frames, and was trained on {longest} at most; .* is {longest}\."):
        size(request.getfixturevalue(kind), None, None, wanted)


@torch.no_grad()
@pytest.mark.parametrize("wanted", [(32, 48, 9), (16, 40, 1), (24, 8, 9), (32, 48, 17), (8, 8, 25)])
def test_diffusers_makes_every_size_that_we_accept(free, wanted):
    height, width, num_frames = size(free, *wanted)
    assert frames_of(free, height, width, num_frames) == (num_frames, height, width)


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [9, 1])
def test_diffusers_makes_every_length_that_we_accept_with_learned_positions(learned, num_frames):
    assert frames_of(learned, *size(learned, None, None, num_frames)) == (num_frames, 32, 48)


@torch.no_grad()
@pytest.mark.parametrize("wanted", [(36, 48, 9), (32, 44, 9)])
def test_diffusers_cannot_make_a_size_that_we_refuse(free, wanted):
    with pytest.raises(ValueError, match="cannot make"):
        size(free, *wanted)
    with pytest.raises((ValueError, RuntimeError)):
        frames_of(free, *wanted)


@torch.no_grad()
def test_diffusers_refuses_another_size_with_learned_positions(learned):
    with pytest.raises(ValueError, match="different resolution"):
        frames_of(learned, 40, 48, 9)


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [5, 6, 10, 13])
def test_diffusers_makes_another_number_of_frames_than_a_refused_one(free, num_frames):
    """It does not fail, but gives more or fewer frames than were asked for."""
    with pytest.raises(ValueError, match="cannot make"):
        size(free, None, None, num_frames)
    assert frames_of(free, 32, 48, num_frames)[0] != num_frames


@torch.no_grad()
def test_patches_in_time():
    """CogVideoX 1.5: odd numbers of latent frames are padded by diffusers, and cut off again."""
    pipe = pipeline(patch_size_t=2)
    for num_frames in (1, 9, 17):
        assert frames_of(pipe, *size(pipe, None, None, num_frames)) == (num_frames, 32, 48)
