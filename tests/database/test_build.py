"""Indexing: what is new, changed, moved or broken, with real files and the pocket encoder."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch

from motionrag.database import IndexingStopped, MotionDatabase, build
from motionrag.database.failures import FailureLog
from motionrag.database.schema import table_schema
from motionrag.database.sources import Listing
from motionrag.database.table import ClipTable
from motionrag.video import Clip
from tests.database.conftest import NUM_CLIPS, all_rows, keep_time, tree
from tests.video_files import make_audio, make_video


def counts(report):
    return report.added, report.changed, report.unchanged, len(report.failed)


def row_of(database, name):
    return next(row for row in all_rows(database) if row["uri"].endswith(name))


def captions_csv(folder, captions, header="file,caption"):
    path = folder / "captions.csv"
    path.write_text("\n".join([header, *captions]) + "\n", encoding="utf-8")
    return path


def test_rows_hold_what_encoder_and_reader_give(database, encoder, made_clips):
    rows = all_rows(database)
    assert len(rows) == NUM_CLIPS
    row = row_of(database, "car_zoom.mp4")
    assert (row["num_frames"], row["width"], row["height"], row["fps"], row["short"]) == (20, 64, 48, 8.0, False)
    assert (row["start_s"], row["end_s"], row["revision"], row["still_share"]) == (0.0, 2.5, 0, 0.0)
    assert row["reader"].startswith("pyav ")
    # Clip 5 has no caption; the other columns of the manifest keep their types.
    assert (row["caption"], row["motion"], row["take"], row["gain"], row["licence"]) == ("", "zoom", 5, 1.25, "CC0")
    assert not any(row["text_embedding"])
    captioned = row_of(database, "car_pan.mp4")
    np.testing.assert_allclose(captioned["text_embedding"], encoder.embed_texts([captioned["caption"]])[0], atol=1e-5)
    for stored in rows:
        tokens = torch.tensor(stored["motion_tokens"]).reshape(encoder.num_tokens, encoder.token_dim)
        mean = tokens.mean(0)
        assert torch.nn.functional.cosine_similarity(mean, torch.tensor(stored["motion_embedding"]), dim=0) > 0.9999
        assert np.linalg.norm(stored["image_embedding"]) == pytest.approx(1, abs=1e-5)
    assert row_of(database, "horse_pan.mp4")["short"]


def test_the_same_command_adds_nothing(database, clips, made_clips):
    before = all_rows(database)
    report = database.add(made_clips, captions=made_clips / "clips.csv")
    assert counts(report) == (0, 0, NUM_CLIPS, 0)
    assert str(report) == f"0 new, 0 changed, {NUM_CLIPS} unchanged"
    assert all_rows(database) == before
    # A copy of the folder holds the same clips under other names.
    assert counts(database.add(clips, captions=clips / "clips.csv")) == (0, 0, NUM_CLIPS, 0)
    assert all_rows(database) == before


def test_dry_run_writes_nothing(database, path, clips, empty):
    make_video(clips / "new.mp4", seed=99)
    make_video(clips / "car_pan.mp4", seed=98)
    before = {file: file.stat() for file in (path, *path.rglob("*"))}
    content = tree(path)
    report = database.add(clips, captions=clips / "clips.csv", dry_run=True)
    assert report.dry_run
    assert counts(report) == (2, 0, NUM_CLIPS - 1, 0)
    assert tree(path) == content
    assert {file: file.stat().st_mtime_ns for file in (path, *path.rglob("*"))} == {
        file: status.st_mtime_ns for file, status in before.items()
    }
    content = tree(empty.path)
    assert counts(empty.add(clips, dry_run=True)) == (NUM_CLIPS + 1, 0, 0, 0)
    assert tree(empty.path) == content


def test_dry_run_says_what_a_run_does(database, clips):
    database.add(clips)
    for name in made_names(clips):
        (clips / name).rename(clips / f"moved_{name}")
    make_video(clips / "moved_car_pan.mp4", seed=98)
    (clips / "moved_car_zoom.mp4").write_bytes(b"no video")
    planned = database.add(clips, dry_run=True)
    done = database.add(clips)
    # That the file cannot be read is found by decoding it.
    assert (planned.added, planned.changed) == (done.added + 1, done.changed)


def made_names(folder):
    return sorted(file.name for file in folder.glob("*.mp4"))


def test_one_content_under_two_names_is_stored_once(empty, clips):
    for copy in ("copy.mp4", "another.mp4"):
        shutil.copy(clips / "car_pan.mp4", clips / copy)
    report = empty.add(clips)
    assert counts(report) == (NUM_CLIPS, 0, 2, 0)
    assert counts(empty.add(clips)) == (0, 0, NUM_CLIPS + 2, 0)
    before = all_rows(empty)
    (clips / "another.mp4").unlink()  # it came first and gave the row its name
    assert counts(empty.add(clips)) == (0, 1, NUM_CLIPS, 0)
    assert len(all_rows(empty)) == len(before)
    assert counts(empty.add(clips)) == (0, 0, NUM_CLIPS + 1, 0)


def test_words_belong_to_the_name_that_is_stored(empty, clips):
    shutil.copy(clips / "car_pan.mp4", clips / "zz.mp4")
    empty.add(clips, captions=captions_csv(clips, ["car_pan.mp4,first"]))
    report = empty.add(clips, captions=captions_csv(clips, ["zz.mp4,copy", "car_pan.mp4,second"]))
    assert report.changed == 1
    assert row_of(empty, "car_pan.mp4")["caption"] == "second"


def test_moved_files_take_their_rows_along(database, clips, made_clips):
    database.add(clips)  # the originals are still there: nothing moves
    assert all(row["uri"].startswith(str(made_clips)) for row in all_rows(database))
    own = MotionDatabase.create(clips.parent / "own", encoder=database.encoder)
    own.add(clips)
    tokens = {row["id"]: row["motion_tokens"] for row in all_rows(own)}
    clips.rename(clips.with_name("elsewhere"))
    assert counts(own.add(clips.with_name("elsewhere"))) == (0, NUM_CLIPS, 0, 0)
    assert {row["id"]: row["motion_tokens"] for row in all_rows(own)} == tokens
    assert all("/elsewhere/" in row["uri"] for row in all_rows(own))
    assert counts(own.add(clips.with_name("elsewhere"))) == (0, 0, NUM_CLIPS, 0)


def test_files_that_change_places_lose_nothing(empty, clips):
    empty.add(clips)
    before = {row["id"]: row["uri"] for row in all_rows(empty)}
    (clips / "car_pan.mp4").rename(clips / "aside")
    (clips / "car_zoom.mp4").rename(clips / "car_pan.mp4")
    (clips / "aside").rename(clips / "car_zoom.mp4")
    report = empty.add(clips)
    assert counts(report) == (0, 2, NUM_CLIPS - 2, 0)
    after = {row["id"]: row["uri"] for row in all_rows(empty)}
    assert after.keys() == before.keys()
    assert sorted(after.values()) == sorted(before.values())
    assert sum(after[id_] != before[id_] for id_ in after) == 2
    assert counts(empty.add(clips)) == (0, 0, NUM_CLIPS, 0)


def test_a_content_that_lives_on_under_another_name_is_kept(empty, clips):
    shutil.copy(clips / "car_pan.mp4", clips / "zz.mp4")
    empty.add(clips)
    make_video(clips / "car_pan.mp4", seed=50)
    assert counts(empty.add(clips)) == (1, 1, NUM_CLIPS - 1, 0)
    assert len(empty) == NUM_CLIPS + 1
    assert counts(empty.add(clips)) == (0, 0, NUM_CLIPS + 1, 0)


def test_a_changed_file_replaces_its_rows(empty, clips):
    listing = [Clip(clips / "car_pan.mp4", 0, 1), Clip(clips / "car_pan.mp4", 1), Clip(clips / "car_zoom.mp4")]
    empty.add(listing)
    old = {row["id"] for row in all_rows(empty) if row["uri"].endswith("car_pan.mp4")}
    make_video(clips / "car_pan.mp4", num_frames=30, seed=51)
    report = empty.add([*listing, Clip(clips / "car_pan.mp4", 0.0, 1.0)])  # a double must not protect what is old
    assert (report.added, report.changed, report.unchanged) == (0, 2, 1)
    assert not old & {row["id"] for row in all_rows(empty)}
    assert len(empty) == 3
    assert empty.verify() == []


def test_a_touched_file_is_read_once(empty, clips):
    empty.add(clips)
    os.utime(clips / "car_pan.mp4")
    assert counts(empty.add(clips)) == (0, 0, NUM_CLIPS, 0)
    stamp = (clips / "car_pan.mp4").stat().st_mtime_ns
    assert row_of(empty, "car_pan.mp4")["file_mtime_ns"] == stamp


def test_same_size_and_time_are_believed(empty, clips):
    """Hashing every file in every run would cost hours; the price is stated here."""
    empty.add(clips)
    keep_time(clips / "car_pan.mp4", lambda file: file.write_bytes(bytes(file.stat().st_size)))
    assert counts(empty.add(clips)) == (0, 0, NUM_CLIPS, 0)


def test_changed_words_keep_the_tokens(database, made_clips, tmp_path):
    before = {row["id"]: row for row in all_rows(database)}
    lines = (made_clips / "clips.csv").read_text().splitlines()
    changed = [
        line.replace("A wave, seen in a orbit", "A purple submarine").replace(",CC0,horse", ",MIT,horse")
        for line in lines
    ]
    (tmp_path / "other.csv").write_text("\n".join(changed))
    report = database.add(made_clips, captions=tmp_path / "other.csv")
    assert counts(report) == (0, 2, NUM_CLIPS - 2, 0)
    for row in all_rows(database):
        old = before[row["id"]]
        same = [name for name in row if row[name] == old[name]]
        if row["caption"] == "A purple submarine":
            assert set(row) - set(same) == {"caption", "text_embedding", "revision"}
        elif row["licence"] == "MIT":
            assert set(row) - set(same) == {"licence", "revision"}
        else:
            assert len(same) == len(row)
    assert database.search(text="A purple submarine", k=1)[0].clip.caption == "A purple submarine"
    assert database.search(text="A purple submarine", k=1)[0].score == pytest.approx(1, abs=1e-5)
    assert (
        "submarine"
        not in MotionDatabase(database.path, encoder=database.encoder)
        .search(text="A wave, seen in a orbit")[1]
        .clip.caption
    )
    assert database.verify() == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"no video at all"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-400]),
        lambda path: make_audio(path),
        lambda path: make_video(path, num_frames=1),
    ],
    ids=["garbage", "empty", "truncated", "audio", "one frame"],
)
def test_files_that_cannot_be_read(empty, clips, spoil):
    spoil(clips / "car_pan.mp4")
    report = empty.add(clips)
    assert counts(report) == (NUM_CLIPS - 1, 0, 0, 1)
    assert report.failed[0].uri == str(clips / "car_pan.mp4")
    assert "1 unusable (car_pan.mp4: " in str(report)
    logged = [json.loads(line) for line in (empty.path / "errors.jsonl").read_text().splitlines()]
    assert [(entry["uri"], entry["reason"]) for entry in logged] == [(report.failed[0].uri, report.failed[0].reason)]
    again = empty.add(clips)
    assert counts(again) == (0, 0, NUM_CLIPS - 1, 1)
    assert "skipped until the file changes" in again.failed[0].reason
    make_video(clips / "car_pan.mp4", seed=77)
    assert counts(empty.add(clips)) == (1, 0, NUM_CLIPS - 1, 0)
    assert (empty.path / "errors.jsonl").read_text() == ""


def test_a_file_that_changes_into_garbage_keeps_its_row(database, clips):
    own = MotionDatabase.create(clips.parent / "own", encoder=database.encoder)
    own.add(clips)
    before = all_rows(own)
    (clips / "car_pan.mp4").write_bytes(b"garbage")
    for _ in range(2):
        assert counts(own.add(clips)) == (0, 0, NUM_CLIPS - 1, 1)
        assert all_rows(own) == before


def test_a_file_that_cannot_be_opened_is_listed(empty, clips):
    (clips / "memory.mp4").symlink_to("/proc/self/mem")  # a regular file whose reading fails
    report = empty.add(clips)
    assert counts(report) == (NUM_CLIPS, 0, 0, 1)
    assert "it cannot be read: Input/output error" in report.failed[0].reason


def test_a_damaged_list_of_failures_is_passed_over(empty, clips, caplog):
    (clips / "car_pan.mp4").write_bytes(b"garbage")
    empty.add(clips)
    with (empty.path / "errors.jsonl").open("a") as file:
        file.write('{"uri": \n')
    assert counts(empty.add(clips)) == (0, 0, NUM_CLIPS - 1, 1)
    assert "errors.jsonl line 2 cannot be read" in caplog.text


def test_strict_stops_at_the_first(empty, clips):
    (clips / "dancer_zoom.mp4").write_bytes(b"garbage")
    with pytest.raises(IndexingStopped, match=r"dancer_zoom\.mp4.* 5 clips before it are stored"):
        empty.add(clips, strict=True)
    names = made_names(clips)
    stored = {os.path.basename(row["uri"]) for row in all_rows(empty)}
    assert stored == set(names[: names.index("dancer_zoom.mp4")])
    with pytest.raises(IndexingStopped, match="Nothing was indexed"):
        empty.add(clips, strict=True)
    assert counts(empty.add(clips)) == (NUM_CLIPS - 6, 0, 5, 1)
    make_video(clips / "dancer_zoom.mp4", seed=5)
    assert empty.add(clips, strict=True).added == 1


def test_missing_files_of_a_manifest_do_not_stop_the_rest(empty, clips):
    report = empty.add(clips, captions=captions_csv(clips, ["car_pan.mp4,x", "none.mp4,y", "../out.mp4,z"]))
    assert counts(report) == (NUM_CLIPS, 0, 0, 2)
    assert not (empty.path / "errors.jsonl").exists()  # those never were files


def test_metadata_of_several_types_and_later_columns(empty, clips):
    lines = ["car_pan.mp4,1,0.5,x,7", "car_zoom.mp4,2,1,y,z"]
    empty.add(captions_csv(clips, lines, "file,whole,number,word,mixed"))
    row = row_of(empty, "car_pan.mp4")
    assert (row["whole"], row["number"], row["word"], row["mixed"]) == (1, 0.5, "x", "7")
    # Numbers for a column of text and whole numbers for one of floats are no change in the next run.
    again = captions_csv(clips, ["car_pan.mp4,1,0.5,x,7"], "file,whole,number,word,mixed")
    assert counts(empty.add(again)) == (0, 0, 1, 0)
    later = captions_csv(clips, ["wave_pan.mp4,3,True,late", "car_pan.mp4,1,True,"], "file,whole,new,newer")
    assert counts(empty.add(later)) == (1, 1, 0, 0)
    assert (row_of(empty, "wave_pan.mp4")["newer"], row_of(empty, "car_zoom.mp4")["newer"]) == ("late", None)
    assert row_of(empty, "car_pan.mp4")["word"] == "x"  # not stated any more, so it stays
    assert len(empty.search(motion=torch.ones(25, 96), where="whole >= 2 AND newer IS NULL")) == 1


def test_conflicting_types_are_refused_before_anything_is_written(empty, clips):
    empty.add(captions_csv(clips, ["car_pan.mp4,1"], "file,take"))
    before = tree(empty.path / "clips.lance")
    conflict = captions_csv(clips, ["wave_pan.mp4,one,new"], "file,take,other")
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="'take' is string here, but int64 in the database"):
            empty.add(conflict, dry_run=dry_run)
    assert tree(empty.path / "clips.lance") == before


def test_reserved_and_awkward_column_names(empty, clips):
    header = 'file,id,fps,uri,revision,motion_tokens,text_embedding,a.b,c`d,"with ""quotes""",_rowid,,Motion'
    empty.add(captions_csv(clips, ["car_pan.mp4,mine,99,u,7,t,e,1,2,3,4,5,pan"], header), video_column="file")
    row = row_of(empty, "car_pan.mp4")
    assert (row["fps"], row["revision"], len(row["id"])) == (8.0, 0, 32)
    assert (row["a_b"], row["c_d"], row['with "quotes"'], row["rowid"], row["Motion"]) == (1, 2, 3, 4, "pan")
    assert "" not in row
    hits = empty.search(motion=torch.ones(25, 96), where="a_b = 1 AND Motion = 'pan'")
    assert hits[0].clip.metadata["a_b"] == 1


