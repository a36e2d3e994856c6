"""Training clips of the pocket's world, rendered once into a folder of arrays and read from there."""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from motionrag.pocket.displacements import describe
from motionrag.pocket.world import (
    FAMILIES,
    NUM_FRAMES,
    SIZE,
    TRAINED_FAMILIES,
    Dynamics,
    WorldClip,
    drag_clip,
    training_clip,
    training_scene,
)
from motionrag.pocket.world.scene import COLOURS, SHAPES

MAX_THINGS = 3
MAX_PARAMETERS = max(len(family.parameters) for family in FAMILIES.values())
FLOW_GRID = 8
_CHUNK = 64


class PocketClips(Dataset):
    """Clips of the world with their ground truth; clip i is always the same for a seed.

    Args:
        count: How many.
        seed: Of the set.
        clips_per_domain: Clips that share verb, looks and dynamics; they follow one another.
        folder: Where rendered sets are kept; a set that is there is not rendered again.
        num_workers: Processes that render.
        drags: Clips in which every thing goes its own way (`drag_clip`), in place of domains.
        true_flow: Whether samples also bring the dense flow. It is not kept, but rendered again for every sample.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int = 0,
        clips_per_domain: int = 1,
        folder: str = "outputs/pocket/world",
        num_workers: int = 2,
        drags: bool = False,
        true_flow: bool = False,
    ) -> None:
        self.seed, self.clips_per_domain, self.drags, self.true_flow = seed, clips_per_domain, drags, true_flow
        # What is encoded of them changes with the kinds of captions that they bring, and not with the flow.
        self.identity = f"pocket {seed} {count} {'drags' if drags else clips_per_domain} described"
        kind = "drags" if drags else f"per-domain-{clips_per_domain}"
        self.folder = Path(folder) / f"seed-{seed}-clips-{count}-{kind}"
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.folder}.lock"):  # one of several training processes renders, the others wait
            if not (self.folder / "captions.json").exists():  # written last
                _render_all(self.folder, count, partial(_clip, seed, clips_per_domain, drags), num_workers)
        self.arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(self.folder.glob("*.npy"))}
        self.captions: list[list[str]] = json.loads((self.folder / "captions.json").read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def texts(self) -> list[str]:
        """The captions with made-up verbs."""
        return [caption for caption, _ in self.captions]

    @property
    def sources(self) -> list[str]:
        """Every clip is a video of its own."""
        return [str(index) for index in range(len(self))]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One clip.

        Args:
            index: Which.

        Returns:
            `video` `(t c h w)` in [-1, 1], `caption`, `plain_caption`, `described_caption` (which tells how the first
            thing moves), `index`, and the ground truth: `family`,
            `parameters` `(p)` as shares of their ranges and NaN where there is none, `tracks` `(n t 2)` in pixels and
            NaN where there is no thing, `masks` `(t h w)`, `flow` `(t 8 8 2)` in pixels from frame 0, `colours` and
            `shapes` `(n)` with -1 where there is no thing. If wanted, `true_flow` `(t h w 2)` float32, pixels from
            frame 0, x then y, and `true_visible` `(t h w)` bool, whether the content of frame 0 is still seen.
        """
        caption, plain_caption = self.captions[index]
        sample: dict[str, Any] = {
            name: torch.from_numpy(np.array(values[index])) for name, values in self.arrays.items() if name != "frames"
        }
        return {
            **sample,
            "video": self.video(index),
            "caption": caption,
            "plain_caption": plain_caption,
            "described_caption": f"{describe(sample['tracks'][0])} {caption}",
            "index": index,
            **(self._truth(index) if self.true_flow else {}),
        }

    def _truth(self, index: int) -> dict[str, Tensor]:
        clip = _clip(self.seed, self.clips_per_domain, self.drags, index)
        return {"true_flow": torch.from_numpy(clip.flow), "true_visible": torch.from_numpy(clip.flow_visible)}

    def video(self, index: int) -> Tensor:
        """Pixels of one clip.

        Args:
            index: Which.

        Returns:
            `(t c h w)` in [-1, 1].
        """
        frames = torch.from_numpy(np.array(self.arrays["frames"][index]))
        return rearrange(frames, "t h w c -> t c h w").float() / 127.5 - 1


