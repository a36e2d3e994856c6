"""True clips for the tests of metrics."""

from motionrag.evaluation.material import TrueClips
from motionrag.pocket.world import domain, sample_clip


def true_clips(*families, count=2):
    return TrueClips.of(
        [
            sample_clip(domain((5, index), family=family), (6, index), truth=False)
            for family in families
            for index in range(count)
        ]
    )
