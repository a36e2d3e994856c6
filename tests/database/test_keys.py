"""Finding ids: against a dictionary, and when all hashes collide."""

import numpy as np
import pytest

from motionrag.database.keys import IdLookup


@pytest.mark.parametrize("collide", [False, True])
def test_lookup_is_a_dictionary(monkeypatch, collide):
    if collide:
        monkeypatch.setattr("motionrag.database.keys._hashes", lambda ids: np.zeros(len(ids), np.uint64))
    generator = np.random.default_rng(0)
    ids = np.array([f"{number:032x}".encode() for number in generator.choice(1000, 300, replace=False)], "S32")
    expected = {row: place for place, row in enumerate(ids)}
    wanted = np.array([f"{number:032x}".encode() for number in generator.choice(1000, 500)], "S32")
    assert IdLookup(ids).positions(wanted).tolist() == [expected.get(row, -1) for row in wanted]


def test_empty():
    none = np.empty(0, "S32")
    assert IdLookup(none).positions(np.array([b"a" * 32])).tolist() == [-1]
    assert IdLookup(np.array([b"a" * 32])).positions(none).tolist() == []
