"""The diffusion losses against diffusers' own schedulers, and where their gradients go."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from motionrag.adapters import AttentionInjection
from motionrag.backbones import BACKBONES
from motionrag.training import BackboneTraining, EncodedClips, InjectionTraining
from motionrag.training.encoded import load_pipeline
from tests.backbones.test_cogvideox import pipeline as cogvideox_pipeline
from tests.training.parts import FRAMES, SIZE, Squares, pipeline, svd_pipeline

COGVIDEOX, SVD = BACKBONES["cogvideox"], BACKBONES["svd"]


class Answer:
    """Stands in for a denoiser's forward: answers by a function of its inputs, and keeps them."""

    def __init__(self, answer):
        self.answer, self.inputs = answer, None

    def __call__(self, sample=None, timestep=None, *, hidden_states=None, **others):
        self.inputs = {**others, "sample": hidden_states if sample is None else sample}
        self.inputs["timestep"] = others.get("timestep", timestep) if timestep is None else timestep

        class Output:
            sample = self.answer(self.inputs)

        return Output


def noise_of(latents, generator, num_train_timesteps=1000):
    steps = torch.randint(num_train_timesteps, latents.shape[:1], generator=generator)
    return steps, torch.randn(latents.shape, generator=generator)


@pytest.fixture(scope="module")
def cog():
    return pipeline()


@pytest.fixture(scope="module")
def cog_batch(cog):
    clips = Squares(3)
    return COGVIDEOX.encode(cog, clips.videos, clips.texts)


@pytest.fixture
def svd():
    return svd_pipeline()


@pytest.fixture
def svd_batch(svd):
    clips = Squares(2)
    return SVD.encode(svd, clips.videos[:, :3], clips.texts)


def loss(backbone, pipe, batch, **options):
    generator = torch.Generator().manual_seed(7)
    return backbone.training_loss(pipe, batch, generator, **{"max_weight": 1e9, "motion_weight": 0.0, **options})


# CogVideoX