def test_several_spans_of_one_file(empty, clips):
    lines = [
        "dancer_zoom.mp4,0,2,first",
        "dancer_zoom.mp4,1,3,second",
        "dancer_zoom.mp4,,,whole",
        "dancer_zoom.mp4,90,,no",
    ]
    report = empty.add(captions_csv(clips, lines, "file,start_sec,end_sec,caption"))
    assert counts(report) == (3, 0, 0, 1)
    assert "shows no frame from 90 s" in report.failed[0].reason
    rows = {row["caption"]: (row["start_s"], row["end_s"], row["num_frames"]) for row in all_rows(empty)}
    assert rows == {"first": (0, 2, 16), "second": (1, 3, 16), "whole": (0, 4, 32)}
    # A span that fails does not hide that another one of the file can be read.
    assert counts(empty.add(captions_csv(clips, lines, "file,start_sec,end_sec,caption"))) == (0, 0, 3, 1)


def test_names_with_anything_in_them(empty, clips):
    for number, name in enumerate(
        ["with space.mp4", "ünï🎬.mp4", "it's.mp4", 'q"uote;--.mp4', "line\nbreak.mp4", "\u2028.mp4"]
    ):
        make_video(clips / "made.mp4", seed=60 + number)
        (clips / "made.mp4").rename(clips / name)
    (clips / "bad\u2028.mp4").write_bytes(b"garbage")
    assert counts(empty.add(clips)) == (NUM_CLIPS + 6, 0, 0, 1)
    assert counts(empty.add(clips)) == (0, 0, NUM_CLIPS + 6, 1)
    for row in all_rows(empty):
        hits = empty.search(motion=torch.ones(25, 96), k=50, exclude=row["uri"])
        assert len(hits) == len(empty) - 1
        assert row["uri"] not in {hit.clip.uri for hit in hits}


