"""The pocket: complete, small, honest about its weights, and reproduced by the code that made it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from motionrag.bundle import resolve
from motionrag.pocket.initialise import initialise
from motionrag.pocket.initialise_control import initialise_control
from motionrag.pocket.recipe import CONTROL, pack_both

WEIGHTS = resolve("pocket")


def tensors(file):
    """Key → shape and dtype."""
    with safe_open(file, "pt") as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - a safetensors file is no dict
        return {key: (tuple(each.get_shape()), each.get_dtype()) for key, each in slices.items()}


def test_size():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*")) <= 25e6


def test_it_says_what_it_is():
    config = json.loads((WEIGHTS / "config.json").read_text())
    assert config["trained"] is True
    assert config["licence"]
    assert all(entry["licence"] for entry in config["encoders"].values())
    card = (WEIGHTS / "README.md").read_text()
    for word in ("motionrag pocket train", "seed", "Limits", "Apache-2.0"):
        assert word in card


def test_it_holds_no_code_and_no_path_of_the_machine_that_made_it():
    for file in WEIGHTS.rglob("*"):
        if file.is_file():
            assert file.suffix in (".json", ".safetensors", ".txt", ".md"), file
            if file.suffix == ".json":
                assert not re.search(r'"/\w+/', file.read_text()), file


LOAD = """
import socket
def refuse(*_, **__): raise AssertionError("reached for the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch
from PIL import Image
from motionrag import MotionRAGPipeline, MotionEncoder
pipe = MotionRAGPipeline.from_pretrained("pocket")
pipe.pipeline.set_progress_bar_config(disable=True)
out = pipe(Image.new("RGB", (64, 64), "red"), "a red ball falls", num_references=0, num_inference_steps=1)
assert len(out.frames[0]) == 17 and out.frames[0][0].size == (64, 64)
dragged = MotionRAGPipeline.from_pretrained("pocket-control")
dragged.pipeline.set_progress_bar_config(disable=True)
way = [(20, 20), (40, 30)]
out = dragged(Image.new("RGB", (64, 64), "red"), trajectories=[way], num_references=0, num_inference_steps=1)
assert len(out.frames[0]) == 17 and out.frames[0][0].size == (64, 64)
encoder = MotionEncoder.from_pretrained()
for what in ("text", "image", "motion_tokens", "context_tokens"):
    assert dragged.encoder.fingerprint(what) == encoder.fingerprint(what)  # one database serves both
print({what: encoder.fingerprint(what) for what in ("text", "image", "motion_tokens", "context_tokens")})
"""


def test_it_loads_offline_in_a_fresh_process(tmp_path):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path / "home"),
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not any(file.is_file() for file in (tmp_path / "hf").rglob("*.safetensors"))


@pytest.fixture(scope="module")
def remade(tmp_path_factory):
    """What the recipe would ship if it trained nothing."""
    folder = tmp_path_factory.mktemp("pocket")
    initialise(folder / "weights")
    initialise_control(folder / "weights" / CONTROL)
    pack_both(folder / "weights", folder / "packed")
    return folder / "packed"


def test_the_recipe_ships_these_files(remade):
    def listing(folder):
        return {file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file()}

    assert listing(remade) | {"README.md"} == listing(WEIGHTS)


def test_the_recipe_ships_these_configs(remade):
    def content(file):
        value = json.loads(file.read_text())
        # Which library version wrote a file is no property of the pocket; the scale of latents is learned.
        dropped = ("_diffusers_version", "transformers_version", "__version__", "_name_or_path", "_commit_hash")
        dropped += ("scaling_factor", "local_files_only")
        return {k: v for k, v in value.items() if k not in dropped} if isinstance(value, dict) else value

    for file in WEIGHTS.rglob("*.json"):
        assert content(remade / file.relative_to(WEIGHTS)) == content(file), file


def test_the_recipe_ships_these_keys_shapes_and_precisions(remade):
    for file in WEIGHTS.rglob("*.safetensors"):
        assert tensors(remade / file.relative_to(WEIGHTS)) == tensors(file), file


def test_training_changed_what_is_trained_and_nothing_else(remade):
    untouched = {"text_encoder/model.safetensors", "backbone/text_encoder/model.safetensors"}
    # Not trained either, but the one that ships was drawn after another autoencoder than today's.
    drawn_earlier = WEIGHTS / "control/backbone/image_encoder/model.safetensors"
    for file in set(WEIGHTS.rglob("*.safetensors")) - {drawn_earlier}:
        name = file.relative_to(WEIGHTS).as_posix()
        first, last = load_file(remade / name), load_file(file)
        same = all(torch.equal(first[key], last[key]) for key in first)
        assert same == (name in untouched), name
