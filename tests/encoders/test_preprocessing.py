"""Preprocessing against the libraries' own processors, and its behaviour on bad pixels and bad files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from motionrag.encoders import preprocessing
from motionrag.encoders.preprocessing import (
    center_crop,
    check_pixels,
    frames_to_tensor,
    image_to_tensor,
    letterbox,
    normalise,
    resize,
    resize_shorter_side,
)

SIZES = [(37, 91), (360, 640), (224, 224), (301, 225), (91, 37)]  # height, width


def photo(height, width, seed=0):
    """A picture with soft shapes, a hard edge and some noise, uint8 (h w 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    soft = 127 + 100 * np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 13)], axis=-1)
    soft[y > x] = 255 - soft[y > x]
    return np.clip(soft + rng.normal(0, 8, soft.shape), 0, 255).astype(np.uint8)


def unit(array):
    return torch.tensor(array).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [32, 224, 256])
def test_longer_side_is_rounded_as_transformers_and_torchvision_do(size, target):
    from torchvision.transforms.v2.functional import resize as torchvision_resize
    from transformers.image_transforms import get_resize_output_image_size

    image = torch.rand(3, *size)
    ours = resize_shorter_side(image, target, "bilinear")
    theirs = torchvision_resize(image, [target], antialias=True)
    expected = get_resize_output_image_size(
        image.numpy(), target, default_to_square=False, input_data_format="channels_first"
    )
    assert ours.shape[-2:] == theirs.shape[-2:] == tuple(expected)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("image_size", [(10, 11), (11, 10), (13, 20), (5, 20), (5, 6), (8, 8), (9, 15)])
def test_center_crop_places_odd_margins_like_each_library(image_size):
    from torchvision.transforms.v2.functional import center_crop as torchvision_crop
    from transformers import BitImageProcessor
    from transformers.image_utils import SizeDict

    image = torch.rand(3, *image_size)
    assert torch.equal(center_crop(image, (8, 8), odd_margin="even"), torchvision_crop(image, [8, 8]))
    theirs = BitImageProcessor().center_crop(image, SizeDict(height=8, width=8))
    assert torch.equal(center_crop(image, (8, 8)), theirs)


def test_resize_keeps_leading_dimensions_and_treats_each_image_alone():
    video = torch.rand(2, 3, 3, 20, 30)
    together = resize(video, (16, 24), "bicubic")
    assert together.shape == (2, 3, 3, 16, 24)
    torch.testing.assert_close(together[1, 2], resize(video[1, 2], (16, 24), "bicubic"), atol=1e-6, rtol=0)


def test_bicubic_stays_within_the_range_of_pixels():
    step = torch.zeros(1, 3, 16, 16)
    step[..., 8:] = 1
    resized = resize(step, (31, 31), "bicubic")
    assert resized.min() == 0
    assert resized.max() == 1


def test_letterbox_keeps_the_whole_frame_between_black_bars():
    frame = torch.ones(1, 3, 18, 32)
    boxed = letterbox(frame, 16, "bilinear")
    assert boxed.shape == (1, 3, 16, 16)
    rows = boxed[0, 0, :, 0]
    assert rows.tolist() == [0.0] * 3 + [1.0] * 9 + [0.0] * 4
    assert letterbox(torch.ones(1, 3, 1, 300), 16, "bilinear").shape == (1, 3, 16, 16)


def test_normalise_gives_the_statistics_it_is_told():
    images = torch.tensor([0.2, 0.5, 0.8])[:, None, None].expand(3, 4, 4)
    assert torch.allclose(normalise(images, [0.2, 0.5, 0.8], [1, 2, 3]), torch.zeros(3, 4, 4))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating-point"),
        (np.zeros((1, 3, 8, 8), np.float32), "floating-point"),
        (torch.zeros(3, 8, 8), r"\(b c h w\)"),
        (torch.zeros(1, 4, 8, 8), "c = 3"),
        (torch.zeros(0, 3, 8, 8), "empty"),
        (torch.full((1, 3, 8, 8), 255.0), "in \\[-1, 1\\]"),
        (torch.tensor([[[[0.0, float("nan")]]]]).expand(1, 3, 1, 2), "finite"),
        (torch.tensor([[[[0.0, float("inf")]]]]).expand(1, 3, 1, 2), "finite"),
    ],
)
def test_bad_pixels_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        check_pixels(pixels, layout="b c h w")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_dtype_is_accepted(dtype):
    check_pixels(torch.rand(1, 3, 4, 4, dtype=dtype) * 2 - 1, layout="b c h w")


