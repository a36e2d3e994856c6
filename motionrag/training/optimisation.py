"""The optimiser of every stage: AdamW, linear warm-up, then constant or down to zero along a cosine."""

import math
from collections.abc import Iterable
from typing import Any

import pytorch_lightning as lightning
import torch
from torch import nn


class OptimisedModule(lightning.LightningModule):
    """What every training is: a module whose hyperparameters say how what needs gradients is optimised.

    `learning_rate`, `warmup_steps` and `decay_steps` are hyperparameters of every one, `weight_decay` of some.
    """

    weight_decay = 1e-2

    def configure_optimizers(self) -> Any:
        """AdamW on everything that needs gradients.

        Returns:
            Optimiser and schedule.
        """
        settings = self.hparams
        return optimisation(
            self.parameters(),
            learning_rate=settings["learning_rate"],
            weight_decay=settings.get("weight_decay", self.weight_decay),
            warmup_steps=settings["warmup_steps"],
            decay_steps=settings["decay_steps"],
        )

    def on_fit_end(self) -> None:
        """Write what was trained by a run that was killed after its last checkpoint and before it wrote.

        Lightning leaves out a loop that has nothing left to do, `on_train_end` included.
        """
        if self.trainer.fit_loop.restarting:
            self.on_train_end()


def optimisation(
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    decay_steps: int | None,
) -> dict[str, Any]:
    """Build what `configure_optimizers` returns.

    Args:
        parameters: What is trained, and what is not.
        learning_rate: The highest.
        weight_decay: For matrices; vectors (biases, norms) are not decayed.
        warmup_steps: Steps up to the highest learning rate.
        decay_steps: Step at which a cosine reaches zero; None keeps it constant after warm-up.

    Returns:
        Optimiser and scheduler, as Lightning takes them.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if decay_steps is None:
            return 1.0
        share = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
        return 0.5 * (1 + math.cos(math.pi * share))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
