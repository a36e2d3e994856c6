"""Training of feature modulation: what is told of a clip, what learns, and that it continues exactly."""

import shutil
from dataclasses import replace

import pytest
import torch

from motionrag.bundle import EncoderSource, MotionBundle
from motionrag.training import ControlTraining, EncodedClips, start
from motionrag.training.control import _add_lora, _merge_lora
from tests.database.conftest import tree
from tests.training.parts import FRAMES, SIZE, Squares, pipeline, svd_pipeline, write_bundle, write_config
from tests.training.test_run import checkpoint, losses

PARTS = {"feature_modulation.safetensors", "motion_injection.safetensors"}


@pytest.fixture(scope="module")
def made_bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control") / "bundle"
    write_bundle(folder, svd_pipeline(levels=4), control=True)
    return folder


@pytest.fixture
def training(made_bundle, monkeypatch):
    monkeypatch.setattr(ControlTraining, "global_rank", 0)

    def make(**options):
        return ControlTraining(str(made_bundle), **options)

    return make


@pytest.fixture
def batch(made_bundle, cache):
    clips = EncodedClips(
        Squares(8),
        folder=str(cache),
        pipeline=str(made_bundle / "backbone"),
        bundle=str(made_bundle),
        features=["motion_features"],
        flow="true",
        precision="float32",
    )
    return torch.utils.data.default_collate([clips[index] for index in range(4)])


@pytest.mark.parametrize("learns", ["frozen", "lora", "whole"])
def test_an_interrupted_training_continues_as_if_it_had_not_been(learns, made_bundle, cache, tmp_path):
    whole, halves = (shutil.copytree(made_bundle, tmp_path / name) for name in ("whole", "halves"))
    expected, _ = losses(write_config(f"control_{learns}", whole, cache, tmp_path / "run_whole"))
    config = write_config(f"control_{learns}", halves, cache, tmp_path / "run_halves", steps=3)
    first, _ = losses(config)
    second, _ = losses(config, resume=True, overrides=["--trainer.max_steps=6"])
    assert len(set(expected)) == 6
    assert first + second == expected
    before, after, other = (
        {name: content for name, content in tree(folder).items() if name != "denoiser/config.json"}  # names its origin
        for folder in (made_bundle, whole, halves)
    )
    assert after == other
    changed = {name for name in after if after[name] != before.get(name)} - {"README.md", "config.json"}
    own = set() if learns == "frozen" else {"denoiser/diffusion_pytorch_model.safetensors"}
    assert changed == PARTS | own
    assert MotionBundle.from_pretrained(whole).config.denoiser == (None if learns == "frozen" else "denoiser")
    assert not MotionBundle.from_pretrained(whole).config.trained  # CAMA is not
    kept = {key for key in checkpoint(tmp_path / "run_whole")["state_dict"] if key.startswith("denoiser.")}
    assert bool(kept) == (learns != "frozen")
    assert learns != "lora" or all("lora_" in key for key in kept)


