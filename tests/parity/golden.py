"""Reads the golden cases and compares with them."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open

FOLDER = Path(__file__).parent.parent / "golden" / "motionrag"


def load_case(*names: str) -> SimpleNamespace:
    """A golden case, also one split over several files: `state`, `inputs`, `outputs` by name and `config`."""
    case = SimpleNamespace(state={}, inputs={}, outputs={}, config={})
    parts = {"state": case.state, "in": case.inputs, "out": case.outputs}
    for name in names:
        with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
            metadata = file.metadata()
            case.config = case.config or json.loads(metadata["config"])
            casts = json.loads(metadata.get("casts", "{}"))
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                kind, _, rest = key.partition(".")
                tensor = file.get_tensor(key)
                if key in casts:
                    tensor = tensor.to(torch.bool if casts[key].startswith("bool") else getattr(torch, casts[key]))
                parts[kind][rest] = tensor
    return case


def assert_golden(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """|error| ≤ 1e-5 · (1 + |expected|), the tolerance that the golden set states."""
    assert actual.shape == expected.shape
    excess = ((actual - expected).abs() / (1 + expected.abs())).max().item()
    assert excess <= 1e-5, f"largest error relative to 1 + |expected| is {excess:.2e}"


def published_keys(name: str) -> dict[str, list[int]]:
    """Keys and shapes of a published checkpoint at real size."""
    content = json.loads((FOLDER / "keys" / f"{name}.json").read_text())
    listing = next(content[key] for key in ("adapter_keys", "saved_keys", "keys") if key in content)
    return {entry["key"]: entry["shape"] for entry in listing}
