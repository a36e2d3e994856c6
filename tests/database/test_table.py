"""The clip table against a dictionary, and under real damage: kills, lost and overwritten files."""

import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pytest

from motionrag.database.lock import writer_lock
from motionrag.database.recovery import manifests
from motionrag.database.table import ClipTable, MissingRows

WIDTH = 8
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("revision", pa.int32(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("tokens", pa.list_(pa.float16(), WIDTH), nullable=False),
    ]
)


def name(number):
    return f"{number:032x}"


def rows(numbers, revision=0):
    tokens = np.array([[number % 100 + revision] * WIDTH for number in numbers], np.float16).reshape(-1)
    return pa.table(
        {
            "id": [name(number) for number in numbers],
            "revision": pa.array([revision] * len(numbers), pa.int32()),
            "caption": [f"clip {number}" for number in numbers],
            "tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens), WIDTH),
        },
        schema=SCHEMA,
    )


@pytest.fixture
def path(tmp_path):
    """A table of versions 1 (empty), 2 (ids 0–9), 3 (0–19), 4 (3–19), 5 (3–24, the last of them revised)."""
    table = ClipTable.create(tmp_path / "clips.lance", SCHEMA)
    table.append(rows(range(10)))
    table.append(rows(range(10, 20)))
    assert table.delete(f"id < '{name(3)}'") == 3
    table.upsert(rows(range(15, 25), revision=1))
    assert table.version == 5
    return table.path


def ids(table):
    return sorted(int(row, 16) for row in table.scan(["id"])["id"].to_pylist())


def newest(path):
    return next(iter(manifests(path).values()))


