"""SVD with an autoencoder of another class loads without a word of it, and with every other word."""

import logging

import diffusers
import pytest

from motionrag.backbones.quiet import LOGGER, quiet_about_autoencoder
from motionrag.training.encoded import load_pipeline
from tests.training.parts import svd_pipeline


class Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def messages():
    logger, kept = logging.getLogger(LOGGER), Kept()
    logger.addHandler(kept)
    yield kept.messages
    logger.removeHandler(kept)


def test_diffusers_warns_and_we_do_not(messages, tmp_path):
    pipeline = svd_pipeline()
    pipeline.vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    pipeline.save_pretrained(tmp_path)
    diffusers.StableVideoDiffusionPipeline.from_pretrained(tmp_path)
    assert [message for message in messages if "Expected types for vae" in message]
    messages.clear()
    _, loaded = load_pipeline(str(tmp_path), frozen=True)
    assert isinstance(loaded.vae, diffusers.AutoencoderKL)
    assert not [message for message in messages if "Expected types for vae" in message]


def test_every_other_warning_stays(messages):
    logger = logging.getLogger(LOGGER)
    with quiet_about_autoencoder():
        logger.warning("Expected types for unet: AutoencoderKLTemporalDecoder, got another.")
        logger.warning("Expected types for vae: AutoencoderKLWan, got another.")
        logger.warning(
            "Expected types for vae: AutoencoderKLTemporalDecoder, got <class 'diffusers.AutoencoderKLWan'>."
        )
    assert len(messages) == 3


def test_a_block_that_ends_leaves_the_others_theirs(messages):
    known = "Expected types for vae: AutoencoderKLTemporalDecoder, got <class 'diffusers.AutoencoderKL'>."
    with quiet_about_autoencoder():
        with quiet_about_autoencoder():
            pass
        logging.getLogger(LOGGER).warning(known)
    assert not messages
    logging.getLogger(LOGGER).warning(known)
    assert messages == [known]
