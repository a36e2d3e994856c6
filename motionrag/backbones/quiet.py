"""Diffusers warns of an autoencoder of another class than SVD's own, though SVD's pipeline takes any of images."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = "diffusers.pipelines.pipeline_utils"


@contextmanager
def quiet_about_autoencoder() -> Iterator[None]:
    """Inside the block that one warning is left out.

    Yields:
        Nothing.
    """
    logger = logging.getLogger(LOGGER)
    logger.addFilter(_is_of_something_else)
    try:
        yield
    finally:
        logger.removeFilter(_is_of_something_else)


def _is_of_something_else(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not (message.startswith("Expected types for vae:") and "AutoencoderKLTemporalDecoder" in message)