def test_batches_follow_the_listing(empty, clips, encoder, monkeypatch):
    """A run that was stopped anywhere and continued gives the same bits as one that was not."""
    whole = MotionDatabase.create(clips.parent / "whole", encoder=encoder)
    whole.add(clips)
    monkeypatch.setattr(build, "COMMIT_ROWS", 1)
    (clips / "horse_zoom.mp4").rename(clips.parent / "kept")
    (clips / "horse_zoom.mp4").write_bytes(b"garbage")
    with pytest.raises(IndexingStopped, match="8 clips before"):
        empty.add(clips, strict=True)
    (clips / "horse_zoom.mp4").unlink()
    (clips.parent / "kept").rename(clips / "horse_zoom.mp4")
    assert empty.add(clips).added == NUM_CLIPS - 8
    assert all_rows(empty) == all_rows(whole)


def fake_rows(numbers, schema, folder):
    """Rows as indexing would have made them, with made-up vectors."""
    count, generator = len(numbers), np.random.default_rng(0)
    columns = {}
    for field in schema:
        if pa.types.is_fixed_size_list(field.type):
            array = generator.standard_normal((count, field.type.list_size)).astype(np.float32)
            array /= np.linalg.norm(array, axis=1, keepdims=True)
            columns[field.name] = pa.FixedSizeListArray.from_arrays(
                pa.array(array.reshape(-1)).cast(field.type.value_type), field.type.list_size
            )
        elif field.name == "uri":
            columns[field.name] = pa.array([f"{folder}/{number:05}.mp4" for number in numbers])
        elif pa.types.is_string(field.type):
            columns[field.name] = pa.array([f"{number:032x}" for number in numbers])
        else:
            columns[field.name] = pa.array(np.full(count, float(field.name == "end_s"))).cast(field.type)
    return pa.table(columns, schema=schema)


