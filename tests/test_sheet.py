"""Contact sheets: what is drawn where."""

import numpy as np
import pytest
from PIL import Image

from motionrag.sheet import GAP, IMAGE_GAP, MARGIN, SheetRow, contact_sheet
from tests.video_files import moving_frames

RED, BLUE = (255, 0, 0), (0, 0, 255)


def flat(count, colour=RED, size=(32, 32)):
    return np.broadcast_to(np.array(colour, np.uint8), (count, size[1], size[0], 3))


def columns_of(sheet, colour):
    """Left edges of the runs of pixel columns that hold the colour."""
    has = np.all(np.asarray(sheet) == colour, axis=-1).any(axis=0)
    return np.flatnonzero(np.diff(has.astype(int), prepend=0) == 1).tolist()


def test_tiles_are_evenly_spaced_and_sampled():
    frames = np.arange(15, dtype=np.uint8)[:, None, None, None] * 10 + np.zeros((15, 32, 32, 3), np.uint8)
    sheet = contact_sheet([SheetRow("title", frames)], columns=8, tile=64)
    lefts = [MARGIN + index * (64 + GAP) for index in range(8)]
    row = sheet.height - MARGIN - 32
    assert [sheet.getpixel((left + 32, row))[0] for left in lefts] == list(range(0, 150, 20))
    assert sheet.width == lefts[-1] + 64 + MARGIN
    assert sheet.getpixel((lefts[0] + 64 + GAP // 2, row)) == (255, 255, 255)


def test_short_clip_shows_each_frame_once():
    assert len(columns_of(contact_sheet([SheetRow("title", flat(3))], columns=8, tile=64), RED)) == 3


def test_query_image_is_shown_once_and_frames_stay_aligned():
    with_image = SheetRow("with", flat(2), image=Image.new("RGBA", (32, 32), BLUE))
    sheet = contact_sheet([with_image, SheetRow("without", flat(3))], columns=4, tile=64)
    assert columns_of(sheet, BLUE) == [MARGIN]
    start = MARGIN + 64 + IMAGE_GAP
    assert columns_of(sheet, RED) == [start + index * (64 + GAP) for index in range(3)]


@pytest.mark.parametrize(("size", "shown"), [((64, 32), (64, 32)), ((32, 64), (32, 64)), ((10, 10), (64, 64))])
def test_pictures_keep_their_shape(size, shown):
    sheet = contact_sheet([SheetRow("title", flat(1, size=size))], tile=64)
    red = np.argwhere(np.all(np.asarray(sheet) == RED, axis=-1))
    height, width = red.max(axis=0) - red.min(axis=0) + 1
    assert (width, height) == shown


def test_labels_are_drawn_and_never_leave_the_sheet():
    frames = flat(4)
    plain = contact_sheet([SheetRow("t", frames)], tile=64)
    long = contact_sheet([SheetRow("a long title " * 60, frames, caption="word " * 500)], tile=64)
    one_word = contact_sheet([SheetRow("x" * 3000, frames)], tile=64)
    assert plain.width == long.width == one_word.width
    assert plain.height == one_word.height < long.height < plain.height + 60
    for sheet in (long, one_word):
        margin = np.asarray(sheet)[:, -MARGIN:]
        assert np.all(margin == 255)
        assert np.any(np.asarray(sheet)[MARGIN : MARGIN + 15, MARGIN:-MARGIN] < 100)


def test_images_and_arrays_give_the_same_sheet():
    frames = moving_frames(5)
    images = [Image.fromarray(frame) for frame in frames]
    np.testing.assert_array_equal(contact_sheet([SheetRow("t", frames)]), contact_sheet([SheetRow("t", images)]))


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([])
    with pytest.raises(ValueError, match="row 'title' of the contact sheet has no frames"):
        contact_sheet([SheetRow("title", [])])
    for wrong in ({"columns": 0}, {"tile": 4}):
        with pytest.raises(ValueError, match="needs 1 column and tiles of 16 pixels"):
            contact_sheet([SheetRow("title", flat(2))], **wrong)
