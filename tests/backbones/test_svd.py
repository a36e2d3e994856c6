"""Size and frame rules of Stable Video Diffusion, checked against what diffusers itself makes."""

import pytest
import torch
from PIL import Image

from motionrag.backbones import BACKBONES
from tests.training.parts import svd_pipeline


@pytest.fixture(scope="module")
def pipe():
    made = svd_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def size(pipe, *wanted):
    return BACKBONES["svd"].output_size(pipe, *wanted)


def test_own_size_is_that_of_the_published_weights(pipe):
    assert size(pipe, None, None, None) == (576, 1024, 3)
    assert size(pipe, 32, None, 2) == (32, 1024, 2)


@torch.no_grad()
@pytest.mark.parametrize("wanted", [(16, 24, 3), (32, 16, 2), (8, 8, 2)])
def test_diffusers_makes_every_size_that_we_accept(pipe, wanted):
    height, width, num_frames = size(pipe, *wanted)
    video = pipe(
        Image.new("RGB", (width, height), "orange"), height, width, num_frames, num_inference_steps=1, output_type="np"
    ).frames
    assert video.shape == (1, num_frames, height, width, 3)


@torch.no_grad()
@pytest.mark.parametrize(("wanted", "nearest"), [((18, 16), "16×16"), ((16, 30), "16×32"), ((1, 16), "4×16")])
def test_another_size_is_refused_with_the_nearest_valid_one(pipe, wanted, nearest):
    with pytest.raises(ValueError, match=rf"cannot make {wanted[0]}×{wanted[1]} .*nearest valid size is {nearest}\."):
        size(pipe, *wanted, None)


def test_more_frames_than_it_was_trained_on_are_refused(pipe):
    with pytest.raises(ValueError, match="4 frames, and was trained on 3 at most; the nearest valid number is 3"):
        size(pipe, 16, 16, 4)
    with pytest.raises(ValueError, match="cannot make 1 frames; the nearest valid number is 2"):
        size(pipe, 16, 16, 1)
