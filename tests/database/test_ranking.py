"""Ranking against brute force, ties, and weights."""

import tracemalloc

import numpy as np
import pytest

from motionrag.database.index import VectorIndex
from motionrag.database.keys import ROW_KEY
from motionrag.database.ranking import normalised_weights, rank


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def keys(numbers):
    made = np.zeros(len(numbers), ROW_KEY)
    made["id"] = [f"{number:032x}".encode() for number in numbers]
    return made


def brute_force(vectors, held, queries, weights, k, allowed=None):
    """Ids and scores by the definition, in double precision."""
    total = np.zeros(len(next(iter(vectors.values()))))
    for key, array in vectors.items():
        total += weights[key] * np.where(held[key], array.astype(np.float64) @ queries[key].astype(np.float64), 0)
    candidates = np.arange(len(total)) if allowed is None else np.asarray(allowed)
    order = candidates[np.lexsort((candidates, -np.round(total[candidates], 6)))][:k]
    return [f"{number:032x}" for number in order], total[order]


@pytest.fixture(scope="module")
def parts():
    generator = np.random.default_rng(3)
    vectors = {key: unit(generator.standard_normal((500, 12))) for key in ("text", "image", "motion")}
    held = {"text": generator.random(500) < 0.6, "image": np.ones(500, bool), "motion": np.ones(500, bool)}
    queries = {key: unit(generator.standard_normal(12)) for key in vectors}
    return vectors, held, queries


@pytest.mark.parametrize("factory", [None, "HNSW16", "IVF8,Flat"])
@pytest.mark.parametrize("use", [("text", "image"), ("text", "image", "motion")])
@pytest.mark.parametrize("k", [1, 9, 700])
def test_mixed_keys_are_ranked_exactly(parts, factory, use, k):
    vectors, held, queries = parts
    indexes = {key: VectorIndex.build(vectors[key][held[key]], keys(np.flatnonzero(held[key])), factory) for key in use}
    weights = normalised_weights({key: 1.0 + number for number, key in enumerate(use)}, use)
    chosen = {key: queries[key] for key in use}
    hits = rank(indexes, chosen, weights, k)
    expected, scores = brute_force({key: vectors[key] for key in use}, held, queries, weights, k)
    assert [hit.id for hit in hits] == expected
    np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-6)
    for hit in hits[:9]:
        assert hit.score == pytest.approx(sum(weights[key] * hit.scores[key] for key in use), abs=1e-6)


def test_only_some_rows(parts):
    vectors, held, queries = parts
    indexes = {"motion": VectorIndex.build(vectors["motion"], keys(range(500)))}
    allowed = np.arange(0, 500, 7)
    ids = keys([*allowed, 9999])["id"]  # an id that the index does not hold is no candidate
    hits = rank(indexes, {"motion": queries["motion"]}, {"motion": 1.0}, 20, ids)
    expected, _ = brute_force({"motion": vectors["motion"]}, held, queries, {"motion": 1.0}, 20, allowed)
    assert [hit.id for hit in hits] == expected
    assert rank(indexes, {"motion": queries["motion"]}, {"motion": 1.0}, 5, ids[:0]) == []


@pytest.mark.parametrize("k", [1, 5, 40, 99, 100, 101])
def test_ties_do_not_depend_on_the_order_of_storage(k):
    """A hundred equal captions among others: by id, whatever the order of the rows and wherever k cuts."""
    generator = np.random.default_rng(5)
    vectors = np.repeat(unit(generator.standard_normal((1, 33))), 100, axis=0)
    vectors = np.concatenate([vectors, unit(generator.standard_normal((300, 33)))])
    query = unit(vectors[0] + 0.2 * unit(generator.standard_normal(33)))
    results = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(vectors))
        index = VectorIndex.build(vectors[order], keys(order))
        results.append([(hit.id, hit.score) for hit in rank({"text": index}, {"text": query}, {"text": 1.0}, k)])
    assert all(result == results[0] for result in results)
    assert [hit for hit, _ in results[0]][:100] == [f"{number:032x}" for number in range(min(k, 100))]


