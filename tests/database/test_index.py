"""The vector index against numpy, and its files under damage, kills and mix-ups."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from motionrag.database import faiss_kinds, index_file
from motionrag.database.index import EXACT_UP_TO, VectorIndex, default_factory
from motionrag.database.index_file import IndexUnusable
from motionrag.database.keys import ROW_KEY

WIDTH = 16


def unit(count, seed=0, width=WIDTH):
    vectors = np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def keys(numbers, revision=0):
    return np.array([(f"{number:032x}".encode(), revision) for number in numbers], ROW_KEY)


def brute(vectors, query, k, allowed=None):
    scores = vectors @ query
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    return np.argsort(-scores)[:k]


@pytest.fixture
def stored(tmp_path):
    index = VectorIndex.build(unit(500), keys(range(500)))
    index_file.save(index, tmp_path, "text", database_id="one", table_version=7)
    return tmp_path


def load(folder, **changes):
    return index_file.load(folder, "text", **{"database_id": "one", "dimension": WIDTH} | changes)


@pytest.mark.parametrize("factory", [None, "Flat", "IVF8,Flat", "HNSW16", "SQ8", "PCA12,IVF8,Flat", "IVF4,PQ8x4"])
def test_kinds_search_add_mask_and_reload(tmp_path, factory):
    vectors = unit(700)
    index = VectorIndex.build(vectors[:600], keys(range(600)), factory)
    index = index.extended(vectors[600:], keys(range(600, 700)))
    index = index.masked(np.arange(50))
    index_file.save(index, tmp_path, "text", database_id="one", table_version=1)
    mapped = load(tmp_path)
    queries = unit(40, seed=1)
    allowed = np.random.default_rng(2).random(700) < 0.5
    for each in (index, mapped):
        assert (len(each), each.alive.sum(), each.dimension) == (700, 650, WIDTH)
        for mask in (None, allowed):
            scores, positions = each.search(queries, 9, mask)
            assert scores.shape == positions.shape == (40, 9)
            assert (positions >= 50).all()
            assert mask is None or mask[positions].all()
            assert (np.diff(scores, axis=1) <= 1e-6).all()
            usable = each.alive if mask is None else mask & each.alive
            truth = [brute(vectors, query, 9, usable) for query in queries]
            found = np.mean([len(np.intersect1d(*pair)) / 9 for pair in zip(positions, truth, strict=True)])
            assert found >= (0.95 if factory in (None, "Flat", "IVF8,Flat", "HNSW16") else 0.3)
        assert each.spot_check(np.array([60, 699]), vectors[[60, 699]])
        assert not each.spot_check(np.array([60, 699]), vectors[[61, 699]])
        again = each.extended(unit(3, seed=9), keys(range(800, 803)))  # a mapped index is copied first
        assert len(again) == len(each) + 3
        assert again.search(unit(1, seed=9), 1)[1][0, 0] == 700


def test_flat_is_exact():
    vectors = unit(3000)
    index = VectorIndex.build(vectors, keys(range(3000)))
    assert (index.factory, index.is_exact, index.recall) == ("Flat", True, 1.0)
    for query in unit(20, seed=1):
        scores, positions = index.search(query[None], 9)
        truth = brute(vectors, query, 9)
        assert positions[0].tolist() == truth.tolist()
        np.testing.assert_allclose(scores[0], vectors[truth] @ query, atol=1e-6)
        np.testing.assert_allclose(index.scores(query, truth), scores[0], atol=1e-6)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16"])
def test_scores_of_chosen_positions(factory, monkeypatch):
    monkeypatch.setattr("motionrag.database.index._CHUNK_ROWS", 64)
    vectors, query = unit(300), unit(1, seed=1)[0]
    index = VectorIndex.build(vectors, keys(range(300)), factory)
    for positions in ([], [299], [5, 5, 0], np.random.default_rng(0).permutation(300)[::-1]):
        chosen = np.array(positions, np.int64)
        np.testing.assert_allclose(index.scores(query, chosen), vectors[chosen] @ query, atol=1e-6)
    for wrong in (-1, 300):
        with pytest.raises(ValueError, match="positions must lie in 0 … 299"):
            index.scores(query, np.array([0, wrong]))


def test_mask_edges():
    index = VectorIndex.build(unit(100), keys(range(100)), "IVF8,Flat")
    query = unit(2, seed=1)
    allowed = np.zeros(100, bool)
    assert index.search(query, 5, allowed)[1].shape == (2, 0)
    allowed[[7, 8, 9]] = True
    assert sorted(index.search(query, 5, allowed)[1][1]) == [7, 8, 9]
    assert index.search(query, 1000)[1].shape == (2, 100)
    assert sorted(index.search(query, 1000)[1][0]) == list(range(100))
    with pytest.raises(ValueError, match=r"allowed must be \(100,\) bool"):
        index.search(query, 5, np.arange(3))
    with pytest.raises(ValueError, match="k must be at least 1"):
        index.search(query, 0)
    with pytest.raises(ValueError, match="not finite"):
        index.search(query * np.nan, 5)
    with pytest.raises(ValueError, match=r"queries must be \(q, 16\)"):
        index.search(query[:, :3], 5)


def test_approximate_search_under_a_wide_mask_finds_all(monkeypatch):
    """When the lists visited hold too few allowed vectors, the rest is compared directly."""
    monkeypatch.setattr("motionrag.database.index._COMPARE_ALL_UP_TO", 0)
    vectors = unit(2000)
    index = VectorIndex.build(vectors, keys(range(2000)), "IVF64,Flat")
    index.effort = 1
    allowed = np.zeros(2000, bool)
    allowed[::100] = True
    for query in unit(20, seed=1):
        assert index.search(query[None], 9, allowed)[1][0].tolist() == brute(vectors, query, 9, allowed).tolist()


@pytest.mark.parametrize("factory", ["IVF64,Flat", "HNSW32"])
def test_recall_of_approximate_kinds(factory):
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((50, 32))
    points = centres[generator.integers(50, size=6200)] + 0.5 * generator.standard_normal((6200, 32))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    vectors, queries = points[:6000], points[6000:]
    index = VectorIndex.build(vectors, keys(range(6000)), factory)
    assert not index.is_exact
    assert index.recall >= 0.98
    positions = index.search(queries, 9)[1]
    truth = [brute(vectors, query, 9) for query in queries]
    assert np.mean([len(np.intersect1d(*pair)) / 9 for pair in zip(positions, truth, strict=True)]) >= 0.95


def test_default_factory():
    assert default_factory(0) == default_factory(EXACT_UP_TO) == "Flat"
    assert default_factory(EXACT_UP_TO + 1) == "IVF512,Flat"
    assert default_factory(1_000_000) == "IVF2048,Flat"


@pytest.mark.parametrize("factory", ["Nope", "IVF,Flat", "IVF1000,Flat", "LSH", "IDMap,Flat"])
def test_bad_factory(factory):
    with pytest.raises(ValueError, match=factory):
        VectorIndex.build(unit(100), keys(range(100)), factory)


def test_bad_vectors_and_keys():
    vectors, names = unit(5), keys(range(5))
    with pytest.raises(ValueError, match="float32"):
        VectorIndex.build(vectors.astype(np.float64), names)
    with pytest.raises(ValueError, match=r"vector 2 \(0+2\) has length 2"):
        VectorIndex.build(vectors * np.array([[1], [1], [2], [1], [1]], np.float32), names)
    with pytest.raises(ValueError, match="vector 0"):
        VectorIndex.build(vectors * np.float32("nan"), names)
    with pytest.raises(ValueError, match="keys must be"):
        VectorIndex.build(vectors, names[:4])
    with pytest.raises(ValueError, match="all different"):
        VectorIndex.build(vectors, names[[0, 1, 2, 3, 3]])


def test_empty_index(tmp_path):
    index = VectorIndex.build(np.empty((0, WIDTH), np.float32), keys([]))
    assert index.search(unit(2), 5)[1].shape == (2, 0)
    index_file.save(index, tmp_path, "text", database_id="one", table_version=1)
    loaded = load(tmp_path)
    grown, done = loaded.synced(keys(range(3)), lambda rows: unit(3)[rows])
    assert (done, len(grown)) == ("updated", 3)


def test_sync_against_a_model():
    """Random tables: after each sync the index holds exactly the table's rows, with their own vectors."""
    generator = np.random.default_rng(0)
    table = dict.fromkeys(range(60), 0)

    def vector(key):
        return unit(1, seed=int(key["id"], 16) * 1000 + int(key["revision"]))[0]

    def current():
        names = [(f"{number:032x}".encode(), revision) for number, revision in table.items()]
        return np.array(names, ROW_KEY)[generator.permutation(len(table))]

    fetched = []
    index, seen = VectorIndex.build(np.empty((0, WIDTH), np.float32), keys([])), set()
    for _ in range(40):
        rows = current()

        def fetch(positions, rows=rows):
            fetched.extend(positions)
            return np.stack([vector(rows[position]) for position in positions])

        fetched.clear()
        before = index
        index, done = index.synced(rows, fetch)
        seen.add(done)
        assert done != "unchanged" or (index is before and not fetched)
        assert done != "updated" or len(fetched) < len(table) or len(before) == 0
        assert sorted(index.keys[index.alive].tolist()) == sorted(rows.tolist())
        alive = np.flatnonzero(index.alive)
        assert index.spot_check(alive, np.stack([vector(key) for key in index.keys[alive]]))
        assert index.alive.mean() >= 0.8
        places = index.positions_of(np.append(rows["id"], keys([10**6])["id"]))
        assert (index.keys[places[:-1]] == rows).all()
        assert places[-1] == -1
        change = generator.integers(4)
        numbers = generator.choice(100, 4, replace=False)
        for number in numbers.tolist():
            if change == 0:
                table.pop(number, None)
            elif change == 1:
                table[number] = table.get(number, 0) + 1
            elif change == 2:
                table.setdefault(number, 0)
    assert seen == {"unchanged", "updated", "rebuilt"}


