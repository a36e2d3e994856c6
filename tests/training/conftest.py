import shutil

import pytest

from tests.training.parts import pipeline, write_bundle


@pytest.fixture(scope="session")
def made_bundle(tmp_path_factory):
    """Folder of an untrained tiny bundle with its backbone; never write to it."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    write_bundle(folder, pipeline())
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where encoded clips are kept over tests."""
    return tmp_path_factory.mktemp("encoded")


@pytest.fixture
def bundle(made_bundle, tmp_path):
    """A copy that a training may write to."""
    return shutil.copytree(made_bundle, tmp_path / "bundle")
