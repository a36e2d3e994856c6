"""The table in docs/backbones.md is what the tests assert."""

from importlib import import_module
from pathlib import Path

from tests.backbones.every.families import FAMILIES
from tests.backbones.support import ASSERTED, DOCUMENT, FAMILY_NAMES, SUPPORT, with_table


def test_every_cell_is_asserted_by_a_test():
    for file in Path(__file__).parent.glob("test_*.py"):
        import_module(f"{__package__}.{file.stem}")
    assert set(SUPPORT) == ASSERTED
    assert all(tuple(row) == FAMILY_NAMES for row in SUPPORT.values())
    assert tuple(FAMILIES) == FAMILY_NAMES


def test_the_document_shows_the_table():
    text = DOCUMENT.read_text()
    assert with_table(text) == text, "run python -m tests.backbones.support"