def test_create_refuses_to_overwrite_and_open_to_create(path, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        ClipTable.create(path, SCHEMA)
    with pytest.raises(FileNotFoundError, match="no clip table"):
        ClipTable.open(tmp_path / "none.lance")
    with pytest.raises(ValueError, match="non-nullable string column 'id'"):
        ClipTable.create(tmp_path / "other.lance", pa.schema([pa.field("id", pa.string())]))
    assert not (tmp_path / "other.lance").exists()


def test_model_of_a_dictionary(tmp_path):
    """Random appends, upserts, deletions, compactions and re-openings give what a dictionary gives."""
    for seed in range(4):
        random_ = random.Random(seed)
        table = ClipTable.create(tmp_path / f"{seed}.lance", SCHEMA)
        model: dict[int, int] = {}
        for step in range(25):
            action = random_.choice(["append", "upsert", "upsert", "delete", "reopen", "compact", "collect"])
            numbers = random_.sample(range(60), random_.randint(0, 20))
            if action == "append":
                numbers = [number for number in numbers if number not in model]
                table.append(rows(numbers, step))
                model |= dict.fromkeys(numbers, step)
            elif action == "upsert":
                table.upsert(rows(numbers, step))
                model |= dict.fromkeys(numbers, step)
            elif action == "delete" and numbers:
                listed = ", ".join(f"'{name(number)}'" for number in numbers)
                gone = [number for number in numbers if number in model]
                assert table.delete(f"id IN ({listed})") == len(gone)
                for number in gone:
                    del model[number]
            elif action == "reopen":
                table = ClipTable.open(table.path)
            elif action == "compact":
                table.compact()
            elif action == "collect":
                table.collect_garbage()
            assert table.count() == len(model)
            stored = table.scan(["id", "revision"])
            assert {int(row["id"], 16): row["revision"] for row in stored.to_pylist()} == model
            assert table.keys()["id"].astype(str).tolist() == stored["id"].to_pylist()
            assert table.keys()["revision"].tolist() == stored["revision"].to_pylist()
            wanted = random_.choices(list(model), k=min(7, len(model)))
            taken = table.take([name(number) for number in wanted], ["tokens", "id"])
            assert taken.column_names == ["tokens", "id"]
            assert taken["id"].to_pylist() == [name(number) for number in wanted]
            assert [row[0] for row in taken["tokens"].to_pylist()] == [n % 100 + model[n] for n in wanted]
        assert table.verify(deep=True) == []


def test_take_names_absent_ids(path):
    table = ClipTable.open(path)
    with pytest.raises(MissingRows, match=rf"no row with id {name(1)}, {name(2)}$"):
        table.take([name(4), name(1), name(2)], ["id"])
    with pytest.raises(KeyError, match="and 7 more"):
        table.take([name(number) for number in range(100, 110)])
    with pytest.raises(MissingRows):
        table.take([name(4) + "0"])
    assert table.take([], ["id"]).num_rows == 0
    with pytest.raises(ValueError, match="no column"):
        table.take([name(4)], ["nope"])


def test_where(path):
    table = ClipTable.open(path)
    assert table.count("revision = 1") == 10
    assert table.scan(["caption"], f"id = '{name(7)}'").to_pylist() == [{"caption": "clip 7"}]
    for use in (table.count, table.delete, lambda where: table.scan(["id"], where)):
        for bad in ("nope = 3", "id = ", "id = 5"):
            with pytest.raises(ValueError, match="the columns are id, revision, caption, tokens"):
                use(bad)
    assert table.delete("revision = 77") == 0
    assert table.version == 5


def test_bad_rows_are_refused_by_name(path):
    table = ClipTable.open(path)
    infinite = rows([50]).set_column(3, SCHEMA.field(3), pa.array([[float("inf")] * WIDTH], SCHEMA.field(3).type))
    for write in (table.append, table.upsert):
        with pytest.raises(ValueError, match=f"id {name(1)} comes more than once"):
            write(rows([1, 2, 1]))
        with pytest.raises(ValueError, match=r"missing: \['tokens'\]"):
            write(rows([1]).drop_columns(["tokens"]))
        with pytest.raises(ValueError, match=r"unknown: \['extra'\]"):
            write(rows([1]).append_column("extra", pa.array([1])))
        with pytest.raises(ValueError, match=f"'tokens' has values that are not finite in row {name(50)}"):
            write(infinite)
        with pytest.raises(ValueError, match="'short' is not 32 ASCII"):
            write(rows([1]).set_column(0, "id", pa.array(["short"])))
        with pytest.raises(ValueError, match="column 'revision' is null in row"):
            write(rows([1]).set_column(1, "revision", pa.array([None], pa.int32())))
    assert table.version == 5


def test_add_columns(path):
    table = ClipTable.open(path)
    vector = pa.field("motion", pa.list_(pa.float32(), 4))
    table.add_columns([vector])
    assert table.scan(["motion"])["motion"].null_count == table.count() == 22
    extra = rows([90]).append_column(vector, pa.array([[0.5] * 4], vector.type))
    table.append(extra)
    assert table.take([name(90), name(5)], ["motion"])["motion"].to_pylist() == [[0.5] * 4, None]
    with pytest.raises(ValueError, match="there is a column 'motion' already"):
        table.add_columns([vector])
    with pytest.raises(ValueError, match="must be nullable"):
        table.add_columns([pa.field("other", pa.int32(), nullable=False)])
    assert table.verify(deep=True) == []


def test_reader_keeps_its_version_until_refresh(path):
    reader, writer = ClipTable.open(path), ClipTable.open(path)
    writer.append(rows([100]))
    assert (reader.version, reader.count()) == (5, 22)
    reader.refresh()
    assert (reader.version, reader.count()) == (6, 23)


def test_threads_read_while_one_writes(path):
    """No reader mixes the ids of one version with the offsets of another."""
    table = ClipTable.open(path)
    stop, errors = threading.Event(), []

    def read():
        while not stop.is_set():
            wanted = [name(number) for number in (10, 20, 5)]
            if table.take(wanted, ["id"])["id"].to_pylist() != wanted:
                errors.append("wrong rows")

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(200, 215):
        table.append(rows([number]))
        table.delete(f"id = '{name(number)}'")
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []


def damaged_contents(content):
    random_ = random.Random(0)
    yield "empty", b""
    yield "zeros", bytes(len(content))
    yield "garbage", random_.randbytes(len(content))
    yield "garbage with a good footer", random_.randbytes(len(content) - 16) + content[-16:]
    for _ in range(4):
        cut = random_.randrange(len(content))
        yield f"cut to {cut}", content[:cut]
    for _ in range(8):
        place = random_.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << random_.randrange(8)
        yield f"bit flipped in byte {place}", bytes(changed)


def test_damaged_newest_manifest(path, tmp_path, caplog):
    """Every kind of damage is noticed, the version before is used, and writing goes on from there."""
    manifest = newest(path).name
    original = newest(path).read_bytes()
    for number, (kind, content) in enumerate(damaged_contents(original)):
        folder = tmp_path / f"copy{number}"
        folder.mkdir()
        copy = folder / path.name
        shutil.copytree(path, copy)
        shutil.copy(path.with_suffix(".sha256"), folder)
        (copy / "_versions" / manifest).write_bytes(content)
        with caplog.at_level(logging.WARNING):
            table = ClipTable.open(copy)
        assert table.version == 4, kind
        assert ids(table) == list(range(3, 20))
        assert "version 5 cannot be read" in table.recovered[0]
        assert "fell back to version 4" in caplog.text
        assert (folder / "_quarantine" / manifest).read_bytes() == content
        assert (folder / "_quarantine" / f"{manifest}.reason.txt").read_text().strip() in table.recovered[0]
        table.append(rows([70, 71]))
        table.upsert(rows([71, 72], revision=2))
        table.collect_garbage()
        again = ClipTable.open(copy)
        assert again.recovered == []
        assert (again.version, ids(again)) == (6, [*range(3, 20), 70, 71, 72])
        assert again.verify(deep=True) == []


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
@pytest.mark.parametrize("kind", ["data", "_deletions"])
def test_damaged_newest_file(path, kind, damage):
    """A file lost with the power (and so never listed as durable) takes its version with it, not the table."""
    file = max((path / kind).iterdir(), key=lambda file: file.stat().st_mtime_ns)
    ledger = path.with_suffix(".sha256")
    ledger.write_text("".join(line for line in ledger.open() if file.name not in line))
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, 0 if damage == "empty" else file.stat().st_size // 2)
    table = ClipTable.open(path)
    assert (table.version, ids(table)) == (4, list(range(3, 20)))
    table.append(rows([80]))
    again = ClipTable.open(path)
    assert (again.recovered, ids(again)) == ([], [*range(3, 20), 80])


def test_several_damaged_versions_and_none_left(path):
    for manifest in list(manifests(path).values())[:2]:
        manifest.write_bytes(b"")
    table = ClipTable.open(path)
    assert (table.version, len(table.recovered), table.count()) == (3, 2, 20)
    for manifest in manifests(path).values():
        manifest.write_bytes(b"")
    with pytest.raises(OSError, match="no version of this table can be read"):
        ClipTable.open(path)


def test_recovery_beside_a_writer_waits_for_the_next_write(path):
    newest(path).write_bytes(b"")
    with writer_lock(path.parent):
        table = ClipTable.open(path)
        assert not (path.parent / "_quarantine").exists()
        table.append(rows([81]))
        assert (path.parent / "_quarantine").exists()
    assert ids(ClipTable.open(path)) == [*range(3, 20), 81]


def test_recovery_where_nothing_can_be_set_aside(path, caplog):
    newest(path).write_bytes(b"")
    obstacle = path.parent / "_quarantine"
    obstacle.write_text("not a folder")
    table = ClipTable.open(path)
    assert ids(table) == list(range(3, 20))
    assert "the unreadable version is left where it is" in caplog.text
    assert str(obstacle) in caplog.text
    with pytest.raises(FileExistsError):  # a commit on top of the damaged version would be lost
        table.append(rows([81]))
    obstacle.unlink()
    table.append(rows([81]))
    assert ids(ClipTable.open(path)) == [*range(3, 20), 81]


def test_lost_version_number_used_again_is_another_version(path):
    """A reader of the lost version 5 moves to the new version 5, though the number is the same."""
    reader = ClipTable.open(path)
    assert reader.count() == 22
    newest(path).write_bytes(b"")
    writer = ClipTable.open(path)
    writer.append(rows([99]))
    reader.refresh()
    assert (reader.version, ids(reader)) == (5, [*range(3, 20), 99])


def test_verify_finds_flipped_bits_and_broken_rules(path):
    table = ClipTable.open(path)
    assert table.verify() == table.verify(deep=True) == []
    table.append(rows([10]))
    assert table.verify() == [f"{path}: id {name(10)} is stored 2 times"]
    table.delete(f"id = '{name(10)}'")
    random_ = random.Random(1)
    for folder in ("data", "_deletions", "_transactions", "_versions"):
        for file in list((path / folder).iterdir()):
            if file.suffix == ".json":
                continue
            content = bytearray(file.read_bytes())
            content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
            original = file.read_bytes()
            file.write_bytes(content)
            assert any(file.name in finding for finding in table.verify(deep=True)), file
            file.write_bytes(original)
    assert table.verify(deep=True) == []


def test_verify_finds_bad_values_written_past_the_table(path):
    import lance

    bad = rows([60]).set_column(3, SCHEMA.field(3), pa.array([[float("nan")] * WIDTH], SCHEMA.field(3).type))
    lance.write_dataset(bad, str(path), mode="append")
    table = ClipTable.open(path)
    assert table.verify() == []
    assert table.verify(deep=True) == [f"{path}: column 'tokens' has values that are not finite in row {name(60)}"]


def test_collect_garbage(path):
    table = ClipTable.open(path)
    table.compact()
    (path / "data" / "orphan.lance").write_bytes(b"left by a killed write")
    (path / "_versions" / "18446744073709551609.manifest#1").write_bytes(b"left by a killed commit")
    listed = table.collect_garbage(dry_run=True)
    assert "data/orphan.lance" in listed
    assert "_versions/18446744073709551609.manifest#1" in listed
    assert table.collect_garbage() == listed
    assert table.collect_garbage() == []
    assert len(manifests(path)) == 1
    again = ClipTable.open(path)
    assert ids(again) == list(range(3, 25))
    assert again.verify(deep=True) == []
    again.append(rows([61]))
    assert ids(ClipTable.open(path)) == [*range(3, 25), 61]


def test_everything_committed_is_listed_as_durable(path):
    table = ClipTable.open(path)
    table.compact()
    listed = {line.split("  ")[2].strip() for line in path.with_suffix(".sha256").open() if line.strip()}
    present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert present - listed == {"_versions/latest_version_hint.json"}


def test_commit_is_synced_before_it_is_reported(path, monkeypatch):
    """Every new file, then the folders that name them, then the ledger."""
    synced = []
    real = os.fsync

    def recording(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    table = ClipTable.open(path)
    before = set(path.rglob("*"))
    monkeypatch.setattr(os, "fsync", recording)
    table.upsert(rows([5, 300], revision=9))
    new = [file for file in path.rglob("*") if file not in before]
    assert {file.parent.name for file in new} == {"data", "_deletions", "_transactions", "_versions"}
    last_file = max(synced.index(file.stat().st_ino) for file in new)
    for folder in {file.parent for file in new}:
        assert synced.index(folder.stat().st_ino) > last_file
        assert synced.index(folder.stat().st_ino) < synced.index(path.with_suffix(".sha256").stat().st_ino)


def test_damaged_ledger_costs_nothing(path):
    """A flipped bit or a torn line in the checksums must not condemn an intact table."""
    ledger = path.with_suffix(".sha256")
    content = ledger.read_bytes()
    random_ = random.Random(3)
    for _ in range(20):
        changed = bytearray(content)
        changed[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
        for damaged in (bytes(changed), content[: random_.randrange(len(content))]):
            ledger.write_bytes(damaged)
            table = ClipTable.open(path)
            assert (table.recovered, table.count(), table.verify(deep=True)) == ([], 22, [])
    table.append(rows([62]))
    listed = {line.split("  ")[2].strip() for line in ledger.open() if line.count("  ") == 2}
    assert newest(path).relative_to(path).as_posix() in listed


def test_commit_that_lands_but_reports_an_error_is_done(path, caplog):
    """An error after the commit point: the rows are there, so `append` says so."""
    import lance

    def landed_then_failed(dataset):
        lance.write_dataset(rows([65]), dataset, mode="append")
        raise OSError("connection lost")

    def failed(dataset):
        raise OSError("disk full")

    table = ClipTable.open(path)
    table._commit(landed_then_failed)
    assert 65 in ids(table)
    assert "the commit is in place although it reported: connection lost" in caplog.text
    with pytest.raises(OSError, match="disk full"):
        table._commit(failed)


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_table import rows
from motionrag.database.lock import writer_lock
from motionrag.database.table import ClipTable
path = Path(sys.argv[1])
with writer_lock(path.parent):
    table = ClipTable.open(path)
    first = table.count()
    print("start", flush=True)
    for number in range(first, first + 100_000, 5):
        table.append(rows(range(number, number + 5)))
        print(number + 5, flush=True)
"""


def test_killed_writer_loses_nothing_acknowledged(tmp_path):
    path = tmp_path / "clips.lance"
    ClipTable.create(path, SCHEMA)
    random_ = random.Random(2)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "start\n"
        time.sleep(random_.uniform(0.02, 0.3))
        process.kill()
        acknowledged = [int(line) for line in process.stdout if line.endswith("\n")]
        process.wait()
        table = ClipTable.open(path)
        assert table.recovered == []
        stored = ids(table)
        assert stored == list(range(len(stored)))
        assert len(stored) % 5 == 0
        assert not acknowledged or len(stored) - acknowledged[-1] in (0, 5)
        assert table.verify(deep=True) == []
    with writer_lock(tmp_path):
        table.collect_garbage()
        table.append(rows([10**6]))
    assert ClipTable.open(path).verify(deep=True) == []
    assert stored


def test_open_is_quick(path):
    table = ClipTable.open(path)
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        ClipTable.open(table.path)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 0.02