def test_removed_rows_are_not_found(parts):
    vectors, _, queries = parts
    index = VectorIndex.build(vectors["motion"], keys(range(500)))
    first = rank({"motion": index}, {"motion": queries["motion"]}, {"motion": 1.0}, 3)
    masked = index.masked(index.positions_of(np.array([first[0].id.encode()])))
    for indexes in ({"motion": masked}, {"motion": masked, "image": masked}):
        weights = normalised_weights(None, list(indexes))
        hits = rank(indexes, dict.fromkeys(indexes, queries["motion"]), weights, 2)
        assert [hit.id for hit in hits] == [hit.id for hit in first[1:]]


def test_empty_index():
    empty = VectorIndex.build(np.empty((0, 4), np.float32), keys([]))
    assert rank({"text": empty}, {"text": unit(np.ones(4))}, {"text": 1.0}, 9) == []


def test_normalised_weights():
    assert normalised_weights(None, ["text", "image"]) == {"text": 0.5, "image": 0.5}
    assert normalised_weights({"image": 3, "text": 1}, ["text", "image"]) == {"text": 0.25, "image": 0.75}
    assert normalised_weights({"image": 0, "text": 1}, ["text", "image"]) == {"text": 1.0, "image": 0.0}


@pytest.mark.parametrize(
    "weights",
    [
        {"text": 1},
        {"text": 1, "image": 1, "motion": 1},
        {"text": 1, "image": -1},
        {"text": 0, "image": 0},
        {"text": 1, "image": float("nan")},
        {"text": 1, "image": float("inf")},
        {"text": 1, "image": "1"},
        {},
    ],
)
def test_wrong_weights(weights):
    with pytest.raises(ValueError, match="number of 0 or more to each of text, image, not all 0; got"):
        normalised_weights(weights, ["text", "image"])


def test_a_mix_over_many_rows_is_exact():
    chance = np.random.default_rng(0)
    keys = np.zeros(20_000, ROW_KEY)
    keys["id"] = [f"{number:032x}".encode() for number in range(len(keys))]
    vectors, queries = {}, {}
    for key in ("text", "image"):
        drawn = chance.standard_normal((len(keys) + 1, 8), dtype=np.float32)
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        vectors[key], queries[key] = drawn[1:], drawn[0]
    vectors = {key: np.repeat(each[:10_000], 2, axis=0) for key, each in vectors.items()}  # every score twice
    indexes = {key: VectorIndex.build(each, keys) for key, each in vectors.items()}
    weights = {"text": 0.3, "image": 0.7}
    total = sum(weights[key] * (vectors[key].astype(np.float64) @ queries[key]) for key in vectors)
    best = np.lexsort((keys["id"], -total))[:7]
    assert [hit.id.encode() for hit in rank(indexes, queries, weights, 7)] == list(keys["id"][best])


def test_a_mix_of_more_results_than_rows_gives_all_rows():
    vectors = unit(np.random.default_rng(0).standard_normal((9000, 4)))
    index = VectorIndex.build(vectors, keys(range(9000)))
    hits = rank(
        {"text": index, "image": index}, {"text": vectors[0], "image": vectors[1]}, {"text": 0.5, "image": 0.5}, 10**4
    )
    assert len({hit.id for hit in hits}) == 9000


def test_a_mix_over_many_rows_copies_few_vectors():
    vectors = unit(np.random.default_rng(0).standard_normal((20_000, 64)))
    index = VectorIndex.build(vectors, keys(range(20_000)))
    queries = {"text": vectors[0], "image": vectors[1]}
    rank({"text": index, "image": index}, queries, {"text": 0.5, "image": 0.5}, 9)  # fills what is cached
    tracemalloc.start()
    rank({"text": index, "image": index}, queries, {"text": 0.5, "image": 0.5}, 9)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < vectors.nbytes