class PocketFrames(Dataset):
    """Single frames of the world, for the autoencoder.

    Args:
        clips: Where they are taken from.
    """

    def __init__(self, clips: PocketClips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips) * NUM_FRAMES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One frame.

        Args:
            index: Of the frame.

        Returns:
            `video` `(1 c h w)` in [-1, 1] and `masks` `(1 h w)`.
        """
        clip, time = divmod(index, NUM_FRAMES)
        frame = torch.from_numpy(np.array(self.clips.arrays["frames"][clip, time]))
        masks = torch.from_numpy(np.array(self.clips.arrays["masks"][clip, time]))
        return {"video": rearrange(frame, "h w c -> 1 c h w").float() / 127.5 - 1, "masks": masks[None]}


class PocketScenes(Dataset):
    """First frames and what they show, for the encoders of images.

    Args:
        clips: Where they are taken from.
    """

    def __init__(self, clips: PocketClips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One scene.

        Args:
            index: Of the clip.

        Returns:
            `image` `(c h w)` in [-1, 1], `description`, `masks` `(h w)`, `colours` and `shapes` `(n)` of the things.
        """
        arrays = self.clips.arrays
        frame = torch.from_numpy(np.array(arrays["frames"][index, 0]))
        return {
            "image": rearrange(frame, "h w c -> c h w").float() / 127.5 - 1,
            "description": training_scene(self.clips.seed, *divmod(index, self.clips.clips_per_domain)).description,
            "masks": torch.from_numpy(np.array(arrays["masks"][index, 0])),
            "colours": torch.from_numpy(np.array(arrays["colours"][index])),
            "shapes": torch.from_numpy(np.array(arrays["shapes"][index])),
        }


def arrays_of(clip: WorldClip) -> dict[str, np.ndarray]:
    """What is stored of a clip: fixed shapes, whatever the number of things and parameters.

    Args:
        clip: With flow.

    Returns:
        Name → array.
    """
    things = len(clip.things)
    tracks = np.full((MAX_THINGS, NUM_FRAMES, 2), np.nan, np.float32)
    tracks[:things] = clip.tracks
    colours, shapes = np.full((2, MAX_THINGS), -1, np.int64)
    colours[:things] = [list(COLOURS).index(each.colour) for each in clip.things]
    shapes[:things] = [SHAPES.index(each.shape) for each in clip.things]
    parameters = np.full(MAX_PARAMETERS, np.nan, np.float32)
    shares = Dynamics(clip.family, clip.parameters).normalised if clip.family else {}
    parameters[: len(shares)] = list(shares.values())
    middle = SIZE // FLOW_GRID // 2
    step = SIZE // FLOW_GRID
    family = TRAINED_FAMILIES.index(clip.family) if clip.family in TRAINED_FAMILIES else -1
    return {
        "frames": clip.frames,
        "tracks": tracks,
        "masks": clip.masks,
        "flow": clip.flow[:, middle::step, middle::step].astype(np.float16),
        "family": np.array(family),
        "parameters": parameters,
        "colours": colours,
        "shapes": shapes,
    }


def _clip(seed: int, clips_per_domain: int, drags: bool, index: int) -> WorldClip:
    return drag_clip(seed, index) if drags else training_clip(seed, *divmod(index, clips_per_domain))


def _render_chunk(
    clip: Callable[[int], WorldClip], start: int, stop: int
) -> tuple[dict[str, np.ndarray], list[list[str]]]:
    clips = [clip(index) for index in range(start, stop)]
    rows = [arrays_of(clip) for clip in clips]
    captions = [[clip.caption, clip.plain_caption] for clip in clips]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}, captions


def _render_all(folder: Path, count: int, clip: Callable[[int], WorldClip], num_workers: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    starts = range(0, count, _CHUNK)
    arrays: dict[str, np.ndarray] = {}
    captions: list[list[str]] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        stops = [min(count, start + _CHUNK) for start in starts]
        chunks = pool.map(partial(_render_chunk, clip), starts, stops)
        for start, stop, (rows, texts) in zip(starts, stops, tqdm(chunks, "render", len(starts)), strict=True):
            for name, values in rows.items():
                if name not in arrays:
                    arrays[name] = np.lib.format.open_memmap(
                        folder / f"{name}.npy", "w+", values.dtype, (count, *values.shape[1:])
                    )
                arrays[name][start:stop] = values
            captions += texts
    for values in arrays.values():
        values.flush()  # type: ignore[attr-defined] # open_memmap gives a memmap
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
