"""How the families that read text embed prompts, outside of a call of their pipeline."""

from collections.abc import Sequence
from typing import Any


def encode_prompts(pipeline: Any, prompts: Sequence[str], length: int) -> tuple[Any, ...]:
    """Call the pipeline's own encoder of prompts, without the half that guidance adds.

    Args:
        pipeline: With text encoder and tokenizer.
        prompts: Texts.
        length: Tokens of an embedding; what is longer is cut, what is shorter filled up.

    Returns:
        What the family's `encode_prompt` gives, the embeddings `(b n d)` first.
    """
    encoded: tuple[Any, ...] = pipeline.encode_prompt(
        list(prompts),
        do_classifier_free_guidance=False,
        max_sequence_length=length,
        device=pipeline.text_encoder.device,
    )
    return encoded
