"""The arithmetic of size rules, and the sentences that name the nearest valid size."""


def valid_size(model: str, height: int, width: int, step: int) -> tuple[int, int]:
    """Check that both sides are multiples of a step.

    Args:
        model: Named in the error.
        height: Pixels.
        width: Pixels.
        step: Pixels.

    Returns:
        Height and width.

    Raises:
        ValueError: If they are not; the nearest multiples are named.
    """
    nearest = (max(step, round(height / step) * step), max(step, round(width / step) * step))
    if (height, width) != nearest:
        raise wrong_size(model, height, width, nearest)
    return nearest


def wrong_size(model: str, height: int, width: int, nearest: tuple[int, int]) -> ValueError:
    """The error for a picture size that a model cannot make.

    Args:
        model: Its name.
        height: Asked for, pixels.
        width: Asked for, pixels.
        nearest: Height and width that it can make.

    Returns:
        To be raised.
    """
    return ValueError(
        f"This {model} model cannot make {height}×{width} (height×width); the nearest valid size is "
        f"{nearest[0]}×{nearest[1]}."
    )


def valid_frames(model: str, num_frames: int, step: int, longest: int, *, shortest: int = 1) -> int:
    """Check that a number of frames is 1 more than a multiple of a step, and no more than the model was trained on.

    Args:
        model: Named in the error.
        num_frames: Asked for.
        step: Frames that a latent frame stands for.
        longest: Number of frames of the training clips.
        shortest: Fewest frames that the pipeline can make.

    Returns:
        The number of frames.

    Raises:
        ValueError: If it is another; the nearest valid number is named.
    """
    steps = min(max((shortest - 1) // step, round((num_frames - 1) / step)), (longest - 1) // step)
    if num_frames != steps * step + 1:
        beyond = f", and was trained on {longest} at most" if num_frames > longest else ""
        raise ValueError(
            f"This {model} model cannot make {num_frames} frames{beyond}; the nearest valid number is "
            f"{steps * step + 1}."
        )
    return num_frames