def test_comparing_takes_memory_for_the_listing_only(tmp_path):
    """Of 20 000 stored rows, only those of the three listed files become Python objects."""
    import tracemalloc

    schema = table_schema({"text": 4, "image": 4, "motion": 4}, 2, 2)
    table = ClipTable.create(tmp_path / "clips.lance", schema)
    table.append(fake_rows(range(20_000), schema, tmp_path))
    for number in range(3):
        make_video(tmp_path / f"{number:05}.mp4", seed=number)
    listing = Listing("test", [Clip(str(tmp_path / f"{number:05}.mp4")) for number in range(3)])
    tracemalloc.start()
    report = build.preview_clips(listing, table=table, failures=FailureLog(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (report.added, report.changed) == (0, 3)
    assert peak < 2e6


def test_a_wrong_reader_blames_no_file(tmp_path, encoder):
    (tmp_path / "clips").mkdir()
    make_video(tmp_path / "clips" / "a.mp4")
    database = MotionDatabase.create(tmp_path / "db", encoder=encoder)
    with pytest.raises(ValueError, match="There is no video reader 'opencv'"):
        database.add(tmp_path / "clips", reader="opencv")
    assert database.add(tmp_path / "clips").added == 1


def test_what_failed_in_another_way_is_tried_again(tmp_path, encoder):
    pytest.importorskip("decord", reason="decord has no wheel for this machine")
    (tmp_path / "clips").mkdir()
    # decord 0.6 fails at this width.
    make_video(tmp_path / "clips" / "a.mp4", size=(48, 32))
    database = MotionDatabase.create(tmp_path / "db", encoder=encoder)
    assert counts(database.add(tmp_path / "clips", reader="decord")) == (0, 0, 0, 1)
    [failure] = database.add(tmp_path / "clips", reader="decord").failed
    assert "tried before" in failure.reason
    [failure] = database.add(tmp_path / "clips", reader="decord", retry_failed=True).failed
    assert "tried before" not in failure.reason
    assert counts(database.add(tmp_path / "clips")) == (1, 0, 0, 0)


@pytest.mark.parametrize("caption", ["", " ", "\n", "\xa0"])
def test_a_blank_caption_is_none(tmp_path, encoder, caption):
    make_video(tmp_path / "a.mp4")
    database = MotionDatabase.create(tmp_path / "db", encoder=encoder)
    assert database.add([Clip(tmp_path / "a.mp4", caption=caption)]).added == 1
    assert not database.has_captions


def test_compacting_keeps_every_row_and_frees_space(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(build, "COMMIT_ROWS", 1)
    make_video(tmp_path / "a.mp4")
    database = MotionDatabase.create(tmp_path / "db", encoder=encoder)
    for number in range(6):
        database.add([Clip(tmp_path / "a.mp4", caption=f"take {number}")])
    before = database.info()["bytes"]
    [hit] = database.search(text="take 5", k=1)
    database.compact()
    assert database.info()["bytes"] < before / 2
    [same] = MotionDatabase(tmp_path / "db", encoder=encoder).search(text="take 5", k=1)
    assert (same.id, same.score, same.clip.caption) == (hit.id, hit.score, "take 5")
    assert torch.equal(same.motion_tokens, hit.motion_tokens)
    assert MotionDatabase(tmp_path / "db", encoder=encoder).verify() == []


def test_indexing_again_without_captions_erases_none(tmp_path, encoder):
    video = make_video(tmp_path / "a.mp4")
    database = MotionDatabase.create(tmp_path / "db", encoder=encoder)
    database.add([Clip(video, caption="a car", licence="CC0", metadata={"motion": "pan"})])
    assert counts(database.add([Clip(video)])) == (0, 0, 1, 0)
    assert counts(database.add([Clip(video, caption="a red car")])) == (0, 1, 0, 0)
    [row] = all_rows(database)
    assert (row["caption"], row["licence"], row["motion"]) == ("a red car", "CC0", "pan")
