"""Training of autoencoders, frame by frame: they learn, and are stored with the scale of their latents."""

import pytest
import pytorch_lightning as lightning
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLTemporalDecoder, AutoModel
from einops import rearrange, reduce
from torch.utils.data import Dataset

from motionrag.backbones.cogvideox import causal_convolutions
from motionrag.training import AutoencoderTraining, ClipDataModule
from motionrag.training.autoencoder import colours

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


def images():
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=2,
        mid_block_add_attention=False,
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


MADE = {"cogvideox": cogvideox, "images": images}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.fixture(params=MADE)
def folder(request, tmp_path):
    torch.manual_seed(0)
    MADE[request.param]().save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


@pytest.fixture
def frames():
    return torch.cat([Plates()[index]["video"] for index in range(COUNT)])


def train(folder, **options):
    training = AutoencoderTraining(folder, learning_rate=5e-3, warmup_steps=5, decay_steps=STEPS, **options)
    data = ClipDataModule(Plates(), validation=Plates(), batch_size=8, validation_batch_size=COUNT)
    lightning.Trainer(max_steps=STEPS, accelerator="cpu", **QUIET).fit(training, data)
    return AutoModel.from_pretrained(folder)


@torch.no_grad()
def error_and_latents(vae, frames):
    """What its own encode and decode make of single frames: mean absolute error, and latents; all `(b c h w)`."""
    pack = "b c 1 h w" if vae.config._class_name == "AutoencoderKLCogVideoX" else "b c h w"
    latents = vae.encode(rearrange(frames, f"b c h w -> {pack}")).latent_dist.mode()
    decoded = rearrange(vae.decode(latents).sample, f"{pack} -> b c h w")
    return float((decoded - frames).abs().mean()), rearrange(latents, f"{pack} -> b c h w")


def test_it_learns_frames_and_stores_the_scale(folder, frames):
    before, _ = error_and_latents(AutoModel.from_pretrained(folder), frames)
    vae = train(folder)
    after, latents = error_and_latents(vae, frames)
    assert after < 0.7 * before
    assert float((vae.config.scaling_factor * latents).std()) == pytest.approx(1, abs=0.02)  # the validation frames
    if vae.config._class_name == "AutoencoderKLCogVideoX":
        for layer in causal_convolutions(vae):
            assert layer.conv.weight[:, :, -1].any()
            assert not layer.conv.weight[:, :, :-1].any()  # no frame sees those before it


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_first_channels_learn_to_be_colours_if_they_shall(folder, frames, weight):
    def error(vae):
        _, latents = error_and_latents(vae, frames)
        return float((latents[:, :3] - colours(frames, *latents.shape[-2:])).abs().mean())

    before = error(AutoModel.from_pretrained(folder))
    assert (error(train(folder, colour_weight=weight)) < 0.3 * before) == (weight > 0)


def test_average_weight_counts_the_error_of_each_cells_mean(tmp_path, frames):
    torch.manual_seed(0)
    images().save_pretrained(tmp_path)
    batch = {"video": frames[:, None], "masks": torch.zeros(COUNT, 1, SIZE, SIZE)}

    def loss(weight):
        training = AutoencoderTraining(str(tmp_path), average_weight=weight)
        torch.manual_seed(1)  # of the latents' noise
        return training.training_step(batch, 0)

    vae = AutoModel.from_pretrained(str(tmp_path))
    torch.manual_seed(1)
    errors = vae.decode(vae.encode(frames).latent_dist.sample()).sample - frames
    means = reduce(errors, "b c (rows h) (columns w) -> b c rows columns", "mean", h=2, w=2)
    torch.testing.assert_close(loss(3.0) - loss(0.0), 3 * means.abs().mean(), atol=1e-5, rtol=1e-4)


def test_colours_are_means_of_cells():
    frames = torch.zeros(1, 3, 4, 4)
    frames[0, :, :2, :2] = torch.tensor([0.5, 0.5, 0.5])[:, None, None]  # grey
    frames[0, :, :2, 2:] = torch.tensor([0.4, 0.1, -0.2])[:, None, None]  # as green as it is red and blue
    frames[0, 1, 2:, :2] = torch.tensor([[0.2, 0.0], [0.0, 0.2]])  # green, in one half of the pixels
    expected = torch.tensor([[[3.0, 0.6], [0.2, 0.0]], [[0.0, 3.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]])
    torch.testing.assert_close(colours(frames, 2, 2)[0], expected)


def test_another_autoencoder_is_refused(tmp_path):
    AutoencoderKLTemporalDecoder(block_out_channels=(32,)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a AutoencoderKLTemporalDecoder; what is trained frame by frame"):
        AutoencoderTraining(str(tmp_path))
