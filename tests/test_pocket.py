"""The pocket: complete, small, honest about its weights, and reproduced by the code that made it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from motionrag.bundle import resolve
from motionrag.pocket.initialise import initialise

WEIGHTS = resolve("pocket")


def tensors(file):
    """Key → shape and dtype."""
    with safe_open(file, "pt") as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - a safetensors file is no dict
        return {key: (tuple(each.get_shape()), each.get_dtype()) for key, each in slices.items()}


def test_size():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*")) <= 25e6


def test_it_says_that_it_is_not_trained():
    config = json.loads((WEIGHTS / "config.json").read_text())
    assert config["trained"] is False
    assert config["licence"]
    assert all(entry["licence"] for entry in config["encoders"].values())


def test_it_holds_no_code_and_no_path_of_the_machine_that_made_it():
    for file in WEIGHTS.rglob("*"):
        if file.is_file():
            assert file.suffix in (".json", ".safetensors", ".txt"), file
            if file.suffix == ".json":
                assert "/home/" not in file.read_text()
                assert "/tmp/" not in file.read_text()


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
encoder = MotionEncoder.from_pretrained()
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
    folder = tmp_path_factory.mktemp("pocket") / "weights"
    initialise(folder)
    return folder


def test_initialise_makes_the_same_files(remade):
    def listing(folder):
        return {file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file()}

    assert listing(remade) == listing(WEIGHTS)


def test_initialise_makes_the_same_configs(remade):
    def content(file):
        value = json.loads(file.read_text())
        # Which library version wrote a file is no property of the pocket.
        dropped = ("_diffusers_version", "transformers_version", "__version__", "_name_or_path", "_commit_hash")
        return {k: v for k, v in value.items() if k not in dropped} if isinstance(value, dict) else value

    for file in WEIGHTS.rglob("*.json"):
        assert content(remade / file.relative_to(WEIGHTS)) == content(file), file


def test_initialise_makes_the_same_keys_and_shapes(remade):
    for file in WEIGHTS.rglob("*.safetensors"):
        assert tensors(remade / file.relative_to(WEIGHTS)) == tensors(file), file
