"""LTX against diffusers' own pipeline: sizes, what is encoded, what the transformer sees in training, and the loss."""

import inspect
import math

import pytest
import torch
from einops import rearrange
from torch import nn
from torch.utils.data import default_collate

from motionrag.adapters import AttentionInjection
from motionrag.backbones import BACKBONES
from motionrag.training import EncodedClips
from motionrag.training.diffusion import replace_clips
from motionrag.training.encoded import load_pipeline
from tests.backbones.tiny_ltx import FRAMES, HEIGHT, NUM_TEXT, WIDTH, LTXClips, ltx_pipeline

LTX = BACKBONES["ltx"]
SIZE = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}


class Seen:
    """Stands in for the transformer's forward: keeps its inputs, and its output or an answer in place of it."""

    def __init__(self, transformer, answer=None):
        self.forward, self.answer, self.inputs, self.outputs = transformer.forward, answer, [], []

    def __call__(self, **inputs):
        self.inputs.append(inputs)
        if self.answer is None:
            output = self.forward(**inputs)
            self.outputs.append(output[0])
            return output

        class Output:
            sample = self.answer(inputs)

        return Output


@pytest.fixture(scope="module")
def pipe():
    return ltx_pipeline()


@pytest.fixture(scope="module")
def batch(pipe):
    clips = LTXClips()
    return LTX.encode(pipe, clips.videos, clips.texts)


@pytest.fixture
def watch(pipe, monkeypatch):
    def start(answer=None):
        seen = Seen(pipe.transformer, answer)
        monkeypatch.setattr(pipe.transformer, "forward", seen)
        return seen

    return start