def test_sync_follows_the_factory(monkeypatch):
    vectors = unit(300)
    index, done = VectorIndex.build(vectors, keys(range(300))).synced(keys(range(300)), vectors.__getitem__, "HNSW16")
    assert (done, index.factory) == ("rebuilt", "HNSW16")
    monkeypatch.setattr("motionrag.database.index.EXACT_UP_TO", 250)
    monkeypatch.setattr("motionrag.database.index.default_factory", lambda n: "Flat" if n <= 250 else "IVF4,Flat")
    small = VectorIndex.build(vectors[:250], keys(range(250)))
    grown, done = small.synced(keys(range(300)), vectors.__getitem__)
    assert (small.factory, done, grown.factory) == ("Flat", "rebuilt", "IVF4,Flat")


def test_removed_rows_stay_removed_after_reloading(tmp_path):
    index = VectorIndex.build(unit(100), keys(range(100))).masked(np.array([3]))
    index_file.save(index, tmp_path, "text", database_id="one", table_version=1)
    loaded = load(tmp_path)
    rest = np.delete(keys(range(100)), 3)
    assert loaded.synced(rest, unit(100).__getitem__) == (loaded, "unchanged")
    assert 3 not in loaded.search(unit(100)[3:4], 99)[1]
    back, done = loaded.synced(keys(range(100)), lambda rows: unit(100)[rows])
    assert done == "updated"
    assert back.search(unit(100)[3:4], 1)[1].tolist() == [[100]]


