"""MotionDatabase: create, open, search against brute force, delete, refuse, and repair of what is derived."""

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from motionrag.bundle import MotionBundle
from motionrag.database import DatabaseLocked, FingerprintMismatch, MotionDatabase
from motionrag.database.lock import writer_lock
from motionrag.encoder import RETRIEVAL_KEYS, MotionEncoder
from motionrag.video import Clip
from tests.database.conftest import NUM_CLIPS, all_rows, tree
from tests.video_files import make_video, moving_frames

IMAGE = moving_frames(2, seed=3)[0]


@pytest.fixture(scope="module")
def tokens():
    return torch.randn(25, 96, generator=torch.Generator().manual_seed(1))


def query_vectors(encoder, text=None, image=None, motion=None):
    """Query embeddings by the definition."""
    vectors = {}
    if text is not None:
        vectors["text"] = encoder.embed_texts([text])[0]
    if image is not None:
        pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
        vectors["image"] = encoder.embed_images([pixels])[0]
    if motion is not None:
        vectors["motion"] = torch.nn.functional.normalize(motion.mean(0), dim=0)
    return {key: vector.numpy().astype(np.float64) for key, vector in vectors.items()}


def brute_force(rows, vectors, weights):
    """Ids and scores, best first."""
    if list(vectors) == ["text"]:
        rows = [row for row in rows if row["caption"]]
    scored = []
    for row in rows:
        scores = {key: float(np.dot(row[f"{key}_embedding"], vector)) for key, vector in vectors.items()}
        scored.append((-round(sum(weights[key] * score for key, score in scores.items()), 6), row["id"]))
    return [(id_, -score) for score, id_ in sorted(scored)]


def found(references):
    return [(reference.id, round(reference.score, 5)) for reference in references]


def check(references, expected):
    assert [reference.id for reference in references] == [id_ for id_, _ in expected]
    np.testing.assert_allclose([reference.score for reference in references], [s for _, s in expected], atol=2e-5)


@pytest.mark.parametrize(
    ("use", "weights"),
    [
        (["text"], None),
        (["image"], None),
        (["motion"], None),
        (["text", "image"], None),
        (["text", "motion"], {"text": 3, "motion": 1}),
        (["text", "image", "motion"], {"text": 0, "image": 1, "motion": 5}),
    ],
)
@pytest.mark.parametrize("where", [None, "motion = 'orbit' OR take >= 9", "gain < 1.5 AND NOT short"])
@pytest.mark.parametrize("k", [1, 9, 100])
def test_search_is_right(database, encoder, tokens, use, weights, where, k):
    query = {key: {"text": "a car that turns", "image": IMAGE, "motion": tokens}[key] for key in use}
    rows = database._table.scan(where=where).to_pylist()
    given = weights or dict.fromkeys(use, 1)
    normal = {key: value / sum(given.values()) for key, value in given.items()}
    expected = brute_force(rows, query_vectors(encoder, **query), normal)[:k]
    references = database.search(**query, k=k, where=where, weights=weights)
    check(references, expected)
    assert [reference.rank for reference in references] == list(range(1, len(expected) + 1))
    assert sum(reference.weight for reference in references) == pytest.approx(1)
    assert all(reference.scores.keys() == set(use) for reference in references)


def test_references_carry_everything(database, tokens):
    rows = {row["id"]: row for row in all_rows(database)}
    for reference in database.search(motion=tokens, k=NUM_CLIPS):
        row = rows[reference.id]
        assert reference.motion_tokens.shape == reference.context_tokens.shape == (25, 96)
        np.testing.assert_array_equal(reference.motion_tokens.flatten().numpy(), np.float32(row["motion_tokens"]))
        np.testing.assert_array_equal(reference.context_tokens.flatten().numpy(), np.float32(row["context_tokens"]))
        words = ("uri", "start_s", "end_s", "caption", "licence", "source")
        assert [getattr(reference.clip, name) for name in words] == [row[name] for name in words]
        assert reference.clip.metadata == {name: row[name] for name in ("motion", "take", "gain")}
        assert reference.to_dict()["metadata"]["take"] == row["take"]