@pytest.fixture
def no_draw(monkeypatch):
    """The pipeline draws the image's latents; here it takes the mean of what it draws from."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)


def loss(pipe, batch, **options):
    generator = torch.Generator().manual_seed(7)
    return LTX.training_loss(pipe, batch, generator, **{"max_weight": math.inf, "motion_weight": 0.0, **options})


def images_of(clips):
    """First frames in [0, 1], as the pipeline takes them."""
    return (clips.videos[:, 0] + 1) / 2


def generate(pipe, image, prompt=None, **options):
    defaults = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt", **SIZE, **LTX.call_options(pipe)}
    return pipe(image=image, prompt=prompt, **{**defaults, **options}).frames


def as_video(tokens):
    return rearrange(tokens, "b (f h w) c -> b f c h w", h=HEIGHT // 32, w=WIDTH // 32)


def sigma_of(inputs):
    """Of each clip, from the timesteps of its tokens."""
    return inputs["timestep"].amax(dim=1) / 1000


# Sizes


def test_the_default_size_is_diffusers_own(pipe):
    default = inspect.signature(type(pipe).__call__).parameters
    assert LTX.output_size(pipe, None, None, None) == (default["height"].default, default["width"].default, 121)
    assert LTX.output_size(pipe, None, 64, 257) == (512, 64, 257)


@pytest.mark.parametrize(("wanted", "nearest"), [((500, 704), "512×704"), ((64, 100), "64×96"), ((1, 0), "32×32")])
def test_another_size_is_refused_with_the_nearest_valid_one(pipe, wanted, nearest):
    with pytest.raises(ValueError, match=rf"LTX model cannot make {wanted[0]}×{wanted[1]} .*valid size is {nearest}\."):
        LTX.output_size(pipe, *wanted, None)
    with pytest.raises(ValueError, match="divisible by 32"):
        generate(pipe, torch.rand(1, 3, 32, 32), "a ball", height=wanted[0], width=wanted[1] or 1)


@pytest.mark.parametrize(("wanted", "nearest"), [(0, 1), (8, 9), (16, 17), (20, 17), (120, 121)])
def test_another_number_of_frames_is_refused_with_the_nearest_valid_one(pipe, wanted, nearest):
    with pytest.raises(ValueError, match=rf"cannot make {wanted} frames; the nearest valid number is {nearest}\."):
        LTX.output_size(pipe, None, None, wanted)
    assert LTX.output_size(pipe, None, None, nearest)[2] == nearest


@pytest.mark.parametrize("wanted", [258, 265, 1000])
def test_more_frames_than_the_model_knows_are_refused(pipe, wanted):
    with pytest.raises(ValueError, match=r"trained on 257 at most; the nearest valid number is 257\."):
        LTX.output_size(pipe, None, None, wanted)


@pytest.mark.parametrize("wanted", [(32, 64, 1), (64, 32, 9), (96, 32, 25), (32, 32, 257)])
def test_diffusers_makes_every_size_that_we_accept(pipe, wanted):
    height, width, num_frames = LTX.output_size(pipe, *wanted)
    video = generate(pipe, torch.rand(1, 3, *wanted[:2]), "a ball", height=height, width=width, num_frames=num_frames)
    assert video.shape == (1, num_frames, 3, height, width)


@pytest.mark.parametrize("num_frames", [8, 16, 20])
def test_diffusers_makes_another_number_of_frames_than_a_refused_one(pipe, num_frames):
    video = generate(pipe, torch.rand(1, 3, HEIGHT, WIDTH), "a ball", num_frames=num_frames)
    assert video.shape[1] != num_frames


# Calls


def test_a_batch_of_different_images_gives_the_videos_of_single_calls(pipe):
    clips = LTXClips()
    assert LTX.takes_batches
    options = {"num_inference_steps": 3, "guidance_scale": LTX.guidance_scale}

    def seeds():
        return [torch.Generator().manual_seed(index) for index in range(len(clips))]

    together = generate(pipe, images_of(clips), list(clips.texts), generator=seeds(), **options)
    for index, generator in enumerate(seeds()):
        image = images_of(clips)[index : index + 1]
        alone = generate(pipe, image, clips.texts[index], generator=generator, **options)
        torch.testing.assert_close(together[index], alone[0], rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_calls_run_at_our_frame_rate_and_the_tokenizers_length(pipe, watch):
    seen = watch()
    generate(pipe, torch.rand(1, 3, HEIGHT, WIDTH), "a red ball under the blue box")
    assert seen.inputs[0]["rope_interpolation_scale"] == (8 / 24, 32, 32)
    assert seen.inputs[0]["encoder_hidden_states"].shape[1] == NUM_TEXT
    assert LTX.fps(pipe) == 24


@pytest.mark.parametrize(("own", "taken"), [(64, 64), (128, 128), (512, 128), (int(1e30), 128)])
def test_prompts_are_no_longer_than_diffusers_default(pipe, monkeypatch, own, taken):
    monkeypatch.setattr(pipe, "tokenizer_max_length", own)
    assert LTX.call_options(pipe)["max_sequence_length"] == taken
    assert LTX.empty_prompt(pipe).shape == (1, taken, 8)


# What is encoded


def test_encode_gives_what_the_pipeline_builds(pipe, batch, watch, no_draw):
    clips, seen = LTXClips(), watch()
    generate(pipe, images_of(clips), list(clips.texts))
    inputs = seen.inputs[0]
    mask = inputs["encoder_attention_mask"]
    assert torch.equal(batch["prompt_attention_mask"], mask)
    assert mask.sum(dim=1).tolist() == [4, 2, 3]  # words and the end of the text
    assert torch.equal(batch["prompt_embeds"][mask], inputs["encoder_hidden_states"][mask])
    assert not batch["prompt_embeds"][~mask].any()
    first = as_video(inputs["hidden_states"])[:, 0]
    torch.testing.assert_close(batch["image_latents"], first, rtol=1e-4, atol=1e-5)
    for index in range(len(clips)):
        assert torch.equal(LTX.embed_prompts(pipe, [clips.texts[index]])[0], batch["prompt_embeds"][index])


def test_latents_are_normalised_and_decode_to_what_the_autoencoder_makes_of_the_clip(pipe, batch):
    pixels = rearrange(LTXClips().videos, "b t c h w -> b c t h w")
    raw = rearrange(pipe.vae.encode(pixels).latent_dist.mean, "b c f h w -> b f c h w")
    assert batch["latents"].shape == (3, 3, 4, HEIGHT // 32, WIDTH // 32)
    for channel, (mean, std) in enumerate(zip((0.3, -0.2, 0.1, 0.0), (0.5, 1.5, 0.8, 1.2), strict=True)):
        torch.testing.assert_close(batch["latents"][:, :, channel], (raw[:, :, channel] - mean) / std)
    # The pipeline decodes them to what the autoencoder makes of the clip: with no step, it leaves latents alone.
    tokens = rearrange(batch["latents"], "b f c h w -> b (f h w) c")
    still = torch.zeros_like(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.transformer, "forward", lambda **_: (still,))
        video = generate(pipe, None, list(LTXClips.texts), latents=tokens)
    decoded = pipe.vae.decode(rearrange(raw, "b f c h w -> b c f h w")).sample
    expected = (rearrange(decoded, "b c t h w -> b t c h w") / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(video, expected, rtol=1e-4, atol=1e-4)


def test_the_first_latent_frame_is_that_of_the_image(batch):
    """The autoencoder is causal: training and generation start from the same latents."""
    torch.testing.assert_close(batch["latents"][:, 0], batch["image_latents"])


# What the transformer sees in training


def at_one_step(pipe, monkeypatch, sigma):
    """Let the pipeline run one step, from this sigma to 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)

    def set_timesteps(num_inference_steps=None, device=None, sigmas=None, mu=None):
        scheduler.sigmas = torch.stack([sigma, sigma * 0])
        scheduler.timesteps = sigma[None] * scheduler.config.num_train_timesteps
        scheduler.num_inference_steps = 1

    monkeypatch.setattr(scheduler, "set_timesteps", set_timesteps)
    monkeypatch.setattr(pipe, "scheduler", scheduler)


