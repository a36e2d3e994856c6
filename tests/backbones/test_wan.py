"""Wan's sizes, what is encoded for training, and its loss, against what diffusers' own pipeline does."""

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import nn

from motionrag.adapters import AttentionInjection
from motionrag.backbones import BACKBONES
from tests.backbones.tiny_wan import SIZE, Z_DIM, wan_pipeline

WAN = BACKBONES["wan"]
FRAMES = 9
CAPTIONS = ["a dog runs", "a cat"]
TRAINED = ("2.1", "2.2", "5b")
PIPELINES = {}


def made(kind):
    """Made once; tests put back what they change."""
    if kind not in PIPELINES:
        PIPELINES[kind] = wan_pipeline(kind)
    return PIPELINES[kind]


@pytest.fixture
def pipe(request):
    return made(request.param)


def each(*kinds):
    return pytest.mark.parametrize("pipe", kinds, indirect=True, ids=kinds)


def random_clips():
    """Two clips `(b t c h w)` of 8-bit colours, so that their first frames are pictures without rounding."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (2, FRAMES, 3, SIZE, 2 * SIZE), generator=generator).float() / 255 * 2 - 1


def picture(clip):
    """First frame of a clip."""
    pixels = ((clip[0] + 1) / 2 * 255).round().byte()
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy())


class Calls:
    """Keeps what a network is called with."""

    def __init__(self, network):
        self.seen = []
        self.handle = network.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, network, args, inputs):
        self.seen.append({name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})

    def __enter__(self):
        return self.seen

    def __exit__(self, *error):
        self.handle.remove()


def generate(pipe, clip, caption, **options):
    """Latents `(c f h w)` that the pipeline makes in one step, without guidance unless it is asked for."""
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", **options}
    size = {"num_frames": len(clip), "height": clip.shape[2], "width": clip.shape[3]}
    return pipe(picture(clip), caption, **size, **settings).frames[0]


@torch.no_grad()
def seen_by_pipeline(pipe, clip, caption, **options):
    with Calls(pipe.transformer) as seen:
        generate(pipe, clip, caption, **options)
    return seen


def loss(pipe, batch, seed=7, **options):
    generator = torch.Generator().manual_seed(seed)
    return WAN.training_loss(pipe, batch, generator, **{"max_weight": torch.inf, "motion_weight": 0.0, **options})


@pytest.fixture
def answer(monkeypatch):
    """Lets a transformer answer by a function of its inputs, and keeps these."""

    def replace(pipe, function):
        seen = []

        def forward(**inputs):
            seen.append(inputs)
            return type("Output", (), {"sample": function(inputs)})

        monkeypatch.setattr(pipe.transformer, "forward", forward)
        return seen

    return replace


# Sizes


@pytest.mark.parametrize(
    ("pipe", "size", "fps"),
    [
        ("2.1", (480, 832, 81), 16),
        ("2.2", (480, 832, 81), 16),
        ("2.2 low", (480, 832, 81), 16),
        ("5b", (704, 1280, 121), 24),
    ],
    indirect=["pipe"],
)
def test_own_size_and_rate(pipe, size, fps):
    assert WAN.output_size(pipe, None, None, None) == size
    assert WAN.output_size(pipe, 96, None, 5) == (96, size[1], 5)
    assert WAN.fps(pipe) == fps


@pytest.mark.parametrize(
    ("pipe", "wanted", "nearest"),
    [
        ("2.1", (480, 830), "480×832"),
        ("2.1", (24, 32), "32×32"),
        ("2.2 low", (1, 0), "16×16"),
        ("5b", (720, 1280), "704×1280"),
        ("5b", (48, 16), "64×32"),
    ],
    indirect=["pipe"],
)
def test_another_size_is_refused_with_the_nearest_valid_one(pipe, wanted, nearest):
    with pytest.raises(ValueError, match=rf"cannot make {wanted[0]}×{wanted[1]} .*nearest valid size is {nearest}\."):
        WAN.output_size(pipe, *wanted, None)
    assert WAN.output_size(pipe, *(int(side) for side in nearest.split("×")), None)


@pytest.mark.parametrize(
    ("pipe", "wanted", "nearest"),
    [
        ("2.1", 0, 1),
        ("2.1", 2, 1),
        ("2.1", 80, 81),
        ("2.2", 85, 81),
        ("2.2", 121, 81),
        ("5b", 120, 121),
        ("5b", 125, 121),
    ],
    indirect=["pipe"],
)
def test_another_number_of_frames_is_refused_with_the_nearest_valid_one(pipe, wanted, nearest):
    with pytest.raises(ValueError, match=rf"cannot make {wanted} frames.* nearest valid number is {nearest}\."):
        WAN.output_size(pipe, None, None, wanted)
    assert WAN.output_size(pipe, None, None, nearest)[2] == nearest


@torch.no_grad()
def diffusers_makes(pipe, height, width, num_frames):
    """Frames, height and width of what diffusers makes of a size."""
    blank = Image.new("RGB", (width, height), (90, 30, 200))
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"}
    return np.asarray(pipe(blank, "a", height=height, width=width, num_frames=num_frames, **options).frames).shape[1:4]


@pytest.mark.parametrize(
    ("pipe", "wanted"),
    [
        ("2.1", (32, 48, 9)),
        ("2.1", (16, 16, 81)),
        ("2.1", (48, 32, 1)),
        ("2.2", (16, 80, 5)),
        ("2.2 high", (16, 32, 13)),
        ("2.2 low", (32, 16, 13)),
        ("5b", (32, 64, 9)),
        ("5b", (32, 32, 121)),
    ],
    indirect=["pipe"],
)
def test_diffusers_makes_every_size_that_we_accept(pipe, wanted):
    height, width, num_frames = WAN.output_size(pipe, *wanted)
    assert diffusers_makes(pipe, height, width, num_frames) == (num_frames, height, width)


@pytest.mark.parametrize(
    ("pipe", "wanted"), [("2.1", (32, 32, 8)), ("2.1", (32, 32, 7)), ("5b", (48, 64, 9))], indirect=["pipe"]
)
def test_diffusers_makes_something_else_of_a_size_that_we_refuse(pipe, wanted):
    height, width, num_frames = wanted
    with pytest.raises(ValueError, match="cannot make"):
        WAN.output_size(pipe, *wanted)
    assert diffusers_makes(pipe, *wanted) != (num_frames, height, width)


def test_diffusers_refuses_sides_that_are_no_multiples_of_16(monkeypatch):
    """Also with a VAE whose latents of patches would allow it."""
    pipe = made("2.1")
    monkeypatch.setattr(pipe, "vae_scale_factor_spatial", 4)
    with pytest.raises(ValueError, match="cannot make 24×32"):
        WAN.output_size(pipe, 24, 32, 9)
    with pytest.raises(ValueError, match="divisible by 16"):
        diffusers_makes(pipe, 24, 32, 9)


# Sites


@pytest.mark.parametrize(("pipe", "tokens"), [("2.1", 3 * 2 * 4), ("5b", 3 * 1 * 2)], indirect=["pipe"])
def test_motion_is_injected_where_only_tokens_of_the_video_are(pipe, tokens):
    sites = WAN.sites(pipe.transformer)
    assert sites == ["blocks.0.attn2.to_out.0", "blocks.1.attn2.to_out.0"]
    shapes = []
    handles = [
        pipe.transformer.get_submodule(site).register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
        for site in sites
    ]
    seen_by_pipeline(pipe, random_clips()[0], "a dog")
    for handle in handles:
        handle.remove()
    assert [shape[1] for shape in shapes] == [tokens] * 2


def test_the_networks_of_a_pipeline():
    assert WAN.denoisers(made("2.2")) == [made("2.2").transformer, made("2.2").transformer_2]
    assert WAN.denoisers(made("2.2 low")) == [made("2.2 low").transformer_2]
    assert WAN.denoisers(made("2.2 high")) == [made("2.2 high").transformer]


def test_a_batch_of_pictures_is_beyond_diffusers():
    """Why `takes_batches` is false: as many latents come out as pictures times prompts."""
    pipe, clips = made("2.2"), random_clips()
    assert not WAN.takes_batches
    with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        pipe((clips[:, 0] + 1) / 2, CAPTIONS, height=SIZE, width=2 * SIZE, num_frames=5, num_inference_steps=1)


# What training runs once


@each("2.1", "2.2", "2.2 high", "5b")
def test_clips_are_encoded_to_what_the_pipeline_gives_the_transformer(pipe):
    clips = random_clips()
    encoded = WAN.encode(pipe, clips, CAPTIONS)
    latents = torch.randn(1, Z_DIM, *encoded["latents"].transpose(1, 2).shape[2:])
    for index, (clip, caption) in enumerate(zip(clips, CAPTIONS, strict=True)):
        (seen,) = seen_by_pipeline(pipe, clip, caption, latents=latents)
        first, rest = seen["hidden_states"][:, :, :1], seen["hidden_states"][:, Z_DIM:]
        given = first if pipe.config.expand_timesteps else rest
        torch.testing.assert_close(encoded["image_latents"][index], given[0])
        assert torch.equal(encoded["prompt_embeds"][index], seen["encoder_hidden_states"][0])
        assert ("image_embeds" in encoded) == ("encoder_hidden_states_image" in seen) == (pipe is made("2.1"))
        if "image_embeds" in encoded:
            torch.testing.assert_close(encoded["image_embeds"][index], seen["encoder_hidden_states_image"][0])


@each("2.1", "2.2", "5b")
def test_latents_are_normalised_as_the_condition_is(pipe):
    """Of a clip that goes on in grey, the latents of the 14B models' condition are the clip's own."""
    clips = random_clips()
    clips[:, 1:] = 0
    encoded = WAN.encode(pipe, clips, CAPTIONS)
    latents, image = rearrange(encoded["latents"], "b f c h w -> b c f h w"), encoded["image_latents"]
    (seen,) = seen_by_pipeline(pipe, clips[0], CAPTIONS[0])
    if pipe.config.expand_timesteps:
        torch.testing.assert_close(latents[0, :, :1], seen["hidden_states"][0, :, :1])
    else:
        torch.testing.assert_close(latents[0], seen["hidden_states"][0, -Z_DIM:])
        assert image[:, :4].sum() == image[:, :4, 0].numel()
    assert latents.std(dim=(2, 3, 4)).min() > 1e-3  # not all the same, so that the comparison means something


@each("2.1", "5b")
def test_latents_are_those_that_the_pipeline_decodes(pipe, monkeypatch):
    """The way back, by the pipeline itself: a step that changes nothing ends at the VAE's own reconstruction."""
    clips = random_clips()
    latents = rearrange(WAN.encode(pipe, clips, CAPTIONS)["latents"], "b f c h w -> b c f h w")
    monkeypatch.setattr(pipe.transformer, "forward", lambda **_: (torch.zeros_like(latents[:1]),))
    frames = generate(pipe, clips[0], "a", latents=latents[:1], output_type="pt")
    with torch.no_grad():
        pixels = rearrange(clips[:1], "b t c h w -> b c t h w")
        expected = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample[0]
    torch.testing.assert_close(frames, rearrange(expected / 2 + 0.5, "c t h w -> t c h w").clamp(0, 1))


