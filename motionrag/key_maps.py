"""What all conversions of published weights share: keys of other parts are reported, keys that do not fit refused."""

import logging
from collections.abc import Iterable

from torch import Tensor

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]


def report_left_out(what: str, keys: Iterable[str]) -> None:
    """Write to the log which keys of a file belong to other parts.

    Args:
        what: What is converted.
        keys: What is not.
    """
    keys = list(keys)
    if keys:
        logger.info("Converting the %s: left out %d keys of other parts, such as %s", what, len(keys), keys[0])


def refuse(what: str, *, unknown: Iterable[str] = (), missing: Iterable[str] = ()) -> None:
    """Stop at keys that should not be there, and at those that should.

    Args:
        what: What the file was taken for.
        unknown: Keys of the file that belong to nothing.
        missing: Keys that the file lacks.

    Raises:
        ValueError: If there is any; all are named.
    """
    unknown, missing = sorted(unknown), sorted(missing)
    if unknown or missing:
        raise ValueError(
            f"This is not a published {what}: missing keys: {', '.join(missing) or 'none'}; "
            f"unknown keys: {', '.join(unknown) or 'none'}."
        )
