"""Training by a config: it continues exactly, changes nothing that is frozen, and says in a sentence what is wrong."""

import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from motionrag.bundle import MotionBundle
from motionrag.training import read_config, train
from motionrag.training.run import last_checkpoint
from tests.database.conftest import tree
from tests.test_cli import run
from tests.training.parts import Losses, svd_pipeline, write_bundle, write_config

TRAINED = {
    "injection": {"motion_injection.safetensors", "motion_resampler.safetensors", "unconditional_tokens.safetensors"},
    "adaptation": {"cama.safetensors", "context_resampler.safetensors"},
    "joint": {
        "cama.safetensors",
        "context_resampler.safetensors",
        "motion_injection.safetensors",
        "motion_resampler.safetensors",
        "unconditional_tokens.safetensors",
    },
}


def losses(*arguments, **options):
    """Train; gives the loss of every step and the module."""
    Losses.seen.clear()
    module = train(*arguments, **options)
    return list(Losses.seen), module


@pytest.mark.parametrize("stage", sorted(TRAINED))
def test_an_interrupted_training_continues_as_if_it_had_not_been(stage, made_bundle, cache, tmp_path):
    whole, halves = (shutil.copytree(made_bundle, tmp_path / name) for name in ("whole", "halves"))
    expected, module = losses(write_config(stage, whole, cache, tmp_path / "run_whole"))
    config = write_config(stage, halves, cache, tmp_path / "run_halves", steps=3)
    first, _ = losses(config)
    second, _ = losses(config, resume=True, overrides=["--trainer.max_steps=6"])
    assert len(expected) == 6
    assert first + second == expected
    before, after = tree(made_bundle), tree(whole)
    assert after == tree(halves)
    # What was trained has changed, and nothing else: neither backbone nor encoders.
    changed = {name for name in after if after[name] != before[name]}
    assert changed - {"README.md", "config.json"} == TRAINED[stage]
    if stage != "adaptation":
        saved = type(module.denoiser).from_pretrained(made_bundle / "backbone" / "transformer").state_dict()
        assert all(torch.equal(value, saved[key]) for key, value in module.denoiser.state_dict().items())
        assert not any(key.startswith("denoiser") for key in checkpoint(tmp_path / "run_whole")["state_dict"])


@pytest.mark.parametrize("stage", sorted(TRAINED))
def test_a_run_killed_after_its_last_checkpoint_writes_when_continued(stage, made_bundle, bundle, cache, tmp_path):
    config = write_config(stage, bundle, cache, tmp_path / "run")
    train(config)
    written = tree(bundle)
    shutil.rmtree(bundle)
    shutil.copytree(made_bundle, bundle)
    trained_again, _ = losses(config, resume=True)
    assert trained_again == []
    assert tree(bundle) == written


def checkpoint(folder):
    return torch.load(last_checkpoint(folder), weights_only=True)


def test_stable_video_diffusion_is_trained_by_its_config_alone(tmp_path):
    write_bundle(tmp_path / "bundle", svd_pipeline())
    before = tree(tmp_path / "bundle")
    found, module = losses(
        write_config("injection", tmp_path / "bundle", tmp_path / "cache", tmp_path / "run", steps=2)
    )
    assert module.backbone.name == "svd"
    assert len(set(found)) == 2
    after = tree(tmp_path / "bundle")
    assert {name for name in after if after[name] != before[name]} - {"README.md", "config.json"} == TRAINED[
        "injection"
    ]


def test_a_bundle_counts_as_trained_after_adaptation(bundle, cache, tmp_path):
    train(write_config("injection", bundle, cache, tmp_path / "one", steps=1))
    assert not MotionBundle.from_pretrained(bundle).config.trained
    train(write_config("adaptation", bundle, cache, tmp_path / "two", steps=1))
    assert MotionBundle.from_pretrained(bundle).config.trained


def test_a_run_that_holds_a_checkpoint_is_not_started_over(bundle, cache, tmp_path):
    config = write_config("adaptation", bundle, cache, tmp_path / "run", steps=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").touch()
    done = run("train", "--config", config)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"{tmp_path / 'run'} holds last.ckpt of an earlier run; continue it with --resume" in done.stderr


def test_resuming_where_nothing_is_says_that_it_starts_anew(bundle, cache, tmp_path, caplog):
    done = run(
        "train",
        "--config",
        write_config("adaptation", bundle, cache, tmp_path / "run"),
        "--resume",
        "--devices",
        1,
        "--trainer.max_steps=1",
    )
    assert done.returncode == 0, done.stderr
    assert "Done: AdaptationTraining" in done.stdout
    assert "1 steps" in done.stdout
    assert f"no checkpoint in {tmp_path / 'run'} to resume from" in caplog.text


def test_the_newest_of_the_last_checkpoints_is_resumed(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for age, name in enumerate(["last-v1.ckpt", "last.ckpt", "last-v2.ckpt"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (100 - age, 100 - age))
    assert last_checkpoint(tmp_path).name == "last-v1.ckpt"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("--model.init_args.learning_rat=2", r"'learning_rat' is not accepted"),
        ("--model.init_args.learning_rate=fast", r'"learning_rate": Expected a'),
        ("--trainer.max_stepz=2", r"unrecognized arguments: --trainer.max_stepz=2"),
        ("--model.class_path=motionrag.training.Nothing", r"has no attribute 'Nothing'"),
        ("--data.init_args.train.init_args.clips.init_args.folde=x", r"EncodedClips': Option 'folde'"),
        ("stray", "unrecognized arguments: stray"),
    ],
)
def test_what_does_not_fit_is_one_sentence(override, reason, bundle, cache, tmp_path):
    config = write_config("adaptation", bundle, cache, tmp_path / "run")
    done = run("train", "--config", config, override)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"Error: {config}: ")
    assert reason in done.stderr
    assert len([line for line in done.stderr.splitlines() if "Seed" not in line]) == 1


def test_devices_nodes_and_strategy_reach_the_trainer(bundle, cache, tmp_path, monkeypatch):
    import motionrag.training.run as module

    seen = []

    def stand_in(config, *, resume, overrides):
        seen.extend(overrides)
        return SimpleNamespace(trainer=SimpleNamespace(global_step=0))

    monkeypatch.setattr(module, "train", stand_in)
    config = write_config("adaptation", bundle, cache, tmp_path / "run")
    done = run(
        "train", "--config", config, "--devices", "auto", "--num-nodes", 2, "--strategy", "ddp", "--trainer.max_steps=9"
    )
    assert done.returncode == 0, done.stderr
    trainer = read_config(config, seen).config.trainer
    assert (trainer.devices, trainer.num_nodes, trainer.strategy, trainer.max_steps) == ("auto", 2, "ddp", 9)


def test_a_config_that_could_not_be_resumed_is_refused(bundle, cache, tmp_path):
    config = write_config("adaptation", bundle, cache, tmp_path / "run")
    config.write_text(config.read_text().replace("save_last: true", "save_last: false"))
    with pytest.raises(ValueError, match=r"ModelCheckpoint that has dirpath and save_last"):
        train(config)


def test_without_lightning_the_extra_is_named(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("motionrag.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    done = run("train", "--config", tmp_path / "x.yaml")
    assert done.returncode == 1
    assert done.stderr == "Error: Training needs Lightning: pip install 'motionrag[train]'\n"