def test_a_clip_finds_itself_unless_left_out(database, clips, made_clips):
    clip = Clip(str(made_clips / "wave_zoom.mp4"))
    kept = database.search(motion=clip, exclude=(), k=NUM_CLIPS)
    assert kept[0].clip.uri == clip.uri
    assert kept[0].score == pytest.approx(1, abs=1e-4)
    for query in (clip, Clip(str(clips / "wave_zoom.mp4"))):  # by path, and by content under another name
        references = database.search(motion=query, k=NUM_CLIPS)
        assert found(references) == found(kept)[1:]


@pytest.mark.parametrize("kind", [str, Path, Clip])
def test_exclude(database, made_clips, tokens, kind, monkeypatch):
    first, second, *others = found(database.search(motion=tokens, k=NUM_CLIPS))
    uris = {row["id"]: row["uri"] for row in all_rows(database)}
    assert found(database.search(motion=tokens, k=50, exclude=kind(uris[first[0]]))) == [second, *others]
    pair = [kind(uris[first[0]]), kind(uris[second[0]])]
    assert found(database.search(motion=tokens, k=50, exclude=pair)) == others
    monkeypatch.chdir(made_clips)
    relative = kind(os.path.basename(uris[first[0]]))
    assert found(database.search(motion=tokens, k=50, exclude=relative)) == [second, *others]
    assert len(database.search(motion=tokens, k=50, exclude=kind("/no/such/file's.mp4"))) == NUM_CLIPS


def test_exclude_reaches_every_span_of_the_file(empty, clips, tokens):
    uri = str(clips / "dancer_zoom.mp4")
    empty.add([Clip(uri, 0, 1), Clip(uri, 1, 2), Clip(uri), Clip(str(clips / "car_pan.mp4"))])
    assert len(empty.search(motion=Clip(uri, 2, 3))) == 1
    assert empty.search(motion=tokens, exclude=Clip(uri, 2, 3))[0].clip.uri == str(clips / "car_pan.mp4")
    (clips / "dancer_zoom.mp4").unlink()  # known by its path, even where the file is gone
    assert len(empty.search(motion=tokens, exclude=uri)) == 1


def test_where_cannot_reach_around_exclude(database, tokens):
    best = database.search(motion=tokens)[0]
    references = database.search(motion=tokens, k=50, where="take > 90 OR true", exclude=best.clip)
    assert len(references) == NUM_CLIPS - 1
    references = database.search(motion=tokens, k=50, where="take > 90) OR (true", exclude=best.clip)
    assert best.id not in {reference.id for reference in references}


@pytest.mark.parametrize(
    "where",
    [
        "subject = 'car'",
        "motion = ",
        "take",
        "'; DROP TABLE clips",
        "motion = 'it's'",
        "  ",
        "take > 5 nonsense",
        "true; true",
    ],
)
def test_wrong_conditions_name_the_columns(database, tokens, where):
    for call in (lambda: database.search(motion=tokens, where=where), lambda: database.delete(where)):
        with pytest.raises(
            ValueError, match=r"cannot be used .*; the columns are id, uri, .*caption.*motion, take, gain"
        ):
            call()
    assert len(database) == NUM_CLIPS


def test_no_row_meets_the_condition(database, tokens, caplog):
    assert database.search(motion=tokens, where="take > 99") == []
    assert "0 references for the 9 that were asked for" in caplog.text


def test_more_than_there_is(database, tokens, caplog):
    assert len(database.search(motion=tokens, k=1000)) == NUM_CLIPS
    assert f"{NUM_CLIPS} references for the 1000" in caplog.text
    assert len(database.search(text="a car", k=1000)) == NUM_CLIPS - 1  # one has no caption


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "Nothing to search for"),
        ({"text": "  "}, "text to search for is empty"),
        ({"text": "x", "k": 0}, "k must be 1 or more, got 0"),
        ({"motion": torch.zeros(25, 95)}, r"must be finite and \(25, 96\), got \(25, 95\)"),
        ({"motion": torch.full((25, 96), torch.nan)}, "must be finite"),
        ({"motion": Clip("/no/such.mp4")}, r"/no/such\.mp4"),
        ({"text": "x", "weights": {"image": 1}}, "each of text, not all 0; got"),
    ],
)
def test_wrong_queries(database, query, message):
    with pytest.raises(ValueError, match=message):
        database.search(**query)


