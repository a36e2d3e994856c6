"""Track files: what other tools write is read, what is written is read back, and wrong files say what is wrong."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from motionrag.trajectory import FORMATS, RegionTrajectory, Tracks, bench_items, rasterise, read_tracks, write_tracks
from motionrag.trajectory.formats.svg import path_points

FILES = Path(__file__).parent / "files"
CANVAS = {"height": 40, "width": 64}


def points_of(tracks):
    return [way.points for way in tracks.trajectories]


def test_tora():
    tracks = read_tracks(FILES / "sawtooth.txt")
    assert (tracks.height, tracks.width) == (256, 256)
    assert points_of(tracks) == [((76, 161), (95, 86), (106, 164), (126, 84), (137, 162), (160, 85))]
    circle = read_tracks(FILES / "circle.txt").resized(height=64, width=128)
    assert len(circle.trajectories[0].points) == 22
    assert circle.trajectories[0].points[0] == (60, 48.5)
    flow, _ = rasterise(circle.trajectories, height=64, width=128)
    assert flow[-1, 48, 60].tolist() == pytest.approx([-1, 0.25])
    assert read_tracks(FILES / "circle.txt", height=320, width=512).height == 320


def test_kjnodes(tmp_path):
    file = tmp_path / "spline.json"
    file.write_text('[{"x": 3, "y": 4}, {"x": 5, "y": 6}]')
    assert points_of(read_tracks(file, **CANVAS)) == [((3, 4), (5, 6))]
    file.write_text('[[{"x": 3, "y": 4}], [{"x": 70, "y": 6}]]')
    tracks = read_tracks(file, **CANVAS)
    assert points_of(tracks) == [((3, 4),), ((70, 6),)]  # editors let points leave the canvas
    write_tracks(tmp_path / "out.json", Tracks([[(0, 0), (10, 4.6)]], **CANVAS), num_frames=3, format="kjnodes")
    assert json.loads((tmp_path / "out.json").read_text()) == [[{"x": 0, "y": 0}, {"x": 5, "y": 2}, {"x": 10, "y": 5}]]


def test_ati(tmp_path):
    array = np.zeros((2, 121, 1, 3), np.float32)
    array[0, :, 0, 0] = 8 * np.linspace(0, 60, 121)
    array[1, :60, 0, 2] = 8
    data = io.BytesIO()
    np.savez_compressed(data, array=array)
    torch.save(data.getvalue(), tmp_path / "tracks.pth")
    tracks = read_tracks(tmp_path / "tracks.pth", **CANVAS)
    assert tracks.trajectories[0].points[120] == (60, 0)
    assert tracks.visible[1] == (True,) * 60 + (False,) * 61
    assert tracks.fps == 24
    write_tracks(tmp_path / "out.pth", Tracks([[(4, 8), (16, 32)]], **CANVAS))
    with np.load(io.BytesIO(torch.load(tmp_path / "out.pth", weights_only=True))) as archive:
        assert archive["array"].shape == (1, 121, 1, 3)
        assert archive["array"].dtype == np.float32
        assert archive["array"][0, [0, 60, 120], 0].tolist() == [[32, 64, 8], [80, 160, 8], [128, 256, 8]]


def test_wan_move(tmp_path):
    tracks = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    np.save(tmp_path / "example_tracks.npy", tracks)
    np.save(tmp_path / "example_visibility.npy", np.array([[[1, 0], [1, 1], [0, 1]]]))
    read = read_tracks(tmp_path / "example_tracks.npy", **CANVAS)
    assert points_of(read) == [((0, 1), (4, 5), (8, 9)), ((2, 3), (6, 7), (10, 11))]
    assert read.visible == ((True, True, False), (False, True, True))
    write_tracks(tmp_path / "tracks.npy", Tracks([[(0, 0), (4, 4)]], **CANVAS), num_frames=3)
    assert np.load(tmp_path / "tracks.npy").tolist() == [[[[0, 0]], [[2, 2]], [[4, 4]]]]
    assert np.load(tmp_path / "visibility.npy").tolist() == [[[True], [True], [True]]]


def test_svg(tmp_path):
    file = tmp_path / "ways.svg"
    file.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="10 20 64 40"><g>'
        '<path d="M 20,30 l10 0 0-5"/><rect/><polyline points="12,22 14,24"/></g></svg>'
    )
    tracks = read_tracks(file)
    assert (tracks.height, tracks.width) == (40, 64)
    assert points_of(tracks) == [((10, 10), (20, 10), (20, 5)), ((2, 2), (4, 4))]


@pytest.mark.parametrize(
    ("data", "points"),
    [
        ("M1 2 3 4", [(1, 2), (3, 4)]),
        ("m1-2.5.5.5", [(1, -2.5), (1.5, -2)]),
        ("M1 2H5V7h-1v1", [(1, 2), (5, 2), (5, 7), (4, 7), (4, 8)]),
        ("M1 2L3 4 5 1Z", [(1, 2), (3, 4), (5, 1), (1, 2)]),
        ("M1e1,2E-1", [(10, 0.2)]),
    ],
)
def test_svg_lines(data, points):
    assert path_points(data).tolist() == [pytest.approx(point) for point in points]


def test_svg_curves():
    # Middle of a cubic: (p0 + 3 p1 + 3 p2 + p3) / 8; of a quadratic: (p0 + 2 p1 + p2) / 4.
    cubic = path_points("M0 0 C 0 8 8 8 8 0")
    assert len(cubic) == 17
    assert cubic[8].tolist() == pytest.approx([4, 6])
    assert path_points("M0 0 c 0 8 8 8 8 0 s 8 -8 8 0")[24].tolist() == pytest.approx([12, -6])
    quadratic = path_points("M1 1 Q 3 5 5 1 T 9 1")
    assert quadratic[8].tolist() == pytest.approx([3, 3])
    assert quadratic[24].tolist() == pytest.approx([7, -1])
    assert path_points("M0 0 S 8 8 8 0")[8].tolist() == pytest.approx([4, 3])


WAYS = [[(1, 2), (30.5, 20.25), (60, 39)], [(12.5, 13.5), (12.5, 13.5), (12.5, 13.5)]]
NAMES = {"ati": "a.pth", "wan-move": "tracks.npy", "tora": "t.txt", "svg": "s.svg"}


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_round_trip(format, tmp_path):
    ways = WAYS[:1] if format == "tora" else WAYS
    if format == "kjnodes":
        ways = [[(round(x), round(y)) for x, y in way] for way in ways]
    seen = [[True, False, True]] * len(ways)
    tracks = Tracks(ways, **CANVAS, visible=seen, fps=12)
    if format == "ati":
        tracks = tracks.per_frame(121)
    file = tmp_path / NAMES.get(format, "tracks.json")
    write_tracks(file, tracks, format=format)
    own_canvas = format in ("json", "svg", "tora")
    read = read_tracks(file, **({} if own_canvas else CANVAS)).resized(**CANVAS)
    for before, after in zip(points_of(tracks), points_of(read), strict=True):
        assert np.allclose(before, after, atol=1e-5)
    keeps = format in ("json", "ati", "wan-move")
    assert read.visible == (tracks.visible if keeps else None)
    assert format != "json" or read.fps == 12


def save(name, content):
    def write(folder):
        file = folder / name
        if isinstance(content, np.ndarray):
            np.save(file, content)
        elif isinstance(content, bytes):
            file.write_bytes(content)
        elif isinstance(content, str):
            file.write_text(content)
        else:
            torch.save(content, file)
        return file

    return write


def npz(array):
    data = io.BytesIO()
    np.savez(data, array=array)
    return data


SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 40">{}</svg>'
WRONG = [
    (save("t.txt", "1,2\n3;4\n"), {}, "t.txt, line 2: a point is x,y; this is '3;4'"),
    (save("t.txt", "1,2\nnan,4\n"), {}, "t.txt, track 0: Point 1 of a trajectory is (nan, 4.0)"),
    (save("t.txt", "\n"), {}, "t.txt holds no track"),
    (save("t.json", "{'x': 1}"), CANVAS, "t.json is not JSON"),
    (save("t.json", '[[{"x": 1}]]'), CANVAS, 't.json, track 0: a point is {"x": …, "y": …}'),
    (save("t.json", '[{"x": 1, "y": "b"}]'), CANVAS, "t.json, track 0: A trajectory is a list of (x, y) points"),
    (save("t.json", '[{"x": 1, "y": 2}]'), {}, "t.json does not say how large its canvas is"),
    (save("t.json", "[]"), CANVAS, "t.json holds no track"),
    (save("t.json", '{"traj_key_points": 3}'), CANVAS, "t.json has no list 'traj_key_points'"),
    (save("t.json", '{"traj_key_points": [[[1, 2]], []]}'), CANVAS, "t.json, track 1: A trajectory needs at least one"),
    (save("t.json", '{"traj_key_points": [[[1, 2]]]}'), {}, "t.json does not say how large its canvas is"),
    (save("t.json", '{"height": 4, "width": 0, "tracks": []}'), {}, "t.json is no track file"),
    (save("t.json", '{"height": 4, "width": 4, "tracks": [3]}'), {}, "t.json, track 0: a track is {'points'"),
    (save("t.json", '{"height": 4, "width": 4, "tracks": [{"points": [[0, "x"]]}]}'), {}, "t.json"),
    (
        save("t.json", '{"height": 4, "width": 4, "tracks": [{"points": [[0, 0]], "visible": [true, true]}]}'),
        {},
        "t.json: Visibility needs one value for each point",
    ),
    (save("t.pth", {"a": 1}), CANVAS, "t.pth is no ATI file"),
    (save("t.pth", b"nothing"), CANVAS, "t.pth is no ATI file"),
    (save("t.pth", npz(np.zeros((2, 81, 1, 3))).getvalue()), CANVAS, "t.pth is no ATI file"),
    (save("tracks.npy", np.zeros((1, 3, 2, 2))), CANVAS, "needs its visibility in visibility.npy"),
    (save("ways.npy", np.zeros((1, 3, 2, 2))), CANVAS, "needs 'tracks' in its name"),
    (save("t.svg", "<svg"), {}, "t.svg is no SVG"),
    (save("t.svg", SVG.format('<path d="M0 0 A 1 1 0 0 0 2 2"/>')), {}, "t.svg, track 0: command A is not read"),
    (save("t.svg", SVG.format('<path d="M0 0 L 1"/>')), {}, "command L takes 2 numbers each time; this one has 1"),
    (save("t.svg", SVG.format('<path d="M0 0 M 1 1"/>')), {}, "has no second one"),
    (save("t.svg", SVG.format('<path d="0 0"/>')), {}, "has '0' where a command must be"),
    (save("t.svg", SVG.format('<g transform="scale(2)"/>')), {}, "<g> has a transform"),
    (save("t.svg", '<!DOCTYPE svg [<!ENTITY a "b">]><svg/>'), {}, "defines XML entities"),
    (save("t.svg", SVG.format("")), {}, "t.svg holds no track"),
    (save("t.svg", SVG.format('<path d="M0 0"/>')), {"height": 64, "width": 40}, "drawn on 64x40 pixels, not 40x64"),
    (save("t.csv", "1,2"), {}, "'.csv' is no known format of tracks; use json (.json), kjnodes (.json)"),
    (save("t.txt", "1,2"), {"height": 3}, "Give both height and width"),
]


@pytest.mark.parametrize(("write", "canvas", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_wrong_files_say_what_is_wrong(write, canvas, message, tmp_path):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared below
        read_tracks(write(tmp_path), **canvas)
    assert message in str(error.value)
    assert "\n" not in str(error.value).replace(str(tmp_path), "").strip()


def test_wrong_arrays(tmp_path):
    torch.save(npz(np.zeros((2, 81, 1, 3))).getvalue(), tmp_path / "t.pth")
    with pytest.raises(ValueError, match=r"holds an array \(2, 81, 1, 3\); ATI's tracks are \(n, 121, 1, 3\)"):
        read_tracks(tmp_path / "t.pth", **CANVAS)
    np.save(tmp_path / "tracks.npy", np.zeros((1, 3, 2, 2)))
    np.save(tmp_path / "visibility.npy", np.zeros((1, 2, 3)))
    with pytest.raises(ValueError, match=r"holds \(1, 2, 3\); for these tracks it must be \(1, 3, 2\)"):
        read_tracks(tmp_path / "tracks.npy", **CANVAS)


class Trap:
    """An object that would run a function when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_ati_files_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Trap(), tmp_path / "t.pth")
    with pytest.raises(ValueError, match="no ATI file"):
        read_tracks(tmp_path / "t.pth", **CANVAS)
    assert not (tmp_path / "trapped").exists()


