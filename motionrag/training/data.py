"""The data module of every stage: batches in a seeded order that an interrupted run continues exactly."""

from collections.abc import Iterator, Sized
from typing import Any

import pytorch_lightning as lightning
import torch
from torch.utils.data import DataLoader, Dataset

Sample = dict[str, Any]


class ShuffledBatches:
    """Endless batches of indices: a new permutation in every epoch, the same for the same seed.

    Args:
        length: Number of samples.
        batch_size: Samples in a batch on one device.
        seed: Of the order.
        skip: Batches that a run before this one has used.
        rank: Of this process.
        world_size: Number of processes; each takes its share of every permutation.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, skip: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.length, self.batch_size, self.seed, self.skip = length, batch_size, seed, skip
        self.rank, self.world_size = rank, world_size
        self._per_epoch = length // (batch_size * world_size)
        if not self._per_epoch:
            raise ValueError(
                f"There are {length} samples, fewer than one batch of {batch_size} on each of {world_size} devices; "
                "lower batch_size."
            )

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.skip, self._per_epoch)
        while True:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.length, generator=generator)[self.rank :: self.world_size].tolist()
            for batch in range(position, self._per_epoch):
                yield order[batch * self.batch_size : (batch + 1) * self.batch_size]
            epoch, position = epoch + 1, 0


class ClipDataModule(lightning.LightningDataModule):
    """Feeds any stage from map-style datasets of dictionaries.

    Args:
        train: Samples to learn from.
        validation: Samples to validate on, in order; None: no validation.
        batch_size: Samples in a batch on one device.
        validation_batch_size: Likewise, in validation.
        num_workers: Processes that load samples.
        seed: Of the order.
    """

    def __init__(
        self,
        train: Dataset,
        *,
        validation: Dataset | None = None,
        batch_size: int = 1,
        validation_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.validation = train, validation
        self.batch_size, self.validation_batch_size = batch_size, validation_batch_size or batch_size
        self.num_workers, self.seed = num_workers, seed
        self._used_batches = 0

    def train_dataloader(self) -> DataLoader:
        """Endless batches, continuing where a restored checkpoint stopped.

        Returns:
            The loader.
        """
        assert isinstance(self.train, Sized)  # noqa: S101
        trainer = self.trainer
        batches = ShuffledBatches(
            len(self.train),
            self.batch_size,
            seed=self.seed,
            skip=self._used_batches,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        return DataLoader(
            self.train,
            batch_sampler=batches,  # type: ignore[arg-type] # endless, so it has no length
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            multiprocessing_context="spawn" if self.num_workers else None,
        )

    def val_dataloader(self) -> DataLoader | list[Any]:
        """Validation samples in their order.

        Returns:
            The loader; an empty list without validation.
        """
        if self.validation is None:
            return []
        return DataLoader(self.validation, batch_size=self.validation_batch_size)

    def state_dict(self) -> dict[str, int]:
        """How far the order was used.

        Returns:
            What `load_state_dict` takes.
        """
        return {"used_batches": self.trainer.fit_loop.total_batch_idx + 1 if self.trainer else self._used_batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue the order of an earlier run.

        Args:
            state_dict: From `state_dict`.
        """
        self._used_batches = state_dict["used_batches"]
