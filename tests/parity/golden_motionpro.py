"""Reads the golden cases of MotionPro's networks. Their weights are drawn again, by the recipe that they came from."""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors import safe_open

FOLDER = Path(__file__).parent.parent / "golden" / "motionpro"


def draw(seed: int, key: str, shape: list[int]) -> torch.Tensor:
    """One parameter of a golden case."""
    drawn = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode())).standard_normal(shape)
    kind = key.rpartition(".")[2]
    if kind == "mix_factor":
        drawn = 0.8 * drawn
    elif kind == "weight":
        drawn = drawn / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 1 + 0.2 * drawn
    else:
        drawn = 0.1 * drawn
    return torch.from_numpy(np.asarray(drawn, dtype=np.float32))


def load_networks(name: str) -> SimpleNamespace:
    """A golden case: `state`, `inputs`, `outputs` by name and `config`."""
    case = SimpleNamespace(inputs={}, outputs={})
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        metadata = file.metadata()
        case.config = json.loads(metadata["config"])
        shapes = json.loads(metadata["shapes"])
        case.state = {key: draw(case.config["seed"], key, shape) for key, shape in shapes.items()}
        for key in file.keys():  # noqa: SIM118 - a safetensors file is no dict
            kind, _, rest = key.partition(".")
            (case.inputs if kind == "in" else case.outputs)[rest] = file.get_tensor(key)
    return case


def read_json(name: str) -> dict:
    """A table that belongs to the golden cases."""
    return json.loads((FOLDER / name).read_text())
