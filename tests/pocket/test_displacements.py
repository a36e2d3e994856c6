"""The words with which captions tell how things move."""

import torch

from motionrag.pocket.displacements import FRAMES, LEVELS, STEP, WORDS, describe, vectors


def track(*ends):
    """Straight from the middle to an end `(x, y)` in pixels, for each thing alike."""
    return torch.tensor([32.0, 32.0]) + torch.linspace(0, 1, 17)[:, None] * torch.tensor(ends)


def test_a_track_is_told_by_its_displacements():
    words = describe(track(40.0, -20.0)).removeprefix("<").removesuffix(">").split("><")
    assert [f"<{word}>" in WORDS for word in words] == [True] * 12
    said = {(int(word[1]), word[2]): (int(word[3:]) - LEVELS / 2) * STEP for word in words}
    for time, frame in enumerate(FRAMES):
        for axis, end in (("x", 40.0), ("y", -20.0)):
            true = min(end * frame / 16, 39.9)
            assert said[time, axis] <= true < said[time, axis] + STEP


def test_the_start_does_not_matter_and_what_leaves_the_frame_is_at_the_border():
    assert describe(track(15.0, 5.0)) == describe(track(15.0, 5.0) + 20)
    assert describe(track(900.0, -900.0)).endswith(f"<t5x{LEVELS - 1:02d}><t5y00>")


def test_words_that_say_nearly_the_same_have_vectors_that_are_nearly_the_same():
    codes = dict(zip(WORDS, vectors(32), strict=True))
    here, near, far = (codes[f"<t2x{level:02d}>"] for level in (5, 6, 14))
    other_time, other_axis = codes["<t3x05>"], codes["<t2y05>"]
    assert (here - near).norm() < 0.6 * min((here - each).norm() for each in (far, other_time, other_axis))
    assert torch.stack(list(codes.values())).unique(dim=0).shape[0] == len(WORDS)
