"""Fixtures that keep tests from leaving traces on each other."""

import os
import random

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def no_trace(monkeypatch, tmp_path_factory):
    """Every test starts from the same seeds, the default dtype and an empty working folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