def test_searching_while_another_thread_publishes(stored):
    """A holder swaps whole indexes; a search sees one or the other."""
    holder = {"index": load(stored)}
    stop, errors = threading.Event(), []
    query = unit(500)[5:6]

    def search():
        while not stop.is_set():
            index = holder["index"]
            scores, positions = index.search(query, 9)
            if positions[0, 0] != 5 or positions.max() >= len(index):
                errors.append((scores, positions))

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(30):
        holder["index"] = holder["index"].extended(
            unit(5, seed=step + 1), keys(range(1000 + 5 * step, 1005 + 5 * step))
        )
        index_file.save(holder["index"], stored, "text", database_id="one", table_version=step)
        if step % 3 == 0:
            holder["index"] = load(stored)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []


def test_missing_and_foreign_files(stored, tmp_path):
    assert index_file.read_sidecar(stored, "text").table_version == 7
    with pytest.raises(IndexUnusable, match="database_id is 'one', expected 'two'"):
        load(stored, database_id="two")
    with pytest.raises(IndexUnusable, match="dimension is 16, expected 32"):
        load(stored, dimension=32)
    for suffix in (".faiss", ".keys.npy", ".json"):
        copy = tmp_path / f"without{suffix}"
        copy.mkdir()
        for file in stored.glob("text.*"):
            if not file.name.endswith(suffix):
                shutil.copy(file, copy)
        with pytest.raises(IndexUnusable, match=f"text{suffix} is missing"):
            load(copy)


