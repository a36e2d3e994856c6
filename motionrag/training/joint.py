"""Stage 3: everything that is trained together, from retrieved references to the diffusion loss."""

from typing import Any

from einops import rearrange
from torch import Tensor

from motionrag.training.adaptation import CaptionNeighbours
from motionrag.training.diffusion import InjectionTraining, replace_clips


class ReferencedClips(CaptionNeighbours):
    """Every clip as the backbone sees it, with the motion and context features of its references."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One clip and its references.

        Args:
            index: Of the clip.

        Returns:
            What `EncodedClips` gives of the clip; in place of its own features `motion_features` `(k l c)` of the
            references, the most similar last, and `context_features` `(k+1 l c)` of these and, last, the clip.
        """
        references = self.references(index)
        return {
            **self.clips[index],
            "motion_features": self.stacked("motion_features", references),
            "context_features": self.stacked("context_features", [*references, index]),
        }


class JointTraining(InjectionTraining):
    """Stage 3: both resamplers, CAMA and motion injection learn from the diffusion loss. The backbone is frozen.

    Paper, 3.5: AdamW 5e-5. The motion that is injected is what CAMA makes of the references.

    Args:
        bundle: Folder of the bundle after stages 1 and 2; the trained parts are written back when training ends.
        **options: As for `InjectionTraining`.
    """

    def __init__(self, bundle: str, **options: Any) -> None:
        super().__init__(bundle, **options)
        self.cama = self.bundle.cama.requires_grad_(True)
        self.context_resampler = self.bundle.context_resampler.requires_grad_(True)

    def motion_tokens(self, batch: dict[str, Tensor], drop: Tensor | None = None) -> Tensor:
        """Motion tokens that CAMA predicts for the clips.

        Args:
            batch: From `ReferencedClips`.
            drop: Clips whose tokens are replaced by a grey clip's `(b)`, bool; None: none.

        Returns:
            `(b l d)`.
        """
        motion, context = batch["motion_features"], batch["context_features"]
        references = self.resampler(rearrange(motion, "b k l c -> (b k) l c"))
        context_tokens = self.context_resampler(rearrange(context, "b k l c -> (b k) l c"))
        predicted = self.cama.predict(
            rearrange(references, "(b k) l d -> b k l d", b=len(motion)),
            rearrange(context_tokens, "(b k) l d -> b k l d", b=len(context)),
        )
        if drop is None:
            return predicted
        grey = self.resampler(batch["grey_features"][:1]).to(predicted)
        return replace_clips(drop, grey, predicted)

    def trained_parts(self) -> dict[str, Any]:
        """What this stage trains.

        Returns:
            Part of the bundle → module.
        """
        return {**super().trained_parts(), "cama": self.cama, "context_resampler": self.context_resampler}