def test_what_cannot_be_written(tmp_path):
    ragged = Tracks([[(0, 0)], [(1, 1), (2, 2)]], **CANVAS)
    with pytest.raises(ValueError, match="one point a frame in every track; give num_frames"):
        write_tracks(tmp_path / "tracks.npy", ragged)
    with pytest.raises(ValueError, match="holds one track, these are 2"):
        write_tracks(tmp_path / "t.txt", ragged)
    with pytest.raises(ValueError, match=r"must end in \.svg"):
        write_tracks(tmp_path / "t.txt", ragged, format="svg")
    with pytest.raises(ValueError, match="holds 121 points a track"):
        write_tracks(tmp_path / "t.pth", ragged, num_frames=16)
    with pytest.raises(FileNotFoundError, match=r"t\.txt is no file"):
        read_tracks(tmp_path / "t.txt")
    assert list(tmp_path.iterdir()) == []


def test_mc_bench_passes_over_stray_files_and_names_what_lacks(tmp_path):
    item = tmp_path / "object_control" / "dog"
    item.mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("stray")
    Image.new("RGB", (64, 40)).save(item / "first_frame.png")
    write_tracks(item / "meta_data.json", Tracks([RegionTrajectory([(3, 4)])], **CANVAS), format="motionpro")
    with pytest.raises(ValueError, match=r"dog lacks first_frame_mask\.png"):
        bench_items(tmp_path)
    Image.new("RGB", (64, 40), (0, 0, 1)).save(item / "first_frame_mask.png")
    (read,) = bench_items(tmp_path)
    assert read.name == "object_control/dog"
    assert read.brush.all()
    assert points_of(read.tracks) == [((3, 4),)]
    with pytest.raises(ValueError, match="holds no MC-Bench item"):
        bench_items(item)
