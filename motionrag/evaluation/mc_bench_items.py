"""MC-Bench on disk: which items there are, and the generated video of each.

    ROOT/CATEGORY/ITEM/{first_frame.png, first_frame_mask.png, user_drag.png, meta_data.json, meta_data_new.json}
    VIDEOS/CATEGORY/ITEM.mp4  or  VIDEOS/CATEGORY/ITEM/*.mp4

Evaluation reads the drags and the size of the first frame. Generation reads `meta_data.json`, the released evaluator
`meta_data_new.json`: both are kept.
"""

from dataclasses import dataclass
from pathlib import Path

from motionrag.trajectory import Tracks, read_tracks

IMAGE, POINTS, POINTS_OF_EVALUATOR = "first_frame.png", "meta_data.json", "meta_data_new.json"
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")

Drags = tuple[tuple[tuple[float, float], ...], ...]


@dataclass(frozen=True)
class MCBenchItem:
    """One image with its drags.

    Attributes:
        category: Folder.
        name: Folder in the category.
        height: Of the first frame, pixels.
        width: Likewise.
        drags: Key points of each drag, x then y, pixels of the first frame.
        evaluator_drags: What the released evaluator reads; None if the item has no such file, which it skips.
    """

    category: str
    name: str
    height: int
    width: int
    drags: Drags
    evaluator_drags: Drags | None

    @property
    def path(self) -> str:
        """Category and name."""
        return f"{self.category}/{self.name}"


@dataclass(frozen=True)
class MCBench:
    """What a folder of MC-Bench holds.

    Attributes:
        items: Sorted by category and name.
        broken: Why each item that cannot be read cannot, by category/name.
        notes: What was passed over.
    """

    items: tuple[MCBenchItem, ...]
    broken: dict[str, str]
    notes: tuple[str, ...]


def read_mc_bench(root: str | Path) -> MCBench:
    """List the items of an MC-Bench folder.

    Args:
        root: Folder of the categories.

    Returns:
        Items, broken ones and stray files.

    Raises:
        ValueError: If there is no such folder, or no item in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"There is no folder {root}; MC-Bench is a folder CATEGORY/ITEM/{POINTS}.")
    items, broken, notes = [], {}, []
    for category in sorted(root.iterdir()):
        if not category.is_dir():
            notes.append(f"{category.name} is no category")
            continue
        for folder in sorted(category.iterdir()):
            path = f"{category.name}/{folder.name}"
            if not folder.is_dir():
                notes.append(f"{path} is no item")
                continue
            try:
                items.append(_read_item(folder))
            except (ValueError, OSError) as error:
                broken[path] = str(error)
    if not items and not broken:
        raise ValueError(f"{root} holds no MC-Bench item; these are folders CATEGORY/ITEM with a {POINTS}.")
    return MCBench(tuple(items), broken, tuple(notes))


def find_video(videos: str | Path, item: MCBenchItem) -> Path | None:
    """The generated video of an item.

    Args:
        videos: Folder of the categories.
        item: Which.

    Returns:
        `CATEGORY/ITEM.mp4`, or the only video in `CATEGORY/ITEM/`; None if there is neither.

    Raises:
        ValueError: If there are several.
    """
    category = Path(videos) / item.category
    # Names may hold dots, so suffixes are appended, not replaced.
    files = [file for suffix in SUFFIXES if (file := category / f"{item.name}{suffix}").is_file()]
    folder = category / item.name
    if folder.is_dir():
        files += sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in SUFFIXES)
    if len(files) > 1:
        raise ValueError(
            f"{item.path} has {len(files)} videos ({', '.join(str(file.relative_to(category)) for file in files)}); "
            "keep the one to be measured."
        )
    return files[0] if files else None


def _read_item(folder: Path) -> MCBenchItem:
    missing = [name for name in (IMAGE, POINTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}.")
    tracks, second = read_tracks(folder / POINTS, format="motionpro"), folder / POINTS_OF_EVALUATOR
    return MCBenchItem(
        category=folder.parent.name,
        name=folder.name,
        height=tracks.height,
        width=tracks.width,
        drags=_drags(folder / POINTS, tracks),
        evaluator_drags=_drags(second, read_tracks(second, format="motionpro")) if second.is_file() else None,
    )


def _drags(file: Path, tracks: Tracks) -> Drags:
    """Key points; drags may leave the picture, but there is nothing to follow where they start outside."""
    for index, way in enumerate(tracks.trajectories):
        x, y = way.points[0]
        if not (0 <= x < tracks.width and 0 <= y < tracks.height):
            raise ValueError(
                f"{file}, drag {index} starts at ({x:g}, {y:g}), outside the {tracks.width}x{tracks.height} picture."
            )
    return tuple(way.points for way in tracks.trajectories)