def test_low_rank_matrices_are_merged_into_what_they_did():
    unet = svd_pipeline().unet
    inputs = (torch.randn(1, 3, 8, 8, 8), torch.tensor(0.5), torch.randn(1, 1, 16), torch.rand(1, 3))
    keys = set(unet.state_dict())
    linear = sum(isinstance(module, torch.nn.Linear) for module in unet.modules())
    _add_lora(unet, 4)
    down = [weight for name, weight in unet.named_parameters() if "lora_A" in name]
    up = [weight for name, weight in unet.named_parameters() if "lora_B" in name]
    assert len(down) == len(up) == linear
    assert {weight.shape[0] for weight in down} == {4}
    for weight in up:  # they begin with zeros
        torch.nn.init.normal_(weight, std=0.1)
    assert {name for name, weight in unet.named_parameters() if weight.requires_grad} == {
        name for name, _ in unet.named_parameters() if "lora_" in name
    }
    with torch.no_grad():
        expected = unet(*inputs).sample
        _merge_lora(unet)
        torch.testing.assert_close(unet(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
    assert set(unet.state_dict()) == keys


def test_a_few_blocks_are_told_and_all_that_moves_is_masked(training, batch):
    module = training(drop_ratio=(0.5, 0.5))
    told = module.flow(batch, torch.Generator().manual_seed(0))
    assert told.shape == (4, FRAMES, 3, SIZE, SIZE)
    for flow, mask, true in zip(told[:, :, :2], told[:, :, 2], batch["flow"], strict=True):
        moves = torch.zeros(SIZE, SIZE)
        moves[SIZE // 2 :] = 1
        assert torch.equal(mask, moves.expand(FRAMES, SIZE, SIZE))
        kept = flow.ne(0).any(0).any(0)
        assert torch.equal(flow.permute(0, 2, 3, 1)[:, kept], true[:, kept])
        # Whole 8×8 blocks of the half that moves, and not all of them.
        blocks = kept.reshape(SIZE // 8, 8, SIZE // 8, 8).float().mean((1, 3))
        assert set(blocks.unique().tolist()) <= {0.0, 1.0}
        assert 0 < blocks.sum() < SIZE // 8 * SIZE // 16


def test_the_model_is_told_of_control_what_the_pipeline_tells(training, batch):
    module = training()
    told = module._told(batch, torch.tensor([True, False, True, True]))
    # Clip i moves (1 + i)·t pixels in x and in y, in half of the picture, over 5 frames.
    length = [2**0.5 * (1 + index) * 2 / 2 for index in range(4)]
    expected = torch.tensor([[8, length[0]], [6, 127], [8, length[2]], [8, length[3]]])
    torch.testing.assert_close(told, expected, rtol=1e-3, atol=0)
    assert training(bucket=17)._told(batch, torch.ones(4, dtype=torch.bool)).tolist() == [[8, 17]] * 4


def test_without_control_and_tokens_the_loss_is_the_models_own(training, batch):
    module = training(control_dropout=1.0, token_dropout=1.0)
    batches = property(lambda module: 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ControlTraining, "batches", batches)
        patch.setattr(ControlTraining, "log", lambda *arguments, **options: None)
        loss = module.training_step(batch, 0)
        module.on_train_batch_end()
        torch.testing.assert_close(loss, module.diffusion_loss(batch, step=3), rtol=1e-5, atol=0)
        steered = training(token_dropout=0.0).training_step(batch, 0)
        assert not torch.isclose(loss, steered)


def test_gradients_reach_every_part_that_learns_and_nothing_else(training, batch):
    module = training(denoiser="frozen", token_dropout=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ControlTraining, "batches", property(lambda module: 0))
        patch.setattr(ControlTraining, "log", lambda *arguments, **options: None)
        module.training_step(batch, 0).backward()
    reached = {name.split(".")[0] for name, weight in module.named_parameters() if weight.grad is not None}
    assert reached == {"modulation", "injection"}
    assert all(weight.grad is not None for weight in module.modulation.parameters())


def test_a_new_bundle_has_control_if_wanted(made_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "TOKEN_DIM", 32)
    encoders = {**start.ENCODERS}
    encoders["video"], encoders["image"] = (EncoderSource(str(made_bundle / name)) for name in ("video", "image"))
    base = made_bundle / "backbone"
    made = start.new_bundle(str(base), tmp_path / "new", encoders=encoders, control=True)
    unet = svd_pipeline().unet
    inputs = (torch.randn(1, 3, 8, 8, 8), torch.tensor(0.5), torch.randn(1, 1, 16), torch.rand(1, 3))
    with torch.no_grad():
        plain = unet(*inputs).sample
        made.feature_modulation.attach(unet)
        with made.feature_modulation.condition(torch.randn(1, 3, 3, 64, 64)):
            assert torch.equal(unet(*inputs).sample, plain)
    pipeline().save_pretrained(tmp_path / "cogvideox")
    with pytest.raises(ValueError, match="not CogVideoXTransformer3DModel"):
        start.new_bundle(str(tmp_path / "cogvideox"), tmp_path / "other", encoders=encoders, control=True)
    assert not (tmp_path / "other").exists()


def test_a_frozen_denoiser_is_the_one_that_the_bundle_is_used_with(made_bundle, tmp_path):
    folder = shutil.copytree(made_bundle, tmp_path / "bundle")
    bundle = MotionBundle.from_pretrained(folder)
    unet = svd_pipeline().unet
    torch.nn.init.ones_(unet.conv_in.bias)
    unet.save_pretrained(folder / "denoiser")
    replace(bundle.config, denoiser="denoiser").write(folder / "config.json")
    own = ControlTraining(str(folder))
    assert own.denoiser.conv_in.bias.eq(1).all()
    assert own.pipeline.unet is own.denoiser
    assert own.denoiser.conv_norm_out.eps == 1e-5  # as the pipeline runs it
    base = ControlTraining(str(folder), pipeline=str(folder / "backbone"))
    assert not base.denoiser.conv_in.bias.eq(1).any()
