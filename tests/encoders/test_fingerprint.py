"""Fingerprints: what changes them, what does not, and that importing the encoders stays light."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from motionrag.encoders import VideoMAEEncoder
from motionrag.encoders.fingerprint import fingerprint
from tests.encoders.tiny import videomae_config


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.register_buffer("counts", torch.arange(3))


def test_same_values_same_fingerprint():
    network = Network()
    expected = fingerprint("kind", {"b": 1, "a": (1, 2)}, network)
    assert len(expected) == 32
    assert set(expected) <= set("0123456789abcdef")
    assert fingerprint("kind", {"a": [1, 2], "b": 1}, network) == expected
    renamed = nn.Sequential(network)
    assert fingerprint("kind", {"a": [1, 2], "b": 1}, renamed) == expected


def test_sixteen_bit_values_count_as_what_they_are():
    network = Network().to(torch.bfloat16)
    stored = fingerprint("kind", {}, network)
    assert fingerprint("kind", {}, network.float()) == stored


@pytest.mark.parametrize("change", ["kind", "settings", "weight", "last bit", "buffer", "shape", "exchange"])
def test_every_difference_counts(change):
    network = Network()
    before = fingerprint("kind", {"size": 224}, network)
    with torch.no_grad():
        weight = network.first.weight
        if change == "weight":
            weight[0, 0] += 1
        if change == "last bit":
            weight[3, 3] = torch.nextafter(weight[3, 3], torch.tensor(9.0))
        if change == "buffer":
            network.counts[1] = 7
        if change == "shape":
            network.first.weight = nn.Parameter(weight.reshape(2, 8))
        if change == "exchange":
            network.first, network.second = network.second, network.first
    settings = {"size": 225 if change == "settings" else 224}
    assert fingerprint("other" if change == "kind" else "kind", settings, network) != before


def test_two_processes_agree(tmp_path):
    encoder = VideoMAEEncoder.from_pretrained(videomae_config())
    encoder.save_pretrained(tmp_path)
    program = (
        "from motionrag.encoders import VideoMAEEncoder as E; import sys, torch;"
        "print(E.from_pretrained(sys.argv[1], dtype=torch.bfloat16).fingerprint)"
    )
    result = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == encoder.fingerprint


def test_importing_the_encoders_loads_none_of_their_libraries():
    program = (
        "import sys, motionrag.encoders;"
        "print([m for m in ('transformers', 'open_clip', 'sentence_transformers', 'torchvision') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