def test_empty_database(empty, tokens):
    assert (len(empty), empty.verify(), empty.has_captions) == (0, [], False)
    assert empty.info()["clips"] == 0
    assert empty.delete("true") == 0
    with pytest.raises(ValueError, match="is empty; add clips with: motionrag index CLIPS --out"):
        empty.search(motion=tokens)


def test_no_captions_at_all(empty, made_clips, tokens):
    empty.add(made_clips)
    assert not empty.has_captions
    for query in ({"text": "a car"}, {"text": "a car", "motion": tokens}):
        with pytest.raises(ValueError, match="has a caption; index with captions, or search by image or motion"):
            empty.search(**query)
    assert len(empty.search(motion=tokens)) == 9


def test_captions_that_were_deleted(database):
    database.delete("caption != ''")
    with pytest.raises(ValueError, match="has a caption"):
        database.search(text="a car")


def test_delete_and_reopen(database, path, encoder, tokens):
    before = found(database.search(motion=tokens, k=50))
    gone = {row["id"] for row in all_rows(database) if row["motion"] == "pan"}
    assert database.delete("motion = 'pan'") == len(gone) == 4
    expected = [hit for hit in before if hit[0] not in gone]
    assert found(database.search(motion=tokens, k=50)) == expected
    assert database.verify() == []
    assert database.delete("motion = 'pan'") == 0
    again = MotionDatabase.open(path, encoder=encoder)
    assert (len(again), again.verify()) == (NUM_CLIPS - 4, [])
    assert found(again.search(motion=tokens, k=50)) == expected


def test_deleted_clips_can_be_added_again(database, made_clips, tokens):
    before, rows = found(database.search(motion=tokens, k=50)), all_rows(database)
    database.delete("take >= 8")
    assert database.add(made_clips, captions=made_clips / "clips.csv").added == 4
    assert found(database.search(motion=tokens, k=50)) == before
    # In encoding batches that follow the listing, the numbers are the same bits.
    assert all_rows(database) == rows


def test_info(database):
    info = database.info()
    assert (info["clips"], info["captioned"], info["tokens"]) == (NUM_CLIPS, NUM_CLIPS - 1, [25, 96])
    assert info["licences"] == {"CC0": 6, "unknown": 6}
    assert info["index"]["text"] == {"factory": "Flat", "exact": True, "recall": 1.0}
    assert {"motion", "take", "gain"} <= set(info["columns"])


# Creating and opening


def test_create_refuses_what_is_there(path, tmp_path, encoder):
    with pytest.raises(FileExistsError, match="exists already; open it with"):
        MotionDatabase.create(path, encoder=encoder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="exists already"):
        MotionDatabase.create(tmp_path / "file", encoder=encoder)
    (tmp_path / "folder").mkdir()
    assert len(MotionDatabase.create(tmp_path / "folder", encoder=encoder, name="shown")) == 0
    assert MotionDatabase(tmp_path / "folder").manifest.name == "shown"


