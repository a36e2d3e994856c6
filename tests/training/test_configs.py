"""Every config fits the real signatures, without loading anything."""

from pathlib import Path

import pytest

from motionrag.backbones import BACKBONES
from motionrag.training import read_config
from motionrag.training.run import checkpoint_folder

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_there_are_configs_for_every_backbone():
    assert {path.parent.name for path in CONFIGS} == {"pocket", *BACKBONES}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_fits_the_signatures(path):
    relative = path.relative_to(ROOT)
    assert path.read_text(encoding="utf-8").startswith(f"# motionrag train --config {relative}\n")
    config = read_config(path).config
    assert config.model.class_path.startswith("motionrag.training.")
    assert checkpoint_folder(config) == Path(config.trainer.default_root_dir)
