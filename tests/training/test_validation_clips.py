"""What validation generates: the sheet, the tracks of the pocket's clips, and nothing that training would notice."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from motionrag.backbones import BACKBONES
from motionrag.training import ValidationClips, train
from tests.training.parts import FRAMES, SIZE, Squares, encoded, named, write_config


class Tracked(Squares):
    """Clips with the ground truth of the pocket's, one thing in the middle that does not move."""

    def __getitem__(self, index):
        tracks = torch.full((3, FRAMES, 2), float("nan"))
        tracks[0] = SIZE / 2
        masks = torch.zeros(FRAMES, SIZE, SIZE, dtype=torch.uint8)
        masks[:, 12:20, 12:20] = 1
        return {**super().__getitem__(index), "tracks": tracks, "masks": masks, "colours": torch.tensor([0, -1, -1])}


@pytest.fixture
def config(bundle, cache, tmp_path):
    path = write_config("injection", bundle, cache, tmp_path / "run", steps=2)
    content = yaml.safe_load(path.read_text())
    validation = encoded(bundle, tmp_path / "validation", ["motion_features"], latents=True, count=3)
    validation["init_args"]["clips"]["class_path"] = "tests.training.test_validation_clips.Tracked"
    content["data"]["init_args"]["validation"] = validation
    content["trainer"] |= {"val_check_interval": 1, "check_val_every_n_epoch": None}
    content["trainer"]["callbacks"].append(
        named(
            "motionrag.training.ValidationClips",
            folder=str(tmp_path / "sheets"),
            count=2,
            every_n_validations=2,
            num_inference_steps=1,
        )
    )
    path.write_text(yaml.safe_dump(content))
    return path


def test_sheets_and_track_errors_come_every_second_validation(config, tmp_path):
    module = train(config)
    [sheet] = (tmp_path / "sheets").iterdir()
    assert sheet.name == "step-000002.png"
    with Image.open(sheet) as picture:
        assert picture.height > 6 * 128  # two clips: truth, without and with motion tokens
    metrics = module.trainer.callback_metrics
    errors = {name: float(value) for name, value in metrics.items() if "track_error" in name}
    assert set(errors) == {"validation/track_error_without", "validation/track_error_with"}
    assert all(0 <= error <= 150 for error in errors.values())
    assert not module.injection._condition


def test_a_family_that_cannot_generate_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="A svd makes no videos from stored prompts here; leave"):
        ValidationClips(str(tmp_path)).setup(None, SimpleNamespace(backbone=BACKBONES["svd"]), "fit")
