"""Every input convention, and what is wrong with real manifests."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from motionrag.database.metadata import plain_metadata
from motionrag.database.sources import list_clips
from motionrag.video import Clip


@pytest.fixture
def folder(tmp_path):
    """Files with the names of videos; nothing here decodes them."""
    folder = tmp_path / "videos"
    for name in ("b.mp4", "a.MP4", "c d é.webm", "sub/deep/e.mov"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def manifest(folder, content, name="list.csv"):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def names(listing):
    return [Path(clip.uri).name for clip in listing.clips]


def test_folder(folder):
    (folder / "b.txt").write_text("\ufeffa caption\n", encoding="utf-8")
    (folder / "notes.txt").write_text("no caption")
    listing = list_clips(folder)
    assert names(listing) == ["a.MP4", "b.mp4", "c d é.webm", "e.mov"]
    assert listing.convention == "folder of videos, 1 of 4 with a same-stem .txt caption"
    assert [clip.caption for clip in listing.clips] == ["", "a caption", "", ""]
    assert [dict(clip.metadata) for clip in listing.clips] == [{}, {}, {}, {"label": "sub/deep"}]
    assert all(Path(clip.uri).is_absolute() for clip in listing.clips)


def test_relative_folder_gives_the_same_clips(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert list_clips("videos") == list_clips(folder) == list_clips(folder / ".." / "videos")


def test_hidden_files_are_passed_over(folder):
    (folder / ".cache").mkdir()
    for name in ("._b.mp4", ".cache/x.mp4"):
        (folder / name).write_bytes(b"x")
    assert len(list_clips(folder).clips) == 4


def test_links_keep_their_name(folder, tmp_path):
    blob = tmp_path / "blobs" / "0123abcd"
    blob.parent.mkdir()
    blob.write_bytes(b"x")
    (folder / "link.mp4").symlink_to(blob)
    (folder / "broken.mp4").symlink_to(tmp_path / "nowhere")
    (folder / "loop").symlink_to(folder)
    assert "link.mp4" in names(list_clips(folder))
    assert len(list_clips(folder).clips) == 5
    listing = list_clips(folder, captions=manifest(folder, "file,caption\nlink.mp4,linked\nbroken.mp4,x\n"))
    assert [clip.caption for clip in listing.clips if clip.uri.endswith("link.mp4")] == ["linked"]
    assert [failure.reason for failure in listing.failures] == ["row 2 of list.csv: there is no such file"]


def test_links_to_folders_are_followed(folder, tmp_path):
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "link").symlink_to(folder)
    (shop / "nowhere").symlink_to(tmp_path / "nowhere")
    (shop / "itself").symlink_to("itself")
    (shop / ".hidden").symlink_to(tmp_path)
    (folder / "b.txt").write_text("a caption")
    (folder / "back").symlink_to(shop)
    (folder / "a shortcut").symlink_to(folder / "sub")
    listing = list_clips(shop)
    assert [clip.uri for clip in listing.clips] == [
        str(folder / name) for name in ("a.MP4", "b.mp4", "c d é.webm", "sub/deep/e.mov")
    ]
    assert [clip.caption for clip in listing.clips] == ["", "a caption", "", ""]
    assert [clip.metadata["label"] for clip in listing.clips] == ["link", "link", "link", "link/sub/deep"]
    assert listing.failures == []


@pytest.mark.parametrize("link", ["0 before", "z after"])
def test_a_folder_goes_by_its_own_name_before_that_of_a_link(folder, link):
    (folder / link).symlink_to(folder / "sub" / "deep")
    listing = list_clips(folder)
    assert [(Path(clip.uri).name, dict(clip.metadata)) for clip in listing.clips][3:] == [
        ("e.mov", {"label": "sub/deep"})
    ]


def test_an_entry_refused_behind_a_link_is_not_listed_without_its_caption(folder, tmp_path):
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "link").symlink_to(folder)
    captions = manifest(tmp_path, '{"file": "link/b.mp4"}\n{"file": "x\\u0000y/z.mp4"}\n', "list.jsonl")
    listing = list_clips(shop, captions=captions)
    assert names(listing) == ["a.MP4", "c d é.webm", "e.mov"]
    assert "leads out of" in listing.failures[0].reason
    assert len(listing.failures) == 2


def test_caption_that_is_not_utf8_is_listed(folder):
    (folder / "b.txt").write_bytes(b"caf\xe9")
    listing = list_clips(folder)
    assert len(listing.clips) == 3
    assert "b.txt is not in UTF-8" in listing.failures[0].reason


def test_name_that_is_not_utf8_is_listed(folder):
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.mp4")).write_bytes(b"x")
    listing = list_clips(folder)
    assert len(listing.clips) == 4
    assert listing.failures[0].uri.endswith("caf\\xe9.mp4")
    json.dumps(listing.failures[0].uri).encode()


def test_videofolder_with_metadata(folder):
    manifest(folder, 'file_name,text,motion\nb.mp4,"one, two",pan\nsub/deep/e.mov,three,zoom\n', "metadata.csv")
    listing = list_clips(folder)
    assert listing.convention == "VideoFolder with metadata.csv; 2 videos that it does not list are left out"
    assert [(clip.caption, clip.metadata["motion"]) for clip in listing.clips] == [
        ("one, two", "pan"),
        ("three", "zoom"),
    ]


def test_two_metadata_files_are_refused(folder):
    manifest(folder, "file_name\nb.mp4\n", "metadata.csv")
    manifest(folder, '{"file_name": "b.mp4"}\n', "metadata.jsonl")
    with pytest.raises(ValueError, match=r"metadata\.csv and metadata\.jsonl; keep one"):
        list_clips(folder)


def test_captions_for_a_folder(folder, tmp_path):
    captions = manifest(tmp_path, "file,caption\nb.mp4,one\nmissing.mp4,two\nsub/deep/e.mov,three\n")
    listing = list_clips(folder, captions=captions)
    assert listing.convention == "folder with captions from list.csv, 2 videos without"
    found = {Path(clip.uri).name: clip.caption for clip in listing.clips}
    assert found == {"b.mp4": "one", "e.mov": "three", "a.MP4": "", "c d é.webm": ""}
    assert [(Path(failure.uri).name, failure.reason) for failure in listing.failures] == [
        ("missing.mp4", "row 2 of list.csv: there is no such file")
    ]


def test_a_refused_entry_is_not_listed_without_its_caption(folder, monkeypatch):
    captions = manifest(folder, "file,caption,start_s\nb.mp4,one,never\n")
    monkeypatch.chdir(folder.parent)
    listing = list_clips("videos", captions=captions)
    assert "b.mp4" not in names(listing)
    assert "'never' is no time in seconds" in listing.failures[0].reason


def test_captions_need_a_folder_and_must_exist(folder):
    captions = manifest(folder, "file\nb.mp4\n")
    with pytest.raises(ValueError, match="go with a folder of videos"):
        list_clips(folder / "b.mp4", captions=captions)
    with pytest.raises(FileNotFoundError, match=r"nothing\.csv"):
        list_clips(folder, captions=folder / "nothing.csv")


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("file_name", "VideoFolder-style "),
        ("video_path", "musubi-tuner-style "),
        ("video", "OpenVid-style "),
        ("uri", ""),
    ],
)
def test_jsonl_conventions_are_named(folder, column, kind):
    lines = [{column: "b.mp4", "prompt": "one"}, {column: "a.MP4", "prompt": "two", "score": 0.5}]
    path = manifest(folder, "\n".join(map(json.dumps, lines)) + "\n\n", "list.jsonl")
    listing = list_clips(path)
    expected = f"{kind}manifest list.jsonl (column {column!r} for the video, 'prompt' for the caption)"
    assert listing.convention == expected
    assert [clip.metadata["score"] for clip in listing.clips] == [None, 0.5]


def test_jsonl_lines_end_with_line_feeds_only(folder):
    caption = "one\u2028two\x85three"
    path = manifest(folder, json.dumps({"file": "b.mp4", "caption": caption}, ensure_ascii=False), "list.jsonl")
    assert list_clips(path).clips[0].caption == caption


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"file": "b.mp4"}\n{"file": \n', r"list\.jsonl line 2 is no JSON"),
        ('{"file": "b.mp4"}\n\n["b.mp4"]\n', r"list\.jsonl line 3 must be a JSON object, got list"),
        (b'{"file": "b\xe9.mp4"}\n', r"list\.jsonl line 1 is no JSON in UTF-8"),
        ("[" * 100_000, r"list\.jsonl line 1 is no JSON"),
        ("\n", r"list\.jsonl lists no clips"),
    ],
)
def test_malformed_jsonl(folder, lines, message):
    with pytest.raises(ValueError, match=message):
        list_clips(manifest(folder, lines, "list.jsonl"))


def test_parquet(folder):
    table = pa.table(
        {
            "path": ["b.mp4", "a.MP4", "b.mp4"],
            "caption": ["one", None, "three"],
            "start_sec": [0.0, 0.0, 1.5],
            "end_sec": [1.5, float("nan"), None],
            "tags": [["x"], ["y", "z"], []],
        }
    )
    parquet.write_table(table, folder / "list.parquet")
    listing = list_clips(folder / "list.parquet")
    assert [(clip.caption, clip.start_s, clip.end_s) for clip in listing.clips] == [
        ("one", 0.0, 1.5),
        ("", 0.0, None),
        ("three", 1.5, None),
    ]
    assert plain_metadata(listing.clips[1].metadata, ()) == {"tags": '["y", "z"]'}


def test_parquet_that_is_none(folder):
    with pytest.raises(ValueError, match=r"list\.parquet is no readable Parquet file"):
        list_clips(manifest(folder, "file\nb.mp4\n", "list.parquet"))


def test_byte_order_mark_and_tabs(folder):
    listing = list_clips(manifest(folder, "\ufefffile\tcaption\nb.mp4\ta, b\n", "list.tsv"))
    assert listing.clips[0].caption == "a, b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,caption\nb.mp4,one, two\n", r"list\.csv line 2: expected 2 fields; put a caption"),
        ("file,caption\na.MP4,one\nb.mp4\n", r"list\.csv line 3: expected 2 fields"),
        ('file,caption\na.MP4,one\nb.mp4,"two" x\n', r"list\.csv from line 3 on is no CSV"),
        ('file,caption\nb.mp4,"two\n', r"list\.csv from line 2 on is no CSV"),
        (b"file,caption\nb.mp4,caf\xe9\n", r"list\.csv from line 1 on is no CSV in UTF-8"),
        ("file,caption,file\nb.mp4,x,y\n", r"list\.csv names a column twice: file, caption, file"),
        ("file,caption\n", r"list\.csv lists no clips"),
        ("", r"list\.csv lists no clips"),
        (
            "clip,words\nb.mp4,x\n",
            r"no column for the video: looked for file_name, .*columns are clip, words. .*--video",
        ),
    ],
)
def test_malformed_csv(folder, content, message):
    with pytest.raises(ValueError, match=message):
        list_clips(manifest(folder, content))


def test_named_columns(folder):
    path = manifest(folder, "clip,words,caption\nb.mp4,yes,no\n")
    clip = list_clips(path, video_column="clip", caption_column="words").clips[0]
    assert (clip.caption, clip.metadata["caption"]) == ("yes", "no")
    with pytest.raises(
        ValueError, match="no column for the caption: looked for word; the columns are clip, words, cap"
    ):
        list_clips(path, video_column="clip", caption_column="word")


def test_types_of_csv_columns(folder):
    header = "file,whole,number,code,odd,huge,empty,caption,licence,end_s\n"
    rows = "b.mp4,1,1,007,1_000,12345678901234567890,,1.50,1.10,2\na.MP4,-2,2.5e-1,012,nan,2,,2.50,,3.5\n"
    first, second = list_clips(manifest(folder, header + rows)).clips
    expected = {"whole": 1, "number": 1.0, "code": "007", "odd": "1_000", "huge": "12345678901234567890", "empty": None}
    assert first.metadata == expected
    assert second.metadata["number"] == 0.25
    assert isinstance(first.metadata["number"], float)
    assert (first.caption, first.licence, first.end_s) == ("1.50", "1.10", 2.0)


def test_spans_of_one_file(folder):
    path = manifest(
        folder, "file,start_s,end_s\nb.mp4,0,2\nb.mp4,1,3\nb.mp4,1.0,3.0\nb.mp4,3,1\nb.mp4,nan,x\nb.mp4,,\n"
    )
    listing = list_clips(path)
    assert [(clip.start_s, clip.end_s) for clip in listing.clips] == [(0.0, 2.0), (1.0, 3.0), (0.0, None)]
    reasons = sorted(failure.reason for failure in listing.failures)
    assert reasons[0] == "listed more than once; the first entry is used"
    assert "row 4 of list.csv" in reasons[1]
    assert "must be greater than start_s" in reasons[1]
    assert "row 5 of list.csv: 'x' is no time" in reasons[2]


def test_paths_of_a_manifest(folder, tmp_path):
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(b"x")
    (folder / "door").symlink_to(tmp_path)
    rows = [
        "../outside.mp4",
        "sub/../b.mp4",
        str(outside),
        "sub",
        "door/outside.mp4",
        "x" * 300 + ".mp4",
        "nul\0.mp4",
        "",
    ]
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps({"file": row}) + "\n" for row in rows))
    listing = list_clips(path)
    assert [clip.uri for clip in listing.clips] == [str(folder / "b.mp4"), str(outside)]
    reasons = [failure.reason.partition(": ")[2] for failure in listing.failures]
    assert reasons[0] == f"../outside.mp4 leads out of {folder}"
    assert reasons[1] == "there is no such file"
    assert reasons[2] == f"door/outside.mp4 leads out of {folder}"
    assert reasons[3] == "there is no such file"
    assert reasons[4] == "there is no such file"
    assert reasons[5] == "no file is named"


def test_list_from_python(folder, monkeypatch):
    monkeypatch.chdir(folder)
    listing = list_clips([Clip("b.mp4", caption="x"), Clip("none.mp4"), Clip("b.mp4"), Clip("b.mp4", start_s=1)])
    assert [(clip.uri, clip.start_s) for clip in listing.clips] == [
        (str(folder / "b.mp4"), 0),
        (str(folder / "b.mp4"), 1),
    ]
    assert [failure.reason for failure in listing.failures] == [
        "there is no such file",
        "listed more than once; the first entry is used",
    ]
    with pytest.raises(ValueError, match=r"must hold Clip objects, got str: 'b\.mp4'"):
        list_clips(["b.mp4"])


def test_words_that_utf8_cannot_hold_are_listed(folder):
    path = manifest(
        folder, '{"file": "b.mp4", "caption": "\\ud800"}\n{"file": "a.MP4", "tag": "\\ud800"}', "list.jsonl"
    )
    listing = list_clips(path)
    assert names(listing) == ["a.MP4"]
    assert "cannot be written as UTF-8" in listing.failures[0].reason
    assert plain_metadata(listing.clips[0].metadata, ()) == {"tag": "\\ud800"}


def test_single_video(folder):
    (folder / "b.txt").write_text("a caption")
    listing = list_clips(str(folder / "b.mp4"))
    assert (listing.convention, listing.clips) == ("a single video", [Clip(str(folder / "b.mp4"), caption="a caption")])


def test_what_is_none_of_these(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder .*nowhere"):
        list_clips(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a folder, nor a manifest"):
        list_clips(manifest(folder, "x", "list.docx"))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no videos"):
        list_clips(tmp_path / "none")


def test_plain_metadata():
    given = {
        "id": "claimed",
        "fps": 99,
        "": "index of pandas",
        "a.b": 1,
        "c`d": True,
        "_rowid": 7,
        "none": None,
        "empty": "",
        "nan": float("nan"),
        "numpy": np.float32(0.5),
        "huge": 2**70,
        "list": [1, "é"],
        3: "number",
    }
    assert plain_metadata(given, {"id", "fps"}) == {
        "a_b": 1,
        "c_d": True,
        "rowid": 7,
        "numpy": 0.5,
        "huge": str(2**70),
        "list": '[1, "\\u00e9"]',
        "3": "number",
    }
