"""Diffusers warns of an `AutoencoderKL` in place of SVD's own, though SVD's pipeline takes it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

LOGGER = "diffusers.pipelines.pipeline_utils"


@contextmanager
def quiet_about_autoencoder() -> Iterator[None]:
    """Inside the block that one warning is left out.

    Yields:
        Nothing.
    """
    logger = logging.getLogger(LOGGER)
    keep = partial(_is_of_something_else)  # one for each block: blocks in other threads end when they end
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _is_of_something_else(record: logging.LogRecord) -> bool:
    expected, _, found = record.getMessage().partition(", got ")
    is_svd = expected.startswith("Expected types for vae:") and "AutoencoderKLTemporalDecoder" in expected
    return not (is_svd and ".AutoencoderKL'>" in found)