@torch.no_grad()
def test_training_shows_the_transformer_what_the_pipeline_would(pipe, batch, watch, monkeypatch):
    clips, seen = LTXClips(), watch()
    found = loss(pipe, batch, max_weight=4.0)
    trained, trained_velocity = seen.inputs[0], seen.outputs[0]
    sigmas = sigma_of(trained)
    assert sigmas.unique().numel() == len(clips)
    for index, sigma in enumerate(sigmas):
        at_one_step(pipe, monkeypatch, sigma)
        tokens = trained["hidden_states"][index : index + 1]
        after = generate(pipe, None, clips.texts[index], latents=tokens, output_type="latent")
        called, called_velocity = seen.inputs[-1], seen.outputs[-1]
        mask = called["encoder_attention_mask"]
        assert torch.equal(trained["encoder_attention_mask"][index], mask[0])
        assert torch.equal(trained["encoder_hidden_states"][index][mask[0]], called["encoder_hidden_states"][mask])
        assert torch.equal(trained["hidden_states"][index], called["hidden_states"][0])
        torch.testing.assert_close(trained["timestep"][index], called["timestep"][0])
        for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
            assert trained[name] == called[name]
        # Zeros in place of padding make no difference.
        torch.testing.assert_close(trained_velocity[index], called_velocity[0], rtol=1e-4, atol=1e-5)
        # From sigma to 0 the pipeline steps to the clean latents that the loss judges.
        error = (as_video(after)[0, 1:] - batch["latents"][index, 1:]).square().mean()
        weight = min(1 / sigma.item() ** 2, 4.0)
        torch.testing.assert_close(found[index], weight * error, rtol=1e-4, atol=1e-6)


def test_the_image_is_clean_and_at_timestep_0(pipe, batch, watch):
    image = torch.randn_like(batch["image_latents"])
    seen = watch(lambda inputs: torch.ones_like(inputs["hidden_states"]))
    # The same answer gives the same loss: what is said of the image does not count.
    assert torch.equal(loss(pipe, {**batch, "image_latents": image}), loss(pipe, batch))
    inputs = seen.inputs[0]
    assert torch.equal(as_video(inputs["hidden_states"])[:, 0], image)
    times = rearrange(inputs["timestep"], "b (f n) -> b f n", f=3)
    assert not times[:, 0].any()
    assert (times[:, 1:] == times[:, 1:2, :1]).all()
    assert (times[:, 1:] > 0).all()


