"""Writing aside, and the quick checksum against every kind of accident it promises to see."""

import numpy as np
import pytest

from motionrag.database.durable import sector_digest, written_aside


def test_error_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with written_aside(path) as temporary:
            temporary.write_text("ne")
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    with written_aside(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 10_000])
def test_sector_digest(tmp_path, size):
    path = tmp_path / "file"
    content = np.random.default_rng(size).integers(256, size=size, dtype=np.uint8)

    def digest(data):
        path.write_bytes(data.tobytes())
        return sector_digest(path)

    seen = {digest(content)}
    damaged = []
    for bit in range(0, 8 * size, 101):
        changed = content.copy()
        changed[bit // 8] ^= 1 << bit % 8
        damaged.append(changed)
    damaged += [content[:cut] for cut in range(0, size, 97)]
    for start in range(0, size - 1024, 512):
        swapped, zeroed, stale = content.copy(), content.copy(), content.copy()
        swapped[start : start + 1024] = np.roll(swapped[start : start + 1024], 512)
        zeroed[start : start + 512] = 0
        stale[start : start + 512] = content[:512] if start else content[512:1024]
        damaged += [swapped, zeroed, stale]
    for each in damaged:
        seen.add(digest(each))
    # The swap of the first sector with the second and the stale copies are all different contents.
    assert len(seen) == len({each.tobytes() for each in [content, *damaged]})
    assert digest(content) in seen
