"""Family accuracy: does a generated clip move like its family, whatever its exact path?

The judge is a small network that sees tracked centres and areas over time and nothing else: no pixels, and nothing of
the video encoder that makes the condition. It is a measuring instrument, so it learns from tracked true clips of all
families, held out or not. Some families cannot be told apart by tracks of things (a drift and a pan differ in the
backdrop alone); its accuracy on true clips it has not seen is therefore reported beside every figure, as the ceiling.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from motionrag.evaluation.tracks import Tracked
from motionrag.pocket.world import FAMILIES, SIZE

FAMILY_NAMES = tuple(FAMILIES)
_STEPS, _BATCH, _WIDTH = 1500, 256, 192


class FamilyClassifier(nn.Module):
    """Tracks → motion family.

    Args:
        num_inputs: Numbers in `track_features`.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_inputs))
        self.register_buffer("scale", torch.ones(num_inputs))
        self.layers = nn.Sequential(
            nn.Linear(num_inputs, _WIDTH),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(_WIDTH, _WIDTH),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(_WIDTH, len(FAMILY_NAMES)),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Score every family.

        Args:
            features: `(b f)`, from `track_features`.

        Returns:
            Logits `(b families)`, in the order of `FAMILY_NAMES`.
        """
        return self.layers((features - self.mean) / self.scale)


def track_features(tracked: Tracked) -> Tensor:
    """What the classifier sees: start, displacement, velocity and area of every thing.

    Args:
        tracked: The tracker's result.

    Returns:
        `(b f)`; things that are not there are zero.
    """
    exists = ~tracked.positions[:, :, 0, 0].isnan()
    positions = tracked.positions.nan_to_num(0) / SIZE
    displacement = positions - positions[:, :, :1]
    velocity = 4 * positions.diff(dim=2)
    growth = torch.log(tracked.areas.clamp(min=4) / tracked.areas[:, :, :1].clamp(min=4))
    each = torch.cat(
        [
            positions[:, :, 0],
            rearrange(displacement, "b n t c -> b n (t c)"),
            rearrange(velocity, "b n t c -> b n (t c)"),
            growth,
            exists[..., None].float(),
        ],
        dim=-1,
    )
    return rearrange(each * exists[..., None], "b n f -> b (n f)")


def train_classifier(features: Tensor, families: Tensor, *, seed: int) -> FamilyClassifier:
    """Train the instrument on true clips.

    Args:
        features: `(b f)`.
        families: Indices into `FAMILY_NAMES` `(b)`.
        seed: Of weights and order.

    Returns:
        The trained classifier.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = FamilyClassifier(features.shape[1])
        classifier.mean.copy_(features.mean(0))
        classifier.scale.copy_(features.std(0).clamp(min=1e-3))
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=_STEPS)
        for _ in range(_STEPS):
            chosen = torch.randint(len(features), (min(_BATCH, len(features)),))
            optimizer.zero_grad()
            F.cross_entropy(classifier(features[chosen]), families[chosen], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


@torch.no_grad()
def guess_families(classifier: FamilyClassifier, tracked: Tracked) -> list[str]:
    """The family that each clip moves like.

    Args:
        classifier: Trained.
        tracked: The tracker's result.

    Returns:
        A name for each clip.
    """
    return [FAMILY_NAMES[index] for index in classifier(track_features(tracked)).argmax(1).tolist()]