def test_a_dropped_prompt_is_the_empty_one_of_the_pipeline(pipe, tmp_path, watch):
    """Stored in half precision, replaced as the stages do, and seen with the mask of the empty prompt."""
    pipe.save_pretrained(tmp_path / "ltx")
    clips = EncodedClips(
        LTXClips(), folder=str(tmp_path / "cache"), pipeline=str(tmp_path / "ltx"), precision="float32"
    )
    stored = default_collate([clips[index] for index in range(3)])
    dropped = torch.tensor([False, True, False])
    prompts = replace_clips(dropped, stored["empty_prompt_embeds"], stored["prompt_embeds"])
    texts = [*LTXClips.texts[:1], "", *LTXClips.texts[2:]]
    embeds, mask, _, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=NUM_TEXT)
    seen = watch()
    loss(pipe, {**stored, "prompt_embeds": prompts})
    inputs = seen.inputs[0]
    assert inputs["encoder_attention_mask"].sum(dim=1).tolist() == [4, 1, 3]
    assert torch.equal(inputs["encoder_attention_mask"], mask)
    torch.testing.assert_close(inputs["encoder_hidden_states"][mask], embeds[mask], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_training_needs_none_of_the_frozen_parts(pipe, batch, tmp_path):
    pipe.save_pretrained(tmp_path / "ltx")
    backbone, bare = load_pipeline(str(tmp_path / "ltx"), frozen=False)
    assert backbone is LTX
    assert [getattr(bare, name) for name in LTX.frozen_parts] == [None, None, None]
    torch.testing.assert_close(loss(bare, batch), loss(pipe, batch))


def test_weights_that_name_the_pipeline_of_text_are_loaded_too(pipe, tmp_path):
    from diffusers import LTXPipeline

    LTXPipeline(**pipe.components).save_pretrained(tmp_path / "ltx")
    for frozen in (True, False):
        backbone, loaded = load_pipeline(str(tmp_path / "ltx"), frozen=frozen)
        assert backbone is LTX
        assert type(loaded) is type(pipe)


# The loss


def test_without_a_bound_the_loss_is_the_plain_error_of_v(pipe, batch, watch):
    latents = batch["latents"]
    predicted = torch.randn(3, latents[0, :, 0].numel(), 4)
    seen = watch(lambda _: predicted)
    found = loss(pipe, batch)
    sigma = rearrange(sigma_of(seen.inputs[0]), "b -> b 1 1 1 1")
    noise = (as_video(seen.inputs[0]["hidden_states"]) - (1 - sigma) * latents) / sigma
    wrong = (as_video(predicted) - (noise - latents))[:, 1:]
    torch.testing.assert_close(found, wrong.square().flatten(1).mean(1), rtol=1e-3, atol=1e-4)
    assert noise[:, 1:].std() == pytest.approx(1, abs=0.25)
    watch(lambda _: rearrange(noise - latents, "b f c h w -> b (f h w) c"))
    assert loss(pipe, batch).max() < 1e-6


def test_the_loss_at_a_known_sigma(pipe, watch, monkeypatch):
    """Half noise: v = noise - latents = 2 - 1, so a prediction of 4 is wrong by 3, and clean latents by 1.5."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 0.5))
    monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.full(size[0], 2.0))
    batch = {
        "latents": torch.ones(1, 3, 4, 2, 3),
        "image_latents": torch.ones(1, 4, 2, 3),
        "prompt_embeds": torch.ones(1, NUM_TEXT, 8),
    }
    seen = watch(lambda inputs: torch.full_like(inputs["hidden_states"], 4.0))
    assert loss(pipe, batch).item() == pytest.approx(9.0)
    assert loss(pipe, batch, max_weight=3.0).item() == pytest.approx(3 * 1.5**2)
    assert as_video(seen.inputs[0]["hidden_states"])[0, :, 0, 0, 0].tolist() == [1.0, 1.5, 1.5]
    assert seen.inputs[0]["timestep"][0].tolist() == [0.0] * 6 + [500.0] * 12
    # A shift of 3 takes 0.5 to 0.75: clean latents are wrong by 0.75 · 3, weighted by 1/0.75².
    assert loss(pipe, batch, timestep_shift=3.0).item() == pytest.approx(9.0)
    assert loss(pipe, batch, timestep_shift=3.0, max_weight=1.0).item() == pytest.approx(2.25**2)
    assert seen.inputs[-1]["timestep"].max() == 750


def test_what_moves_counts_more(pipe, batch, watch):
    """Weighted by hand: of three latent frames the first is given, the second still, the third far away."""
    latents = batch["latents"][:1, :1].repeat(1, 3, 1, 1, 1)
    latents[:, 2] += 100  # tanh of it is 1
    moving = {**batch, "latents": latents, "image_latents": latents[:, 0], "prompt_embeds": batch["prompt_embeds"][:1]}
    seen = watch(lambda inputs: torch.zeros_like(inputs["hidden_states"]))
    loss(pipe, moving)
    sigma = sigma_of(seen.inputs[0])
    velocity = (as_video(seen.inputs[0]["hidden_states"]) - latents) / sigma
    errors = {}
    for frame in (1, 2):
        wrong = velocity.clone()
        wrong[:, frame] += 1
        watch(lambda _, wrong=wrong: rearrange(wrong, "b f c h w -> b (f h w) c"))
        errors[frame] = [loss(pipe, moving, motion_weight=weight).item() for weight in (0.0, 4.0)]
    # Half of the frames that count are wrong by 1; weights 1, 1 and 5 have a mean of 7/3.
    assert errors[1] == pytest.approx([0.5, 0.5 / (7 / 3)], rel=1e-3)
    assert errors[2] == pytest.approx([0.5, 0.5 * 5 / (7 / 3)], rel=1e-3)


def test_a_shift_of_timesteps_makes_high_noise_more_frequent(pipe, batch, watch):
    """Stable Diffusion 3, section 5.3.2: with s = 4 half of the draws lie above t = 0.8, with s = 1 a fifth."""
    many = {name: values[:1].expand(2000, *values.shape[1:]) for name, values in batch.items()}
    seen = watch(lambda inputs: torch.zeros_like(inputs["hidden_states"]))
    above = {}
    for shift in (1.0, 4.0):
        assert loss(pipe, many, timestep_shift=shift, max_weight=1.0).isfinite().all()
        sigma = sigma_of(seen.inputs[-1])
        above[shift] = (sigma >= 0.8).float().mean().item()
        assert sigma.min() > 0
        assert sigma.max() <= 1
    assert above == pytest.approx({1.0: 0.2, 4.0: 0.5}, abs=0.03)


def test_a_single_frame_is_refused(pipe, batch):
    with pytest.raises(ValueError, match="train on 9 frames or more"):
        loss(pipe, {**batch, "latents": batch["latents"][:, :1]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_injection_alone(batch, dtype):
    transformer = ltx_pipeline().transformer.requires_grad_(False).to(dtype)
    pipe = ltx_pipeline()
    pipe.register_modules(transformer=transformer)
    injection = AttentionInjection.for_model(transformer, token_dim=8)
    assert injection.site_names == [f"transformer_blocks.{index}.attn2.to_out.0" for index in range(2)]
    for adapter in injection.sites.values():
        nn.init.normal_(adapter.to_v.weight)
    injection.attach(transformer)
    tokens = torch.randn(3, 5, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16), injection.condition(tokens):
        loss(pipe, batch, max_weight=1e4).mean().backward()
    assert all(parameter.grad is None for parameter in transformer.parameters())
    for name, parameter in injection.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
