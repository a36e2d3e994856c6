"""Stage 2: CAMA and the context resampler, on tokens and features that were computed once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from motionrag.bundle import MotionBundle
from motionrag.database import MotionDatabase
from motionrag.database.schema import TOKEN_COLUMNS, to_numpy
from motionrag.database.table import ClipTable
from motionrag.encoder import MotionEncoder
from motionrag.models.cama import cama_loss
from motionrag.training.diffusion import save_parts
from motionrag.training.encoded import EncodedClips
from motionrag.training.optimisation import OptimisedModule


class CaptionNeighbours(Dataset):
    """What datasets share that give every clip with the references that its caption retrieves among the others.

    Args:
        clips: Of a dataset with `texts` and `sources`, encoded.
        bundle: Whose sentence encoder compares the captions.
        num_references: For each clip, k.
    """

    def __init__(self, clips: EncodedClips, bundle: str, *, num_references: int = 9) -> None:
        self.clips = clips
        samples: Any = clips.clips
        embeddings = MotionEncoder.from_pretrained(bundle).embed_texts(samples.texts).numpy()
        self.neighbours = nearest(embeddings, samples.sources, num_references)

    def __len__(self) -> int:
        return len(self.clips)

    def references(self, index: int) -> list[int]:
        """References of a clip.

        Args:
            index: Of the clip.

        Returns:
            Indices, the most similar last.
        """
        return self.neighbours[index][::-1].tolist()

    def stacked(self, name: str, rows: Sequence[int]) -> Tensor:
        """What the encoders gave of some clips.

        Args:
            name: Such as "motion_tokens".
            rows: Indices.

        Returns:
            `(k …)` float32.
        """
        return torch.from_numpy(np.stack([self.clips.arrays[name][row] for row in rows])).float()


class RetrievedReferences(CaptionNeighbours):
    """Every clip with its references, as the paper trains CAMA: with motion tokens and context features."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One clip and its references.

        Args:
            index: Of the clip.

        Returns:
            `motion_tokens` `(k+1 l d)` and `context_features` `(k+1 l c)`: references, the most similar last, then the
            clip itself.
        """
        rows = [*self.references(index), index]
        return {name: self.stacked(name, rows) for name in ("motion_tokens", "context_features")}


class DatabaseReferences(Dataset):
    """Every captioned clip of a database with the references that its caption retrieves, from the stored tokens.

    No video and no feature is read, but the context resampler cannot be trained: its tokens are stored.

    Args:
        database: Folder of the database.
        bundle: The one that made its tokens.
        num_references: For each clip, k.
        where: SQL condition on the columns, such as `split = 'train'`.
    """

    def __init__(self, database: str, *, bundle: str, num_references: int = 9, where: str | None = None) -> None:
        opened = MotionDatabase(database)
        opened.check_fingerprints(MotionEncoder.from_pretrained(bundle), TOKEN_COLUMNS)
        self.table = ClipTable.open(Path(database) / "clips.lance")
        self.num_tokens = opened.manifest.num_tokens
        captioned = "caption != ''" if where is None else f"caption != '' AND ({where})"
        rows = self.table.scan(["id", "content", "source", "text_embedding"], captioned)
        self.ids: list[str] = rows["id"].to_pylist()
        # Clips cut from one video share its source or, where none is stated, its file.
        pairs = zip(rows["source"].to_pylist(), rows["content"].to_pylist(), strict=True)
        sources = [source or content for source, content in pairs]
        self.neighbours = nearest(to_numpy(rows["text_embedding"]), sources, num_references)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One clip and its references.

        Args:
            index: Of the clip.

        Returns:
            `motion_tokens` and `context_tokens` `(k+1 l d)`: references, the most similar last, then the clip itself.
        """
        rows = self.table.take([self.ids[row] for row in (*self.neighbours[index][::-1], index)], list(TOKEN_COLUMNS))
        return {
            name: rearrange(torch.from_numpy(to_numpy(rows[name])).float(), "k (l d) -> k l d", l=self.num_tokens)
            for name in TOKEN_COLUMNS
        }


