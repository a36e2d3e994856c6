"""Stage 2: CAMA and the context resampler, on tokens and features that were computed once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as lightning
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
from motionrag.training.optimisation import optimisation


class RetrievedReferences(Dataset):
    """Every clip with the references that its caption retrieves among the others, as the paper trains CAMA.

    Args:
        clips: With motion tokens and context features.
        bundle: Whose sentence encoder compares the captions.
        num_references: For each clip, k.
    """

    def __init__(self, clips: EncodedClips, bundle: str, *, num_references: int = 9) -> None:
        self.clips = clips
        self.neighbours = retrieve(clips, bundle, num_references)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One clip and its references.

        Args:
            index: Of the clip.

        Returns:
            `motion_tokens` `(k+1 l d)` and `context_features` `(k+1 l c)`: references, the most similar last, then the
            clip itself.
        """
        rows = [*self.neighbours[index][::-1], index]
        return {
            name: torch.from_numpy(np.stack([self.clips.arrays[name][row] for row in rows])).float()
            for name in ("motion_tokens", "context_features")
        }


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


def retrieve(clips: EncodedClips, bundle: str, count: int) -> np.ndarray:
    """For each clip, the others with the most similar captions.

    Args:
        clips: Of a dataset with `texts` and `sources`.
        bundle: Whose sentence encoder compares the captions.
        count: References for each clip.

    Returns:
        Indices `(n count)`, the most similar first.
    """
    samples: Any = clips.clips
    return nearest_captions(MotionEncoder.from_pretrained(bundle), samples.texts, samples.sources, count)


def nearest_captions(encoder: MotionEncoder, captions: Sequence[str], sources: Sequence[str], count: int) -> np.ndarray:
    """For each clip, the clips of other source videos with the most similar captions.

    Args:
        encoder: Embeds the captions.
        captions: One for each clip.
        sources: The video that each clip was cut from.
        count: Neighbours for each clip.

    Returns:
        Indices `(n count)`, the most similar first.
    """
    return nearest(encoder.embed_texts(captions).numpy(), sources, count)


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


class AdaptationTraining(lightning.LightningModule):
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

    def configure_optimizers(self) -> Any:
        """AdamW on CAMA and the context resampler.

        Returns:
            Optimiser and schedule.
        """
        settings = self.hparams
        return optimisation(
            self.parameters(),
            learning_rate=settings["learning_rate"],
            weight_decay=settings["weight_decay"],
            warmup_steps=settings["warmup_steps"],
            decay_steps=settings["decay_steps"],
        )

    def on_train_end(self) -> None:
        """Write the bundle with the trained parts."""
        if self.trainer.is_global_zero:
            save_parts(self.bundle, self.hparams["bundle"], cama=self.cama, context_resampler=self.resampler)