def test_frames_become_a_video_in_range():
    frames = np.zeros((2, 3, 4, 3), np.uint8)
    frames[1, 2, 3] = (0, 127, 255)
    video = frames_to_tensor(frames)
    assert video.shape == (2, 3, 3, 4)
    assert video.dtype == torch.float32
    torch.testing.assert_close(video[1, :, 2, 3], torch.tensor([-1.0, -1 / 255, 1.0]))
    for bad in (frames.astype(np.float32), frames[0], frames[..., :2]):
        with pytest.raises(ValueError, match="uint8"):
            frames_to_tensor(bad)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_modes_are_converted_as_diffusers_does(mode, tmp_path):
    from diffusers.utils import load_image

    image = Image.fromarray(photo(9, 13)).convert("RGB")
    if mode == "LA":
        image = image.convert("L")
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    image.convert(mode).save(path)
    expected = unit(np.asarray(load_image(str(path)))) * 2 - 1
    assert torch.equal(image_to_tensor(path), expected)
    assert torch.equal(image_to_tensor(Image.open(path)), expected)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    Image.fromarray(photo(8, 12)).save(tmp_path / "turned.png", exif=exif)
    upright = torch.rot90(unit(photo(8, 12)), -1, (1, 2)) * 2 - 1
    assert torch.equal(image_to_tensor(tmp_path / "turned.png"), upright)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 32768], [257, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    expected = torch.from_numpy(grey.astype(np.float32)) / 65535 * 2 - 1
    for image in (tmp_path / "deep.png", grey, Image.fromarray(grey.astype(np.int32))):
        torch.testing.assert_close(image_to_tensor(image), expected.expand(3, 2, 2))


def test_integer_and_float_modes_of_unknown_range_are_refused():
    with pytest.raises(ValueError, match="16 bits"):
        image_to_tensor(Image.fromarray(np.array([[70000]], np.int32)))
    with pytest.raises(ValueError, match="fixed range"):
        image_to_tensor(Image.fromarray(np.array([[0.5]], np.float32)))


def test_arrays():
    assert torch.equal(image_to_tensor(photo(5, 6)), unit(photo(5, 6)) * 2 - 1)
    with_alpha = np.concatenate([photo(5, 6), photo(5, 6)[..., :1]], axis=-1)
    assert torch.equal(image_to_tensor(with_alpha), image_to_tensor(photo(5, 6)))
    half = image_to_tensor(np.full((4, 5), 0.5, np.float64))
    assert half.shape == (3, 4, 5)
    assert half.abs().max() == 0
    for bad in (np.full((4, 5, 3), 2.0), np.zeros((4, 5, 3), np.int64), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match="float in"):
            image_to_tensor(bad)
    for bad in (np.zeros((4, 5, 2), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="image array must be"):
            image_to_tensor(bad)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF"])
def test_truncated_files_are_errors_that_name_the_file(format, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(photo(64, 64)).save(buffer, format)
    content = buffer.getvalue()
    path = tmp_path / "broken"
    path.write_bytes(content)
    assert image_to_tensor(path).shape == (3, 64, 64)
    for share in (0.02, 0.3, 0.6, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match="broken"):
            image_to_tensor(path)


def test_other_formats_and_missing_files_are_refused(tmp_path):
    (tmp_path / "note.png").write_text("not an image")
    Image.fromarray(photo(8, 8)).save(tmp_path / "page.pdf")
    for name in ("note.png", "page.pdf"):
        with pytest.raises(ValueError, match=f"{name}: not an image"):
            image_to_tensor(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        image_to_tensor(tmp_path / "absent.png")


def test_the_pixel_limit_is_checked_before_decoding(tmp_path, monkeypatch):
    Image.fromarray(photo(20, 20)).save(tmp_path / "large.png")
    content = (tmp_path / "large.png").read_bytes()
    (tmp_path / "large.png").write_bytes(content[:60])  # decoding would fail
    monkeypatch.setattr(preprocessing, "MAX_IMAGE_PIXELS", 399)
    with pytest.raises(ValueError, match=r"large.png: 20x20 pixels; the limit is 399"):
        image_to_tensor(tmp_path / "large.png")
    header = (tmp_path / "large.png").read_bytes()
    huge = header[:16] + (60000).to_bytes(4, "big") * 2 + header[24:29]
    import zlib

    (tmp_path / "bomb.png").write_bytes(huge + zlib.crc32(huge[12:29]).to_bytes(4, "big") + header[33:])
    with pytest.raises(ValueError, match=r"bomb.png: .*limit"):
        image_to_tensor(tmp_path / "bomb.png")