def test_the_weighted_error_of_a_model_that_predicts_v_is_the_plain_error_of_v(cog, cog_batch, monkeypatch):
    latents = cog_batch["latents"]
    steps, noise = noise_of(latents, torch.Generator().manual_seed(7))
    predicted = torch.randn_like(latents)
    monkeypatch.setattr(cog.transformer, "forward", Answer(lambda _: predicted))
    velocity = cog.scheduler.get_velocity(latents, noise, steps)
    expected = (predicted - velocity).square().flatten(1).mean(1)
    torch.testing.assert_close(loss(COGVIDEOX, cog, cog_batch), expected, rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(cog.transformer, "forward", Answer(lambda _: velocity))
    assert loss(COGVIDEOX, cog, cog_batch).max() < 1e-6


def test_the_backbone_sees_noisy_latents_and_the_image_in_front(cog, cog_batch, monkeypatch):
    latents = cog_batch["latents"]
    steps, noise = noise_of(latents, torch.Generator().manual_seed(7))
    answer = Answer(lambda _: latents)
    monkeypatch.setattr(cog.transformer, "forward", answer)
    loss(COGVIDEOX, cog, cog_batch)
    noisy, image = answer.inputs["sample"].chunk(2, dim=2)
    torch.testing.assert_close(noisy, cog.scheduler.add_noise(latents, noise, steps))
    assert torch.equal(answer.inputs["timestep"], steps)
    assert torch.equal(image[:, 0], cog_batch["image_latents"])
    assert not image[:, 1:].any()


def test_a_shift_of_timesteps_makes_high_noise_more_frequent(cog, cog_batch, monkeypatch):
    """Stable Diffusion 3, section 5.3.2: with s = 4 half of the draws lie above t = 0.8, with s = 1 a fifth."""
    batch = {name: values[:1].expand(400, *values.shape[1:]) for name, values in cog_batch.items()}
    answer = Answer(lambda inputs: inputs["sample"][:, :, :4])
    monkeypatch.setattr(cog.transformer, "forward", answer)
    above = {}
    for shift in (1.0, 4.0):
        loss(COGVIDEOX, cog, batch, timestep_shift=shift)
        above[shift] = (answer.inputs["timestep"] >= 800).float().mean().item()
        assert answer.inputs["timestep"].max() < 1000
    assert above == pytest.approx({1.0: 0.2, 4.0: 0.5}, abs=0.07)


def test_a_model_that_predicts_the_sample_is_weighted_by_the_noise(cog, cog_batch, monkeypatch):
    from diffusers import CogVideoXDDIMScheduler

    latents = cog_batch["latents"]
    steps, _ = noise_of(latents, torch.Generator().manual_seed(7))
    monkeypatch.setattr(cog, "scheduler", CogVideoXDDIMScheduler(prediction_type="sample"))
    monkeypatch.setattr(cog.transformer, "forward", Answer(lambda _: latents + 0.5))
    weight = 1 / (1 - cog.scheduler.alphas_cumprod[steps].float())
    torch.testing.assert_close(loss(COGVIDEOX, cog, cog_batch), weight * 0.25)
    torch.testing.assert_close(loss(COGVIDEOX, cog, cog_batch, max_weight=1.5), weight.clamp(max=1.5) * 0.25)


def test_what_moves_counts_more(cog, cog_batch, monkeypatch):
    latents = cog_batch["latents"].clone()
    latents[:, 1:] = latents[:, :1]
    latents[:, -1, :, :4] += 3
    batch = {**cog_batch, "latents": latents}
    steps, noise = noise_of(latents, torch.Generator().manual_seed(7))
    velocity = cog.scheduler.get_velocity(latents, noise, steps)
    wrong = {name: velocity.clone() for name in ("still", "moving")}
    wrong["still"][:, -1, :, 4:] += 1
    wrong["moving"][:, -1, :, :4] += 1
    errors = {}
    for name, predicted in wrong.items():
        monkeypatch.setattr(cog.transformer, "forward", Answer(lambda _, predicted=predicted: predicted))
        errors[name] = loss(COGVIDEOX, cog, batch), loss(COGVIDEOX, cog, batch, motion_weight=4.0)
    torch.testing.assert_close(errors["still"][0], errors["moving"][0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(errors["moving"][1] / errors["still"][1], torch.full((3,), 5.0), rtol=0.02, atol=0)


def test_an_odd_number_of_latent_frames_is_padded_in_front_for_cogvideox_1_5(monkeypatch):
    from diffusers import CogVideoXDDIMScheduler

    pipe = cogvideox_pipeline(patch_size_t=2)
    pipe.register_modules(scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction"))
    forward, seen = pipe.transformer.forward, {}

    def keep(**inputs):
        seen.update(inputs)
        return forward(**inputs)

    monkeypatch.setattr(pipe.transformer, "forward", keep)
    batch = {
        "latents": torch.randn(2, 3, 4, 8, 12),
        "image_latents": torch.randn(2, 4, 8, 12),
        "prompt_embeds": torch.randn(2, 6, 8),
    }
    assert loss(COGVIDEOX, pipe, batch).isfinite().all()
    assert seen["hidden_states"].shape == (2, 4, 8, 8, 12)
    assert torch.equal(seen["hidden_states"][:, 0], seen["hidden_states"][:, 1])


# SVD


def test_the_svd_loss_is_the_weighted_error_of_what_diffusers_takes_for_the_clean_latents(svd, svd_batch, monkeypatch):
    latents = svd_batch["latents"]
    predicted = torch.randn_like(latents)
    answer = Answer(lambda _: predicted)
    monkeypatch.setattr(svd.unet, "forward", answer)
    found = loss(SVD, svd, svd_batch)
    inputs, scheduler = answer.inputs, svd.scheduler
    for clip in range(2):
        sigma = (4 * inputs["timestep"][clip]).exp()
        scheduler.sigmas, scheduler.timesteps = torch.stack([sigma, sigma * 0]), inputs["timestep"][clip : clip + 1]
        scheduler._step_index = 0
        scaled = inputs["sample"][clip, :, :4]
        noisy = scaled * (sigma**2 + 1).sqrt()
        torch.testing.assert_close(scheduler.scale_model_input(noisy, scheduler.timesteps[0]), scaled)
        clean = scheduler.step(predicted[clip], scheduler.timesteps[0], noisy).pred_original_sample
        expected = (1 + sigma**-2) * (clean - latents[clip]).square().mean()
        torch.testing.assert_close(found[clip], expected, rtol=1e-4, atol=1e-6)


def test_the_svd_loss_of_the_right_answer_is_zero(svd, svd_batch, monkeypatch):
    latents = svd_batch["latents"]

    def right(inputs):
        sigma = (4 * inputs["timestep"]).exp()[:, None, None, None, None]
        noisy = inputs["sample"][:, :, :4] * (sigma**2 + 1).sqrt()
        return (noisy / (sigma**2 + 1) - latents) * (sigma**2 + 1).sqrt() / sigma

    monkeypatch.setattr(svd.unet, "forward", Answer(right))
    assert loss(SVD, svd, svd_batch).max() < 1e-6


def test_svd_is_conditioned_as_its_pipeline_does(svd, svd_batch, monkeypatch):
    answer = Answer(lambda inputs: inputs["sample"][:, :, :4])
    monkeypatch.setattr(svd.unet, "forward", answer)
    loss(SVD, svd, svd_batch)
    inputs = answer.inputs
    times = svd._get_add_time_ids(6, 127, 0.5, torch.float32, 2, 1, False)
    assert torch.equal(inputs["added_time_ids"][:, :2], times[:, :2])
    assert torch.equal(inputs["added_time_ids"][:, 2], svd_batch["noise_aug_strength"])
    assert torch.equal(inputs["encoder_hidden_states"], svd_batch["prompt_embeds"])
    image = inputs["sample"][:, :, 4:]
    assert torch.equal(image, svd_batch["image_latents"][:, None].expand_as(image))
    # Without noise the image's latents are those of the first frame, but not scaled.
    first = svd._encode_vae_image(Squares(2).videos[:, 0], "cpu", 1, False)
    torch.testing.assert_close(svd_batch["latents"][:, 0], first * svd.vae.config.scaling_factor, rtol=1e-4, atol=1e-5)
    # The unconditional half of guidance sees neither embedding nor image.
    empty = SVD.empty_prompt(svd).expand(2, -1, -1)
    loss(SVD, svd, {**svd_batch, "prompt_embeds": empty})
    assert not answer.inputs["sample"][:, :, 4:].any()


def test_noise_of_the_svd_image_belongs_to_the_clip(svd, svd_batch):
    clips = Squares(2)
    alone = SVD.encode(svd, clips.videos[1:, :3], clips.texts[1:])
    for name, values in alone.items():
        torch.testing.assert_close(values[0], svd_batch[name][1], rtol=1e-4, atol=1e-5)
    assert svd_batch["noise_aug_strength"][0] != svd_batch["noise_aug_strength"][1]


def test_svd_gradients_reach_the_injection_alone(svd, svd_batch):
    svd.unet.requires_grad_(False)
    injection = AttentionInjection.for_model(svd.unet, token_dim=8)
    for adapter in injection.sites.values():
        nn.init.normal_(adapter.to_v.weight)
    injection.attach(svd.unet)
    injection.set_condition(torch.randn(2, 3, 8))
    loss(SVD, svd, svd_batch).sum().backward()
    assert all(parameter.grad is None for parameter in svd.unet.parameters())
    values = [adapter.to_v.weight.grad.norm() for adapter in injection.sites.values()]
    assert all(value > 0 for value in values)


def test_svd_trains_from_stored_clips(svd, tmp_path):
    svd.save_pretrained(tmp_path / "svd")
    clips = EncodedClips(
        Squares(2), folder=str(tmp_path / "cache"), pipeline=str(tmp_path / "svd"), precision="float32"
    )
    batch = default_collate([clips[0], clips[1]])
    assert batch["empty_prompt_embeds"].shape == batch["prompt_embeds"].shape == (2, 1, 16)
    backbone, pipe = load_pipeline(str(tmp_path / "svd"), frozen=False)
    assert backbone is SVD
    assert pipe.vae is None
    assert loss(backbone, pipe, batch).isfinite().all()


# Stage 1


def batch_of(bundle, cache):
    clips = EncodedClips(
        Squares(4),
        folder=str(cache),
        pipeline=str(bundle / "backbone"),
        bundle=str(bundle),
        features=["motion_features"],
        precision="float32",
    )
    return default_collate([clips[i] for i in range(4)])


@pytest.fixture
def injection(made_bundle, monkeypatch):
    def make(**options):
        module = InjectionTraining(str(made_bundle), **options)
        monkeypatch.setattr(module, "log", lambda *_, **__: None)
        return module

    monkeypatch.setattr(InjectionTraining, "batches", 3, raising=False)
    return make


def gradients(module, batch):
    """As Lightning does it: the backward pass runs after `training_step` has returned."""
    module.training_step(batch, 0).backward()
    module.on_train_batch_end()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(injection, made_bundle, cache):
    batch = batch_of(made_bundle, cache)
    plain = gradients(injection(), batch)
    saving = injection(gradient_checkpointing=True)
    assert saving.denoiser.is_gradient_checkpointing
    saved = gradients(saving, batch)
    assert {name.split(".")[0] for name in plain} == {"injection", "resampler"}
    assert plain.keys() == saved.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient)
    assert sum(gradient.abs().sum() > 0 for gradient in plain.values()) == len(plain)


def test_a_backbone_in_half_precision_trains_adapters_in_full(injection, made_bundle, cache):
    module = injection(precision="bfloat16")
    assert {parameter.dtype for parameter in module.denoiser.parameters()} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(module, batch_of(made_bundle, cache))
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_prompts_and_tokens_are_dropped_at_the_stated_share(injection):
    module = injection(token_dropout=0.15, prompt_dropout=0.3)
    count, seen = 4000, {}

    def stand_in(pipeline, batch, generator, **options):
        seen["prompts"] = batch["prompt_embeds"].flatten()
        return torch.zeros(len(batch["prompt_embeds"]))

    module.backbone = replace(module.backbone, training_loss=stand_in)
    module.resampler = nn.Identity()
    monkey = module.injection.set_condition
    module.injection.set_condition = lambda tokens: seen.update(tokens=tokens[:, 0, 0])
    ones, zeros = torch.ones(count, 1, 16), torch.zeros(count, 1, 16)
    batch = {
        "latents": torch.zeros(count, 1),
        "prompt_embeds": torch.ones(count, 1, 1),
        "empty_prompt_embeds": torch.zeros(count, 1, 1),
        "motion_features": ones,
        "grey_features": zeros,
    }

    def kept():
        module.training_step(batch, 0)
        return seen["prompts"].clone(), seen["tokens"].clone()

    prompts, tokens = kept()
    again_prompts, again_tokens = kept()
    module.injection.set_condition = monkey
    assert prompts.mean() == pytest.approx(0.7, abs=0.03)
    assert tokens.mean() == pytest.approx(0.85, abs=0.03)
    assert (prompts * tokens).mean() == pytest.approx(0.7 * 0.85, abs=0.03)  # independent of each other
    # The same step draws the same: that is what makes resuming exact.
    assert torch.equal(prompts, again_prompts)
    assert torch.equal(tokens, again_tokens)


def test_seed_step_and_stream_draw_apart(injection):
    def draw(module, *arguments, **options):
        return tuple(torch.rand(4, generator=module.generator(*arguments, **options)).tolist())

    one, other = injection(seed=1), injection(seed=2)
    draws = [draw(one, 0), draw(one, 1), draw(one, 0, stream=1), draw(one, 1 << 24), draw(other, 0)]
    assert len(set(draws)) == len(draws)
    assert draw(one, 0) == draws[0]


def test_latents_have_the_size_of_the_clips(cog_batch):
    assert cog_batch["latents"].shape == (3, FRAMES, 4, SIZE // 4, SIZE // 4)


def fresh(module):
    """An injection that changes nothing."""
    for adapter in module.injection.sites.values():
        nn.init.zeros_(adapter.to_v.weight)
    return module


def described(batch):
    generator = torch.Generator().manual_seed(5)
    prompts = batch["prompt_embeds"]
    return {**batch, "described_prompt_embeds": prompts + torch.randn(prompts.shape, generator=generator)}


def test_prompts_that_tell_the_motion_come_at_the_stated_share(injection):
    module = injection(prompt_dropout=0.1)
    count, seen = 4000, []

    def stand_in(pipeline, batch, generator, **options):
        seen.append(batch["prompt_embeds"].flatten())
        return torch.zeros(count)

    module.backbone = replace(module.backbone, training_loss=stand_in)
    prompts = {"prompt_embeds": 1.0, "empty_prompt_embeds": 0.0, "described_prompt_embeds": 2.0}
    batch = {"latents": torch.zeros(count, 1), **{name: torch.full((count, 1, 1), x) for name, x in prompts.items()}}
    for share in (0.7, 1.0):
        module.diffusion_loss(batch, step=0, described_share=share)
    some, every = seen
    assert [(some == prompt).float().mean().item() for prompt in (0, 1, 2)] == pytest.approx([0.1, 0.2, 0.7], abs=0.03)
    assert (every == 2).all()


def test_the_teacher_asks_for_what_a_telling_prompt_does(injection, made_bundle, cache):
    """What is left for a fresh injection to learn is the difference that the prompt makes."""
    batch = batch_of(made_bundle, cache)
    module = fresh(injection(teacher_weight=1.0, token_dropout=0.0, prompt_dropout=0.0))
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value.detach()})
    found = gradients(module, described(batch))
    assert logged["train/teacher"] > 0
    assert found["injection.sites.transformer_blocks/0/attn1/to_out/0.to_v.weight"].abs().sum() > 0
    assert not any(name.startswith("denoiser") for name in found)
    gradients(module, {**batch, "described_prompt_embeds": batch["prompt_embeds"]})
    assert logged["train/teacher"] == pytest.approx(0, abs=1e-9)


def test_the_teacher_leaves_out_clips_whose_tokens_are_dropped(injection, made_bundle, cache):
    batch = described(batch_of(made_bundle, cache))
    module = fresh(injection(teacher_weight=1.0, token_dropout=0.5, prompt_dropout=0.0))
    kept = torch.rand(4, generator=module.generator(3, stream=1)) >= 0.5
    assert 0 < kept.sum() < 4
    changed = {**batch, "described_prompt_embeds": batch["described_prompt_embeds"].clone()}
    changed["described_prompt_embeds"][kept] = batch["prompt_embeds"][kept]
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value.detach()})
    module.training_step(changed, 0)
    module.on_train_batch_end()
    assert logged["train/teacher"] == pytest.approx(0, abs=1e-9)


# Stage 0


def test_attention_outputs_learn_their_place(made_bundle, cache, monkeypatch, tmp_path):
    monkeypatch.setattr(BackboneTraining, "batches", 0, raising=False)
    batch = batch_of(made_bundle, cache)
    module = BackboneTraining(str(made_bundle / "backbone"), str(tmp_path), place_weight=1.0, learning_rate=1e-2)
    logged = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.setdefault(name, []).append(value.detach()))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    frames, height, width = batch["latents"].shape[1], *batch["latents"].shape[3:]
    cells = height * width // module.denoiser.config.patch_size**2
    chance = math.log(frames) + math.log(cells)
    assert logged["train/place"][0] == pytest.approx(chance, rel=0.2)
    assert logged["train/place"][-1] < 0.3 * chance
    assert module.denoiser.transformer_blocks[0].attn1.to_v.weight.grad.abs().sum() > 0