@pytest.mark.parametrize("suffix", [".faiss", ".keys.npy", ".json"])
def test_every_flipped_bit_and_cut_is_noticed(stored, suffix):
    """Damage gives IndexUnusable, unless it hit a blank of the sidecar."""
    path = stored / f"text{suffix}"
    content = path.read_bytes()
    random_ = random.Random(0)
    for trial in range(120):
        if trial < 100:
            changed = bytearray(content)
            changed[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
        else:
            changed = content[: random_.randrange(len(content))] if trial < 119 else b""
        path.write_bytes(changed)
        try:
            index = load(stored)
        except IndexUnusable:
            continue
        assert suffix == ".json"
        assert json.loads(changed) == json.loads(content)
        assert index.search(unit(500)[5:6], 1)[1].tolist() == [[5]]


@pytest.mark.parametrize(
    "sidecar", ["[]", "null", "1", '{"format": 1}', '{"sizes": 3}', "\xff", "{" * 100_000, '{"nope": 1}']
)
def test_unreadable_sidecar(stored, sidecar):
    (stored / "text.json").write_text(sidecar, encoding="latin-1")
    with pytest.raises(IndexUnusable, match="cannot be read"):
        load(stored)


def test_files_of_two_saves_are_not_mixed(stored, tmp_path):
    """Same size, other content: what a kill between two renames leaves."""
    other = tmp_path / "other"
    index_file.save(
        VectorIndex.build(unit(500, seed=3), keys(range(500))), other, "text", database_id="one", table_version=8
    )
    shutil.copy(other / "text.faiss", stored)
    with pytest.raises(IndexUnusable, match="does not match its checksum"):
        load(stored)


SAVER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_index import keys, unit
from motionrag.database import index_file
from motionrag.database.index import VectorIndex
indexes = [VectorIndex.build(unit(count, seed=count), keys(range(count), count)) for count in (20_000, 20_001, 20_002)]
print("start", flush=True)
while True:
    for index in indexes:
        index_file.save(index, Path(sys.argv[1]), "text", database_id="one", table_version=len(index))
"""


def test_killed_while_saving(tmp_path):
    """Whatever is left is one whole index, or refused."""
    random_ = random.Random(1)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "start\n"
        time.sleep(random_.uniform(0.05, 0.3))
        process.kill()
        process.wait()
        process.stdout.close()
        try:
            index = load(tmp_path)
        except IndexUnusable:
            continue
        count = index_file.read_sidecar(tmp_path, "text").table_version
        assert (index.keys == keys(range(count), count)).all()
        assert index.spot_check(np.arange(count), unit(count, seed=count))
    index_file.save(VectorIndex.build(unit(9), keys(range(9))), tmp_path, "text", database_id="one", table_version=1)
    assert len(load(tmp_path)) == 9
    assert not list(tmp_path.glob(".*.tmp"))


def test_two_faiss_distributions_are_refused(monkeypatch, tmp_path):
    info = tmp_path / "faiss_gpu-1.11.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faiss-gpu\nVersion: 1.11.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    faiss_kinds.faiss_module.cache_clear()
    with pytest.raises(ImportError, match="faiss-cpu and faiss-gpu are both installed"):
        faiss_kinds.faiss_module()


def test_no_faiss_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    faiss_kinds.faiss_module.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'motionrag\[cpu\]'"):
        faiss_kinds.faiss_module()
    faiss_kinds.faiss_module.cache_clear()
