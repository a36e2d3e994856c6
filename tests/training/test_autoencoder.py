"""Training of autoencoders, frame by frame: they learn, and are stored with the scale of their latents."""

import pytest
import pytorch_lightning as lightning
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLTemporalDecoder, AutoModel
from einops import rearrange
from torch import nn
from torch.utils.data import Dataset

from motionrag.backbones.cogvideox import causal_convolutions
from motionrag.training import AutoencoderTraining, ClipDataModule

SIZE, STEPS, COUNT = 8, 300, 32


class Plates(Dataset):
    """Frames of one colour each, with a thing of another."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        ground, thing = torch.rand(2, 3, 1, 1, generator=draw) * 1.6 - 0.8
        masks = torch.zeros(1, SIZE, SIZE, dtype=torch.long)
        masks[0, 2:5, 2:6] = 1
        return {"video": torch.where(masks[0] > 0, thing, ground)[None], "masks": masks}


def temporal_decoder():
    return AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, latent_channels=8
    )


def cogvideox():
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=2,
        temporal_compression_ratio=1,
    )


# Of each the autoencoder, which tap in time is the frame's own, and the convolutions that have one.
MADE = {
    "cogvideox": (cogvideox, -1, lambda vae: [layer.conv for layer in causal_convolutions(vae)]),
    "svd": (temporal_decoder, 1, lambda vae: [each for each in vae.decoder.modules() if isinstance(each, nn.Conv3d)]),
}


@pytest.fixture(params=MADE)
def made(request, tmp_path):
    torch.manual_seed(0)
    make, tap, convolutions = MADE[request.param]
    make().save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae"), tap, convolutions


@torch.no_grad()
def error_and_latents(vae, frames):
    """What its own encode and decode make of single frames `(b c h w)`: mean absolute error, and the latents."""
    if vae.config._class_name == "AutoencoderKLCogVideoX":
        latents = vae.encode(rearrange(frames, "b c h w -> b c 1 h w")).latent_dist.mode()
        decoded = rearrange(vae.decode(latents).sample, "b c 1 h w -> b c h w")
    else:
        latents = vae.encode(frames).latent_dist.mode()
        decoded = torch.cat([vae.decode(each[None], num_frames=1).sample for each in latents])
    return float((decoded - frames).abs().mean()), latents


def test_it_learns_frames_and_stores_the_scale(made):
    folder, tap, convolutions = made
    frames = torch.cat([Plates()[index]["video"] for index in range(COUNT)])
    before, _ = error_and_latents(AutoModel.from_pretrained(folder), frames)
    training = AutoencoderTraining(folder, learning_rate=5e-3, warmup_steps=5, decay_steps=STEPS)
    data = ClipDataModule(Plates(), validation=Plates(), batch_size=8, validation_batch_size=COUNT)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_steps=STEPS, accelerator="cpu", **quiet).fit(training, data)
    vae = AutoModel.from_pretrained(folder)
    after, latents = error_and_latents(vae, frames)
    assert after < 0.7 * before
    assert float((vae.config.scaling_factor * latents).std()) == pytest.approx(1, abs=0.02)  # the validation frames
    for layer in convolutions(vae):
        others = layer.weight.clone()
        others[:, :, tap] = 0
        assert layer.weight[:, :, tap].any()
        assert not others.any()  # no frame sees its neighbours


def test_another_autoencoder_is_refused(tmp_path):
    AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a AutoencoderKL; what is trained frame by frame is AutoencoderKLCog"):
        AutoencoderTraining(str(tmp_path))
