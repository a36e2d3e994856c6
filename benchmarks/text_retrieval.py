"""`python benchmarks/text_retrieval.py CLIPS CLIPS/clips.csv motion --text-encoder pocket HUB_ID_OR_FOLDER`.

How often the best hit of a caption has the same label: each captioned clip of a folder asks for the others by its own
caption, its own file left out, and scores if the best hit carries its label. Captions are embedded, never videos, so
it judges the sentence encoder alone; `chance` is the same with a hit drawn at random. Clips whose label occurs once
cannot score and are not counted.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow.csv

from motionrag import MotionDatabase, MotionEncoder, Reference
from motionrag.database.sources import list_clips


def main() -> None:
    """Index the folder once for each text encoder, ask, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="folder of clips")
    parser.add_argument("captions", type=Path, help="CSV with a file name, a caption and a label for each clip")
    parser.add_argument("label", help="column of the label")
    parser.add_argument("--text-encoder", nargs="+", default=["pocket"], help="'pocket', hub ids or folders")
    parser.add_argument("--k", type=int, default=9, help="how many hits are looked at for the column `in k`")
    arguments = parser.parse_args()
    if arguments.label not in pyarrow.csv.read_csv(arguments.captions).column_names:
        parser.error(f"{arguments.captions} has no column {arguments.label!r}")

    print("text encoder                              clips  top 1  in k   chance")
    for name in arguments.text_encoder:
        encoder = MotionEncoder.from_pretrained("pocket", text_encoder=None if name == "pocket" else name)
        with tempfile.TemporaryDirectory() as folder:
            database = MotionDatabase.create(Path(folder) / "db", encoder=encoder)
            report = database.add(arguments.clips, captions=arguments.captions)
            if report.failed:
                print(report)
            print(f"{name[-40:]:40}  {measured(database, arguments)}")


def measured(database: MotionDatabase, arguments: argparse.Namespace) -> str:
    """Ask with every caption; the figures as text."""
    clips = list_clips(arguments.clips, captions=arguments.captions).clips
    labels = Counter(clip.metadata[arguments.label] for clip in clips)
    asked = [clip for clip in clips if clip.caption and labels[clip.metadata[arguments.label]] > 1]
    first = several = 0
    for clip in asked:
        hits = database.search(text=clip.caption, k=arguments.k, exclude=clip)
        right = [label_of(hit, arguments.label) == clip.metadata[arguments.label] for hit in hits]
        first, several = first + right[0], several + any(right)
    chance = sum((labels[clip.metadata[arguments.label]] - 1) / (len(clips) - 1) for clip in asked) / len(asked)
    return f"{len(asked):5}  {first / len(asked):5.3f}  {several / len(asked):5.3f}  {chance:5.3f}"


def label_of(reference: Reference, column: str) -> object:
    """The label that a hit carries."""
    return reference.clip.metadata.get(column)


if __name__ == "__main__":
    main()
