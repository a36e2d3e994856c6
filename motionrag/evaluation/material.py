"""What the pocket is evaluated on: domains that no training has seen, their clips in real databases, and queries.

Three columns: `seen` (trained families, new scenes), `held-out-parameters` (trained families, the first parameter from
the range that training never draws) and `held-out-families`. Each column has one database with the reference clips of
all its domains, as files with captions that went through the ordinary indexing, so retrieval can go wrong.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from motionrag.database import MotionDatabase
from motionrag.encoder import MotionEncoder
from motionrag.evaluation.tracks import Tracked, track
from motionrag.pocket.clips import arrays_of
from motionrag.pocket.world import FPS, HELD_OUT_FAMILIES, TRAINED_FAMILIES, Domain, WorldClip, domain, sample_clip
from motionrag.video import write_video

COLUMNS = ("seen", "held-out-parameters", "held-out-families")
REFERENCES = 9  # clips of each domain in its column's database
# First number of every seed here. Training seeds are (1, i) and (2, i) for domains, with a 1 behind for clips.
SEED = 20_270_419
_TRACK_BATCH = 16


@dataclass(frozen=True)
class TrueClips:
    """Clips with everything that is true about them; b clips, n things, t frames.

    Attributes:
        frames: `(b t h w 3)` uint8.
        tracks: `(b n t 2)`, pixels, x then y; NaN where there is no thing.
        masks: `(b t h w)` uint8: 0 for the backdrop, i + 1 for thing i.
        colours: `(b n)`, -1 where there is no thing.
        families: Motion family of each.
        captions: With the made-up verb.
    """

    frames: Tensor
    tracks: Tensor
    masks: Tensor
    colours: Tensor
    families: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.families)

    @classmethod
    def of(cls, clips: Sequence[WorldClip]) -> "TrueClips":
        """Stack clips of the world.

        Args:
            clips: At least one.

        Returns:
            The clips.
        """
        rows = [arrays_of(clip) for clip in clips]
        frames, tracks, masks, colours = (
            torch.from_numpy(np.stack([row[name] for row in rows])) for name in ("frames", "tracks", "masks", "colours")
        )
        return cls(frames, tracks, masks, colours, [clip.family for clip in clips], [clip.caption for clip in clips])

    def select(self, chosen: Sequence[int]) -> "TrueClips":
        """Some of the clips.

        Args:
            chosen: Which.

        Returns:
            The clips, in that order.
        """
        index = torch.tensor(list(chosen), dtype=torch.long)
        return TrueClips(
            self.frames[index],
            self.tracks[index],
            self.masks[index],
            self.colours[index],
            [self.families[each] for each in chosen],
            [self.captions[each] for each in chosen],
        )

    def track(self, frames: Tensor) -> Tracked:
        """Track the things of these clips in other frames that start alike.

        Args:
            frames: `(b t h w 3)` uint8.

        Returns:
            Positions, areas and pixels.
        """
        parts = [
            track(
                frames[start : start + _TRACK_BATCH],
                starts=self.tracks[start : start + _TRACK_BATCH, :, 0],
                first_masks=self.masks[start : start + _TRACK_BATCH, 0],
                colours=self.colours[start : start + _TRACK_BATCH],
            )
            for start in range(0, len(self), _TRACK_BATCH)
        ]
        names = ("positions", "found", "areas", "shares")
        return Tracked(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Column:
    """Domains, their database and queries.

    Attributes:
        name: One of `COLUMNS`.
        queries: Clips of unseen scenes; the first frame is the image, the caption the prompt.
        domains: Number of the domain of each query.
        database: With the reference clips of all domains.
        references: Files of the reference clips of each domain.
    """

    name: str
    queries: TrueClips
    domains: list[int]
    database: MotionDatabase
    references: list[list[Path]]


def column(name: str, folder: Path, *, num_domains: int, queries_per_domain: int, encoder: MotionEncoder) -> Column:
    """Render a column's clips and index them, or open what an earlier run has made.

    Args:
        name: One of `COLUMNS`.
        folder: Where clips and database are kept.
        num_domains: How many domains; families take turns.
        queries_per_domain: Scenes to generate from, for each domain.
        encoder: Fills the database.

    Returns:
        The column.
    """
    number = COLUMNS.index(name)
    domains = _domains(number, num_domains)
    queries = [
        sample_clip(each, (SEED, number, index, 1, query), truth=False)
        for index, each in enumerate(domains)
        for query in range(queries_per_domain)
    ]
    clips = [
        [(f"{index:03d}-{reference}", each, (SEED, number, index, 2, reference)) for reference in range(REFERENCES)]
        for index, each in enumerate(domains)
    ]
    database = indexed(folder / name, [clip for group in clips for clip in group], encoder)
    return Column(
        name=name,
        queries=TrueClips.of(queries),
        domains=[index for index in range(num_domains) for _ in range(queries_per_domain)],
        database=database,
        references=[[folder / name / "clips" / f"{stem}.mp4" for stem, _, _ in group] for group in clips],
    )


def indexed(
    folder: Path, clips: Sequence[tuple[str, Domain, tuple[int, ...]]], encoder: MotionEncoder
) -> MotionDatabase:
    """Write clips as files with captions, and index them as any folder. What is there is kept.

    Args:
        folder: Gets `clips/` and `database/`.
        clips: Name, domain and seed of each.
        encoder: Fills the database.

    Returns:
        The database.

    Raises:
        ValueError: If a clip could not be indexed.
    """
    files, captions = folder / "clips", folder / "clips" / "captions.csv"
    files.mkdir(parents=True, exist_ok=True)
    if not captions.exists():  # written last
        rows = [("file_name", "caption")]
        for name, each, seed in clips:
            clip = sample_clip(each, seed, truth=False)
            write_video(files / f"{name}.mp4", clip.frames, FPS)
            rows.append((f"{name}.mp4", clip.caption))
        with captions.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    path = folder / "database"
    exists = (path / "manifest.json").exists()
    database = MotionDatabase(path, encoder=encoder) if exists else MotionDatabase.create(path, encoder=encoder)
    if len(database) < len(clips):
        database.add(files, captions=captions, num_workers=1)
    if len(database) != len(clips):
        raise ValueError(f"{path} should hold {len(clips)} clips, but holds {len(database)}; delete the folder.")
    return database


def _domains(number: int, count: int) -> list[Domain]:
    """Domains of a column, each with a verb of its own."""
    families = HELD_OUT_FAMILIES if COLUMNS[number] == "held-out-families" else TRAINED_FAMILIES
    made: list[Domain] = []
    verbs: set[str] = set()
    for index in range(count):
        family = families[index * 7 % len(families)]  # a few domains spread over all families, too
        attempt = 0
        while len(made) == index:
            drawn = domain(
                (SEED, number, index, 0, attempt),
                family=family,
                held_out_range=COLUMNS[number] == "held-out-parameters",
            )
            if drawn.verb not in verbs:
                made.append(drawn)
                verbs.add(drawn.verb)
            attempt += 1
    return made