def nearest(embeddings: np.ndarray, sources: Sequence[str], count: int) -> np.ndarray:
    """For each clip, the most similar clips of other source videos.

    Args:
        embeddings: `(n e)` float32, L2-normalised.
        sources: The video that each clip was cut from.
        count: Neighbours for each clip.

    Returns:
        Indices `(n count)`, the most similar first.

    Raises:
        ValueError: If a clip has fewer than `count` clips of other sources beside it.
    """
    import faiss

    few = f"{len(sources)} clips are too few for {count} references of other source videos each."
    if not len(sources):
        raise ValueError(few)
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings)
    names = np.unique(np.asarray(sources), return_inverse=True)[1]
    longest = int(np.bincount(names).max())  # clips of one source that may have to be passed over
    _, found = index.search(embeddings, min(len(sources), count + longest))
    chosen = [row[names[row] != names[clip]][:count] for clip, row in enumerate(found)]
    if any(len(row) < count for row in chosen):
        raise ValueError(few)
    return np.stack(chosen)


class AdaptationTraining(OptimisedModule):
    """Stage 2: CAMA and the context resampler learn the motion tokens of each clip from its references.

    Paper, 3.5: AdamW 1e-4, gradient norm at most 0.25, mean squared error over all blocks.

    Args:
        bundle: Folder of the bundle; the trained parts are written back when training ends.
        learning_rate: The highest.
        weight_decay: Of matrices.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Step at which the learning rate reaches zero; None keeps it.
        train_context: Train the context resampler too; False where a database gives context tokens.
    """

    def __init__(
        self,
        bundle: str,
        *,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-2,
        warmup_steps: int = 100,
        decay_steps: int | None = None,
        train_context: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.bundle = MotionBundle.from_pretrained(bundle)
        self.cama = self.bundle.cama.requires_grad_(True)
        self.resampler = self.bundle.context_resampler.requires_grad_(train_context)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Predict the motion tokens of every clip from those before it.

        Args:
            batch: `motion_tokens` `(b k+1 l d)`, of which the last clip's are not looked at, with `context_features`
                `(b k+1 l c)` or `context_tokens` `(b k+1 l d)`.

        Returns:
            `(b k+1 l d)`.

        Raises:
            ValueError: If the context resampler is to be trained on its own stored tokens.
        """
        if "context_tokens" not in batch:
            features = batch["context_features"]
            context = self.resampler(rearrange(features, "b k l c -> (b k) l c"))
            context_tokens = rearrange(context, "(b k) l d -> b k l d", b=len(features))
        elif self.hparams["train_context"]:
            raise ValueError("On stored context tokens no context resampler learns; set train_context to false.")
        else:
            context_tokens = batch["context_tokens"]
        return self.cama(batch["motion_tokens"][:, :-1], context_tokens)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One batch.

        Args:
            batch: From `RetrievedReferences` or `DatabaseReferences`.
            batch_idx: Not used.

        Returns:
            The loss.
        """
        loss = cama_loss(self(batch), batch["motion_tokens"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the error of the last block, and that of the best reference's and of the mean tokens.

        Args:
            batch: From `RetrievedReferences` or `DatabaseReferences`.
            batch_idx: Not used.
        """
        tokens = batch["motion_tokens"]
        predicted = self(batch)
        references, own = tokens[:, :-1], tokens[:, -1]
        self.log_dict(
            {
                "validation/loss": cama_loss(predicted, tokens, query_only=True),
                "validation/top1": (references[:, -1] - own).square().mean(),
                "validation/mean": (references.mean(dim=1) - own).square().mean(),
            },
            prog_bar=True,
        )

    def on_train_end(self) -> None:
        """Write the bundle with the trained parts."""
        if self.trainer.is_global_zero:
            save_parts(self.bundle, self.hparams["bundle"], cama=self.cama, context_resampler=self.resampler)