@each("2.1", "5b")
def test_no_prompt_is_what_guidance_takes_for_none(pipe):
    _, unconditional = seen_by_pipeline(pipe, random_clips()[0], "a dog", guidance_scale=5.0)
    empty = WAN.empty_prompt(pipe)
    assert torch.equal(empty, unconditional["encoder_hidden_states"])
    assert empty.any()
    assert not torch.equal(empty, WAN.embed_prompts(pipe, ["a dog"]))


def test_frames_that_the_autoencoder_would_drop_are_refused():
    clips = random_clips()
    with pytest.raises(ValueError, match=r"cannot make 8 frames; the nearest valid number is 5\."):
        WAN.encode(made("2.1"), clips[:, :8], CAPTIONS)


# The loss


def drawn(latents, seed=7):
    """Shares of noise and noise that a loss draws first."""
    generator = torch.Generator().manual_seed(seed)
    share = 1 - torch.rand(len(latents), generator=generator)
    return share, torch.randn(latents.shape, generator=generator)


@pytest.fixture
def batch(pipe):
    return WAN.encode(pipe, random_clips(), CAPTIONS)


@each("2.1")
def test_the_loss_is_the_plain_error_of_the_velocity(pipe, batch, answer):
    latents = batch["latents"]
    sigma, noise = drawn(latents)
    predicted = torch.randn_like(latents)
    seen = answer(pipe, lambda _: predicted.transpose(1, 2))
    expected = (predicted - (noise - latents)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss(pipe, batch), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0]["timestep"], 1000 * sigma)
    noisy = (1 - sigma).view(-1, 1, 1, 1, 1) * latents + sigma.view(-1, 1, 1, 1, 1) * noise
    torch.testing.assert_close(seen[0]["hidden_states"][:, :Z_DIM], noisy.transpose(1, 2))
    # With the weight 1/σ² bounded by 1, the error of the clean latents is left: σ² times that of the velocity.
    torch.testing.assert_close(loss(pipe, batch, max_weight=1.0), sigma**2 * expected, rtol=1e-4, atol=1e-5)
    assert sigma.max() < 1
    answer(pipe, lambda _: (noise - latents).transpose(1, 2))
    assert loss(pipe, batch).max() < 1e-6


