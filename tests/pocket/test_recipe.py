"""The recipe from nothing, with two steps of every training: each finds what it needs and writes what it trained."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from motionrag import MotionRAGPipeline
from motionrag.pocket import recipe
from tests.database.conftest import tree

CONFIGS = Path(__file__).parents[2] / "configs" / "pocket"
SMALLER = {
    "max_steps": 2,
    "decay_steps": 2,
    "warmup_steps": 1,
    "val_check_interval": 2,
    "every_n_train_steps": 1,
    "log_every_n_steps": 1,
    "batch_size": 4,
    "validation_batch_size": 8,
}
CLIPS = 40  # in place of thousands


def smaller(value):
    if isinstance(value, list):
        return [smaller(each) for each in value]
    if not isinstance(value, dict):
        return value
    made = {key: SMALLER[key] if key in SMALLER else smaller(each) for key, each in value.items()}
    if made.get("count", 0) > CLIPS:
        made["count"] = CLIPS
    return made


@pytest.fixture
def configs(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    for name in recipe.TRAININGS:
        config = smaller(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
        config["trainer"]["enable_progress_bar"] = False
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    pack = recipe.pack_both
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "pack_both", lambda: pack(target=tmp_path / "packed"))
    return folder


def refuse(*arguments):
    raise AssertionError("what is done was done again")


# Of every training one file that it writes.
WRITTEN = {
    "autoencoder": "backbone/vae/diffusion_pytorch_model.safetensors",
    "backbone": "backbone/transformer/diffusion_pytorch_model.safetensors",
    "video_encoder": "video_encoder/model.safetensors",
    "injection": "motion_injection.safetensors",
    "image_encoder": "image_encoder/model.safetensors",
    "retrieval_encoder": "clip_encoder/open_clip_model.safetensors",
    "adaptation": "cama.safetensors",
    "control_autoencoder": "control/backbone/vae/diffusion_pytorch_model.safetensors",
    "control_backbone": "control/feature_modulation.safetensors",
}


@pytest.mark.slow
def test_one_command_makes_both_pockets_from_nothing_and_continues(configs, tmp_path, monkeypatch):
    begun = recipe.train_pocket(configs, only=("initialise", "initialise_control"))
    before = tree(recipe.WEIGHTS)
    monkeypatch.setattr(recipe, "initialise", refuse)
    monkeypatch.setattr(recipe, "initialise_control", refuse)

    seconds = recipe.train_pocket(configs)
    assert list(seconds) == [*begun, *recipe.TRAININGS, "pack"]
    assert json.loads((recipe.WORK / "done.json").read_text()) == seconds
    after = tree(recipe.WEIGHTS)
    assert set(WRITTEN) == set(recipe.TRAININGS)
    assert [name for name, file in WRITTEN.items() if before[file] == after[file]] == []

    for bundle in (".", recipe.CONTROL):
        pipe = MotionRAGPipeline.from_pretrained(tmp_path / "packed" / bundle)
        assert pipe.bundle.config.trained
        assert pipe.pipeline.vae.config.scaling_factor not in (1.15258426, 0.18215)  # diffusers' own
        image = Image.new("RGB", (64, 64), "red")
        options = {"num_references": 0, "num_inference_steps": 1, "output_type": "pt"}
        assert torch.isfinite(pipe(image, **options).frames).all()