def test_create_here(tmp_path, encoder, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    database = MotionDatabase.create("inside/db", encoder=encoder)
    monkeypatch.chdir(tmp_path)
    assert database.path == tmp_path / "here" / "inside" / "db"
    assert len(MotionDatabase("here/inside/db")) == len(database) == 0


def test_leftovers_of_killed_creations(tmp_path, encoder):
    fresh, old = tmp_path / ".db.creating-fresh", tmp_path / ".db.creating-old"
    for leftover in (fresh, old):
        (leftover / "db").mkdir(parents=True)
        (leftover / "db" / "manifest.json").write_text("{")
    os.utime(old, (0, 0))
    MotionDatabase.create(tmp_path / "db", encoder=encoder)
    assert sorted(tmp_path.iterdir()) == [fresh, tmp_path / "db"]  # the fresh one may be at work


def test_a_leftover_that_vanishes_while_it_is_looked_at(tmp_path, encoder):
    vanished = tmp_path / ".db.creating-other"
    vanished.symlink_to(tmp_path / "nowhere")  # listed, but not there when its age is asked for
    assert len(MotionDatabase.create(tmp_path / "db", encoder=encoder)) == 0


def test_databases_created_side_by_side(tmp_path, encoder):
    """Eight threads make four databases; each comes into being once."""
    encoder.num_frames  # noqa: B018  loads the parts, which is not what is raced here
    MotionDatabase.create(tmp_path / "warm", encoder=encoder)
    outcomes = []

    def make(number):
        try:
            outcomes.append(MotionDatabase.create(tmp_path / f"db{number % 4}", encoder=encoder).manifest.database_id)
        except FileExistsError:
            outcomes.append(None)

    threads = [threading.Thread(target=make, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = {MotionDatabase(tmp_path / f"db{number}").manifest.database_id for number in range(4)}
    assert len(made) == 4
    assert made == set(filter(None, outcomes))
    assert outcomes.count(None) == 4
    assert not list(tmp_path.glob(".*"))


def test_index_factory(tmp_path, encoder, made_clips, tokens, filled, caplog):
    with pytest.raises(ValueError, match="FAISS cannot make an index of 'Flut'"):
        MotionDatabase.create(tmp_path / "db", encoder=encoder, index_factory="Flut")
    assert not (tmp_path / "db").exists()
    expected = found(MotionDatabase(filled).search(motion=tokens, k=50))
    for factory, used in (("HNSW8", "HNSW8"), ("IVF2,Flat", "IVF2,Flat"), ("IVF64,Flat", "Flat")):
        database = MotionDatabase.create(tmp_path / factory, encoder=encoder, index_factory=factory)
        database.add(made_clips)
        assert found(database.search(motion=tokens, k=50)) == expected
        assert database.info()["index"]["motion"]["factory"] == used
        assert database.verify() == []
    assert "index 'motion' is chosen by size: 12 vectors are too few" in caplog.text


def test_what_is_no_database(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=r"no database at .*; make one with: motionrag index"):
        MotionDatabase(tmp_path)
    for content, message in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 99}', "has format 99"),
        ('{"format": 1}', "expected"),
    ):
        (path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            MotionDatabase(path)


@pytest.fixture(scope="module")
def other_encoder():
    """The pocket with a motion resampler of other weights."""
    pocket = MotionBundle.from_pretrained("pocket")
    resampler = pocket.motion_resampler
    with torch.no_grad():
        next(resampler.parameters()).add_(0.01)
    return MotionEncoder(
        MotionBundle(pocket.config, folder=pocket.folder, motion_resampler=resampler), source="elsewhere"
    )


def test_another_fingerprint_is_refused(path, made_clips, other_encoder, encoder, tokens):
    database = MotionDatabase(path, encoder=other_encoder)
    before = tree(path)
    for call in (
        lambda: database.search(motion=tokens),
        lambda: database.search(motion=Clip(str(made_clips / "car_pan.mp4"))),
        lambda: database.add(made_clips),
        lambda: database.check_fingerprints(other_encoder, ["motion_tokens"]),
    ):
        with pytest.raises(FingerprintMismatch) as caught:
            call()
        assert encoder.fingerprint("motion_tokens") in str(caught.value)
        assert other_encoder.fingerprint("motion_tokens") in str(caught.value)
        assert "motionrag index CLIPS --out NEW --encoder elsewhere" in str(caught.value)
    assert tree(path) == before
    assert database.search(text="a car")  # the sentence encoder is the same


def test_an_encoder_that_was_never_saved_must_be_passed(tmp_path, other_encoder, made_clips, tokens):
    own = MotionEncoder(other_encoder.bundle)
    database = MotionDatabase.create(tmp_path / "db", encoder=own)
    database.add(made_clips)
    again = MotionDatabase(tmp_path / "db")
    with pytest.raises(ValueError, match="was never saved; pass it"):
        again.search(text="a car")
    assert found(again.search(motion=tokens)) == found(database.search(motion=tokens))  # tokens need no encoder


# Repair


def stored(path, key, suffix):
    return path / "index" / f"{key}{suffix}"


def cut(path, key, suffix):
    content = stored(path, key, suffix).read_bytes()
    stored(path, key, suffix).write_bytes(content[: len(content) // 2])


def flip(path, key, suffix):
    content = bytearray(stored(path, key, suffix).read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    stored(path, key, suffix).write_bytes(content)


def remove(path, key, suffix):
    stored(path, key, suffix).unlink()


def blank(path, key, suffix):
    stored(path, key, suffix).write_bytes(b"")


@pytest.mark.parametrize("suffix", [".faiss", ".keys.npy", ".json"])
@pytest.mark.parametrize("damage", [cut, flip, remove, blank])
@pytest.mark.parametrize("warm", [False, True])
def test_damaged_indexes_repair_themselves(path, encoder, tokens, damage, suffix, warm):
    queries = {"text": "a car", "image": IMAGE, "motion": tokens}
    expected = found(MotionDatabase(path, encoder=encoder).search(**queries, k=50))
    database = MotionDatabase(path, encoder=encoder)
    if warm:  # what is in memory must not hide what is on disk
        database.search(**queries)
    for key in RETRIEVAL_KEYS:
        damage(path, key, suffix)
    findings = database.verify()
    assert len(findings) == 3
    assert all("the next search rebuilds it" in finding for finding in findings)
    assert found(database.search(**queries, k=50)) == expected
    assert database.verify() == []
    assert found(MotionDatabase(path, encoder=encoder).search(**queries, k=50)) == expected


def test_index_folder_that_is_gone_or_read_only(path, tokens, caplog):
    expected = found(MotionDatabase(path).search(motion=tokens, k=50))
    shutil.rmtree(path / "index")
    (path / "index").write_text("no folder")  # nothing can be stored here, by nobody
    assert found(MotionDatabase(path).search(motion=tokens, k=50)) == expected
    (path / "index").unlink()
    assert found(MotionDatabase(path).search(motion=tokens, k=50)) == expected
    assert stored(path, "motion", ".faiss").exists()


def test_index_of_another_database(path, tmp_path, encoder, made_clips, clips, tokens):
    expected = found(MotionDatabase(path).search(motion=tokens, k=50))
    for name in ("car_pan.mp4", "horse_pan.mp4"):
        (clips / name).unlink()
    other = MotionDatabase.create(tmp_path / "other", encoder=encoder)
    other.add(clips, captions=clips / "clips.csv")
    shutil.rmtree(path / "index")
    shutil.copytree(other.path / "index", path / "index")
    database = MotionDatabase(path)
    assert len(database.verify()) == 3
    assert "database_id is" in database.verify()[0]
    assert found(database.search(motion=tokens, k=50)) == expected
    assert "motion" not in "".join(database.verify())


def test_older_and_newer_indexes(path, encoder, clips, tmp_path, tokens):
    """An index from a backup, before or after rows came and went, is brought up to date."""
    shutil.copytree(path / "index", tmp_path / "older")
    database = MotionDatabase(path, encoder=encoder)
    make_video(clips / "new.mp4", seed=42)
    database.add(clips / "new.mp4")
    database.delete("take < 3")
    expected = found(database.search(motion=tokens, k=50))
    assert len(expected) == NUM_CLIPS - 2
    shutil.rmtree(path / "index")
    shutil.copytree(tmp_path / "older", path / "index")
    again = MotionDatabase(path, encoder=encoder)
    assert all("not up to date" in finding for finding in again.verify())
    assert found(again.search(motion=tokens, k=50)) == expected
    again.search(text="a car", image=IMAGE)
    assert again.verify() == []


def test_index_with_the_right_keys_and_wrong_vectors(path, encoder, tokens, caplog):
    from motionrag.database import index_file
    from motionrag.database.index import VectorIndex

    database = MotionDatabase(path, encoder=encoder)
    expected = found(database.search(motion=tokens, k=50))
    wrong = np.random.default_rng(0).standard_normal((NUM_CLIPS, 96)).astype(np.float32)
    wrong /= np.linalg.norm(wrong, axis=1, keepdims=True)
    index = VectorIndex.build(wrong, database._table.keys())
    index_file.save(index, path / "index", "motion", database_id=database.manifest.database_id, table_version=2)
    again = MotionDatabase(path)
    assert again.verify() == ["index 'motion' holds other vectors than the table; the next search rebuilds it"]
    assert found(again.search(motion=tokens, k=50)) == expected
    assert "holds other vectors than the table; building it anew" in caplog.text
    assert again.verify() == []


@pytest.mark.parametrize("keep", [0, 20])
def test_truncated_newest_version(path, made_clips, encoder, keep, tokens, caplog):
    database = MotionDatabase(path, encoder=encoder)
    expected, rows = found(database.search(motion=tokens, k=50)), all_rows(database)
    newest = min((path / "clips.lance" / "_versions").glob("*.manifest"))  # Lance counts down
    newest.write_bytes(newest.read_bytes()[:keep])
    again = MotionDatabase(path, encoder=encoder)
    assert len(again) == 0
    assert "fell back to version" in caplog.text
    assert "fell back to version" in again.verify()[0]
    assert again.add(made_clips, captions=made_clips / "clips.csv").added == NUM_CLIPS
    assert all_rows(again) == rows
    assert found(again.search(motion=tokens, k=50)) == expected
    # The handle that was open all the while sees the version that took the number of the lost one.
    database.refresh()
    assert found(database.search(motion=tokens, k=50)) == expected
    last = MotionDatabase(path, encoder=encoder)
    assert last.verify() == []


def test_verify_names_a_damaged_table_file(path):
    data = next((path / "clips.lance" / "data").iterdir())
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert any(data.name in finding and "checksum" in finding for finding in MotionDatabase(path).verify())


# Several at once


def test_second_writer_is_told_who_the_first_is(path, encoder, clips, tokens):
    """Two processes: one holds the lock, the other is told its number; a reader is not disturbed."""
    program = "import sys, time; from pathlib import Path; from motionrag.database.lock import writer_lock\n"
    program += "with writer_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        database = MotionDatabase(path, encoder=encoder)
        make_video(clips / "new.mp4", seed=42)
        for call in (lambda: database.add(clips / "new.mp4"), lambda: database.delete("true")):
            with pytest.raises(DatabaseLocked, match=f"process {holder.pid}"):
                call()
        assert database.add(clips / "new.mp4", dry_run=True).added == 1
        shutil.rmtree(path / "index")
        assert len(database.search(motion=tokens)) == 9  # the index stays in memory
        assert not (path / "index").exists()
    finally:
        holder.kill()
        holder.wait()
    assert database.add(clips / "new.mp4").added == 1


def test_a_reader_keeps_its_version_until_it_refreshes(path, encoder, clips, tokens):
    reader, writer = MotionDatabase(path), MotionDatabase(path, encoder=encoder)
    before = found(reader.search(motion=tokens, k=50))
    make_video(clips / "new.mp4", seed=42)
    assert writer.add(clips / "new.mp4").added == 1
    assert found(reader.search(motion=tokens, k=50)) == before
    reader.refresh()
    assert found(reader.search(motion=tokens, k=50)) == found(writer.search(motion=tokens, k=50))
    assert len(reader) == NUM_CLIPS + 1


def test_a_reader_of_an_older_version_leaves_the_newer_index(path, encoder, clips, tokens):
    reader, writer = MotionDatabase(path), MotionDatabase(path, encoder=encoder)
    make_video(clips / "new.mp4", seed=42)
    writer.add(clips / "new.mp4")
    index = tree(path / "index")
    assert len(reader.search(motion=tokens, k=50)) == NUM_CLIPS
    assert tree(path / "index") == index


def test_searching_while_another_thread_writes(path, encoder, clips, tokens):
    """One object, shared: every search sees one version, whole."""
    database = MotionDatabase(path, encoder=encoder)
    for number in range(6):
        make_video(clips / f"new{number}.mp4", seed=100 + number)
    sizes, errors, done = set(), [], threading.Event()

    def read():
        while not done.is_set():
            try:
                references = database.search(motion=tokens, k=100, where="width = 64")
                sizes.add(len(references))
                assert len({reference.id for reference in references}) == len(references)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(6):
        database.add(clips / f"new{number}.mp4")
        if number % 2:
            database.delete(f"uri LIKE '%new{number}.mp4'")
    time.sleep(0.1)
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sizes <= set(range(NUM_CLIPS, NUM_CLIPS + 5))
    assert len(database.search(motion=tokens, k=100)) == NUM_CLIPS + 3
    assert database.verify() == []


def test_the_lock_is_free_after_an_error(database, clips):
    (clips / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column"):
        database.add(clips / "x.csv")
    with writer_lock(database.path):
        pass


def test_progress_is_not_shown_where_nobody_looks(empty, made_clips, capfd, caplog):
    caplog.set_level(logging.INFO)
    empty.add(made_clips, progress=True)
    assert "indexing" not in capfd.readouterr().err