@each("5b")
def test_the_given_frame_does_not_count(pipe, batch, answer):
    latents = batch["latents"]
    _, noise = drawn(latents)
    predicted = torch.randn_like(latents)
    answer(pipe, lambda _: predicted.transpose(1, 2))
    expected = (predicted - (noise - latents))[:, 1:].square().flatten(1).mean(1)
    torch.testing.assert_close(loss(pipe, batch), expected, rtol=1e-4, atol=1e-5)
    weighted = loss(pipe, batch, motion_weight=2.0)
    predicted[:, 0] += 5
    assert torch.equal(loss(pipe, batch, motion_weight=2.0), weighted)
    predicted[:, 1] += 5
    assert (loss(pipe, batch, motion_weight=2.0) > weighted).all()
    with pytest.raises(ValueError, match="5 frames or more"):
        loss(pipe, {**batch, "latents": latents[:, :1]})


@each(*TRAINED)
def test_a_loss_is_a_step_of_the_pipeline_to_the_end(pipe, batch, monkeypatch):
    """From the same noisy latents the transformer sees the same, and the scheduler ends at the same clean latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    with torch.no_grad(), Calls(pipe.transformer) as seen:
        found = loss(pipe, batch, timestep_shift=3.0)
    (ours,) = seen
    _, noise = drawn(batch["latents"])
    for index, (clip, caption) in enumerate(zip(random_clips(), CAPTIONS, strict=True)):
        sigma = ours["timestep"][index].max() / 1000
        latents = batch["latents"][index]
        noisy = ((1 - sigma) * latents + sigma * noise[index]).transpose(0, 1)[None]
        scheduler = FlowMatchEulerDiscreteScheduler()
        set_timesteps = scheduler.set_timesteps
        monkeypatch.setattr(
            scheduler, "set_timesteps", lambda *_, make=set_timesteps, at=sigma, **__: make(sigmas=[at.item()])
        )
        monkeypatch.setattr(pipe, "scheduler", scheduler)
        with torch.no_grad(), Calls(pipe.transformer) as calls:
            clean = generate(pipe, clip, caption, latents=noisy).transpose(0, 1)
        (theirs,) = calls
        assert theirs.keys() == ours.keys()
        for name, values in theirs.items():
            torch.testing.assert_close(ours[name][index : index + 1], values, rtol=1e-5, atol=1e-5)
        predicted = slice(1 if pipe.config.expand_timesteps else 0, None)
        expected = (clean - latents)[predicted].square().mean() / sigma**2
        torch.testing.assert_close(found[index], expected, rtol=1e-3, atol=1e-5)


def many(batch, count=1000):
    return {name: values[:1].expand(count, *values.shape[1:]) for name, values in batch.items()}


@each("2.1")
def test_a_shift_of_timesteps_makes_high_noise_more_frequent(pipe, batch, answer):
    """Stable Diffusion 3, section 5.3.2: with s = 4 half of the draws lie above 0.8, with s = 1 a fifth."""
    seen = answer(pipe, lambda inputs: inputs["hidden_states"][:, :Z_DIM])
    for shift in (1.0, 4.0):
        loss(pipe, many(batch), timestep_shift=shift)
    above = [(inputs["timestep"] > 800).float().mean().item() for inputs in seen]
    assert above == pytest.approx([0.2, 0.5], abs=0.04)
    assert min(inputs["timestep"].min() for inputs in seen) < 20


@each("2.2")
def test_the_high_noise_transformer_is_trained_where_the_pipeline_uses_it(pipe, batch, answer, monkeypatch):
    seen = answer(pipe, lambda inputs: inputs["hidden_states"][:, :Z_DIM])
    monkeypatch.setattr(pipe.transformer_2, "forward", None)
    for shift in (1.0, 4.0):
        loss(pipe, many(batch), timestep_shift=shift)
    plain, shifted = (inputs["timestep"] for inputs in seen)
    assert 900 < plain.min() < 901
    assert 999 < plain.max() <= 1000
    assert (plain > 950).float().mean().item() == pytest.approx(0.5, abs=0.04)
    # With s = 4, σ = 0.9 is the share 0.9/(4 - 3·0.9) = 0.6923 and σ = 0.95 is 0.8261; so much of the rest is above.
    assert shifted.min() > 900
    assert (shifted > 950).float().mean().item() == pytest.approx((1 - 0.8261) / (1 - 0.6923), abs=0.04)


def test_without_the_trained_transformer_there_is_no_loss():
    pipe = made("2.2 low")
    batch = WAN.encode(pipe, random_clips(), CAPTIONS)
    with pytest.raises(ValueError, match="high-noise transformer"):
        loss(pipe, batch)


@each(*TRAINED)
def test_gradients_reach_the_injection_alone(pipe, batch):
    pipe.transformer.requires_grad_(False)
    injection = AttentionInjection.for_model(pipe.transformer, token_dim=8)
    for adapter in injection.sites.values():
        nn.init.normal_(adapter.to_v.weight)
    injection.attach(pipe.transformer)
    with injection.condition(torch.randn(2, 3, 8)):
        loss(pipe, batch).sum().backward()
    injection.detach()
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())
    gradients = [parameter.grad for parameter in injection.parameters()]
    assert len(gradients) == 2 * 3
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", TRAINED)
def test_stored_clips_train_without_the_frozen_parts(kind, tmp_path):
    """What is stored is enough, and gives the loss that the whole pipeline gives."""
    from torch.utils.data import default_collate

    from motionrag.training import EncodedClips
    from motionrag.training.encoded import load_pipeline
    from tests.training.parts import Squares

    folder, clips = str(tmp_path / "wan"), Squares(2)
    made(kind).save_pretrained(folder)
    stored = EncodedClips(clips, folder=str(tmp_path / "cache"), pipeline=folder, precision="float32")
    batch = default_collate([stored[0], stored[1]])
    assert batch["empty_prompt_embeds"].shape == batch["prompt_embeds"].shape
    backbone, pipe = load_pipeline(folder, frozen=False)
    assert backbone is WAN
    assert all(getattr(pipe, name) is None for name in WAN.frozen_parts)
    with torch.no_grad():
        expected = loss(made(kind), WAN.encode(made(kind), clips.videos, clips.texts))
        torch.testing.assert_close(loss(pipe, batch), expected, rtol=1e-2, atol=1e-3)  # stored in half precision
