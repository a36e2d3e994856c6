"""What a search returns."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from motionrag.video import Clip


@dataclass(frozen=True)
class Reference:
    """A retrieved clip.

    Attributes:
        clip: Where it is and what is known of it.
        id: Its identity in the database.
        rank: 1 for the best.
        score: Similarity to the query, -1 to 1: the weighted mean of `scores`.
        scores: Similarity by each retrieval key of the query.
        weight: Share of this reference in the sum of all (non-negative) scores of the search.
        motion_tokens: `(l d)` float32.
        context_tokens: `(l d)` float32.
    """

    clip: Clip
    id: str
    rank: int
    score: float
    scores: dict[str, float]
    weight: float
    motion_tokens: Tensor = field(repr=False)
    context_tokens: Tensor = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The reference as JSON values, without its tokens."""
        clip = self.clip
        return {
            "rank": self.rank,
            "id": self.id,
            "score": self.score,
            "scores": self.scores,
            "weight": self.weight,
            "uri": clip.uri,
            "start_s": clip.start_s,
            "end_s": clip.end_s,
            "caption": clip.caption,
            "licence": clip.licence,
            "source": clip.source,
            "metadata": dict(clip.metadata),
        }
