"""SVG drawings: each path and polyline is a track, its curves followed evenly in the path's own parameter.

The canvas is the viewBox, or else width and height. Not read: transforms, arcs, and a path that is lifted and set down
again; each is an error, for leaving it out would silently move the track.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from motionrag.trajectory.formats.files import Canvas, build_tracks, canvas_of
from motionrag.trajectory.tracks import Tracks

CURVE_POINTS = 16
"""Points taken along each curve."""
_TOKEN = re.compile(r"([A-Za-z])|([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|([\s,]+)|(.)")
_ARGUMENTS = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "Z": 0}


def read(path: Path, canvas: Canvas) -> Tracks:
    """Read the drawing."""
    root = _parse(path)
    left, top, size = _view(path, root)
    tracks = []
    for element in root.iter():
        tag = str(element.tag).rpartition("}")[2]
        if "transform" in element.attrib:
            raise ValueError(f"{path}: <{tag}> has a transform, which is not read; apply it in the drawing program.")
        try:
            if tag == "path":
                tracks.append(path_points(element.get("d", "")))
            elif tag == "polyline":
                tracks.append(path_points("M" + element.get("points", "")))
        except ValueError as error:
            raise ValueError(f"{path}, track {len(tracks)}: {error}") from error
    return build_tracks(path, [points - (left, top) for points in tracks], canvas_of(path, canvas, size))


def write(path: Path, tracks: Tracks) -> None:
    """Write each track as a path of straight lines through its points; a single point is a path of one point."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{tracks.width}" height="{tracks.height}" '
        f'viewBox="0 0 {tracks.width} {tracks.height}">'
    ]
    for way in tracks.trajectories:
        data = "M " + " L ".join(f"{x!r} {y!r}" for x, y in way.points)
        lines.append(f'  <path d="{data}" fill="none" stroke="red"/>')
    path.write_text("\n".join([*lines, "</svg>", ""]), encoding="utf-8")


def path_points(data: str) -> np.ndarray:
    """Follow the data of an SVG path.

    Args:
        data: the attribute `d`.

    Returns:
        `(n, 2)`, float64: the corners, and 16 points along each curve.

    Raises:
        ValueError: for a command or number that is not understood.
    """
    points: list[np.ndarray] = []
    control, before = np.zeros(2), ""
    for command, values in _commands(data):
        name, relative = command.upper(), command.islower()
        if (name == "M") == bool(points):
            raise ValueError("a path starts with M, and has no second one; draw each track as its own path.")
        here = points[-1] if points else np.zeros(2)
        if name in "HV":
            target = here.copy()
            axis = "HV".index(name)
            target[axis] = values[0] + (here[axis] if relative else 0)
            corners = [target]
        elif name == "Z":
            corners = [points[0]]
        else:
            corners = list(np.reshape(values, (-1, 2)) + (here if relative else 0))
        if name in "ST":
            mirrored = 2 * here - control if before in ("CS" if name == "S" else "QT") else here
            corners = [mirrored, *corners]
        points += _curve([here, *corners]) if len(corners) > 1 else corners
        control, before = corners[-2] if len(corners) > 1 else points[-1], name
    if not points:
        raise ValueError("the path has no points.")
    return np.array(points)


def _commands(data: str) -> Iterator[tuple[str, list[float]]]:
    """Each command with as many numbers as it takes."""
    for letter, numbers in _groups(data):
        count = _ARGUMENTS.get(letter.upper())
        if count is None:
            raise ValueError(f"command {letter} is not read; use lines and Bézier curves (M L H V C S Q T Z).")
        if count == 0 and not numbers:
            yield letter, []
        elif count == 0 or not numbers or len(numbers) % count:
            raise ValueError(f"command {letter} takes {count} numbers each time; this one has {len(numbers)}.")
        else:
            for start in range(0, len(numbers), count):
                yield letter, numbers[start : start + count]
                # Further pairs after M are lines.
                letter = {"M": "L", "m": "l"}.get(letter, letter)


def _groups(data: str) -> list[tuple[str, list[float]]]:
    groups: list[tuple[str, list[float]]] = []
    for letter, number, _, other in _TOKEN.findall(data):
        if letter:
            groups.append((letter, []))
        elif other or (number and not groups):
            raise ValueError(f"the path has {other or number!r} where a command must be.")
        elif number:
            groups[-1][1].append(float(number))
    return groups


def _curve(controls: list[np.ndarray]) -> list[np.ndarray]:
    """Points on the Bézier curve of any degree, its start left out."""
    degree = len(controls) - 1
    time = np.linspace(0, 1, CURVE_POINTS + 1)[1:, None]
    terms = [
        math.comb(degree, i) * time**i * (1 - time) ** (degree - i) * control for i, control in enumerate(controls)
    ]
    return list(np.sum(terms, 0))


def _parse(path: Path) -> ElementTree.Element:
    text = path.read_text(encoding="utf-8", errors="replace")
    # Drawings need no entities, and nested ones can fill the memory.
    if "<!ENTITY" in text:
        raise ValueError(f"{path} defines XML entities, which are not read; save it as plain SVG.")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 - entities are refused above
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is no SVG ({error}).") from error
    if not str(root.tag).endswith("svg"):
        raise ValueError(f"{path} is no SVG; it starts with <{root.tag}>.")
    return root


def _view(path: Path, root: ElementTree.Element) -> tuple[float, float, Canvas]:
    """Left and top of the drawing, and its size if it says one."""
    try:
        if "viewBox" in root.attrib:
            left, top, width, height = map(float, re.split(r"[\s,]+", root.attrib["viewBox"].strip()))
        elif "width" in root.attrib and "height" in root.attrib:
            width, height = (float(root.attrib[side].removesuffix("px")) for side in ("width", "height"))
            left = top = 0.0
        else:
            return 0.0, 0.0, None
    except ValueError as error:
        raise ValueError(f"{path} has a size that is not plain pixels; give the drawing a viewBox.") from error
    if not (width.is_integer() and height.is_integer()):
        raise ValueError(f"{path} has a canvas of {width:g}x{height:g}; use whole pixels.")
    return left, top, (int(height), int(width))
