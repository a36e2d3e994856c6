"""CAMA, context-aware motion adaptation: a causal transformer over retrieved motion (MotionRAG, section 3.3).

References r1 … rk, the least similar first, and the query q form one sequence of k+1 blocks of `l` tokens. Block i
holds the motion of the clip *before* it plus the look of clip i, and predicts the motion of clip i:

    block    1            2              …   k+1
    motion   sos          motion(r1)     …   motion(rk)      + one sinusoid over the whole sequence
    context  look(r1)     look(r2)       …   look(q)         each + its own sinusoid, positions 0 … l-1
    output   motion(r1)   motion(r2)     …   motion(q)

A block sees itself and the blocks before it. Only the last block depends on the query image.

Shapes: b batch, k references, l tokens of a clip, d width.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoid(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Position codes: sine at even and cosine at odd channels, wavelength 10000^(2⌊j/2⌋/dim).

    Args:
        length: Number of positions.
        dim: Number of channels.
        device: Where to put the table.

    Returns:
        `(length dim)`, float32.
    """
    position = torch.arange(length, device=device, dtype=torch.float64)
    channel = torch.arange(dim, device=device)
    angle = position[:, None] / 10000 ** (2 * (channel // 2) / dim).double()
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def block_causal_mask(num_blocks: int, num_tokens: int, device: torch.device | None = None) -> Tensor:
    """Attention mask of `num_blocks` blocks: True where a position may *not* look, i.e. into later blocks.

    Args:
        num_blocks: Number of clips, the query included.
        num_tokens: Tokens of one clip.
        device: Where to put the mask.

    Returns:
        `(num_blocks·num_tokens, num_blocks·num_tokens)`, bool.
    """
    block = torch.arange(num_blocks, device=device).repeat_interleave(num_tokens)
    return block[None, :] > block[:, None]


def cama_loss(predicted: Tensor, motion_tokens: Tensor, *, query_only: bool = False) -> Tensor:
    """Mean squared error over all blocks (training) or over the query's block alone (validation).

    Args:
        predicted: `(b k+1 l d)`, output of `CAMA`.
        motion_tokens: `(b k+1 l d)`, the true tokens of the references and of the query's clip, in the same order.
        query_only: Look at the last block only.

    Returns:
        Scalar.
    """
    if query_only:
        predicted, motion_tokens = predicted[:, -1], motion_tokens[:, -1]
    return F.mse_loss(predicted, motion_tokens)


class CAMA(nn.Module):
    """Predicts the motion tokens of a query image from the motion and the looks of retrieved clips.

    Published size: dim 1024, depth 4, 16 heads, ff_dim 4096, 25 tokens, at most 9 references.

    Args:
        dim: Width of the tokens.
        depth: Number of transformer layers (post-norm, GELU, no dropout).
        num_heads: Attention heads.
        ff_dim: Width of the feed-forward.
        num_tokens: Motion tokens of one clip; context tokens come in the same number, since the two are added.
        max_references: Most references in one call. More have never been seen in training.
    """

    def __init__(
        self, *, dim: int, depth: int, num_heads: int, ff_dim: int, num_tokens: int, max_references: int = 9
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.dim = dim
        self.max_references = max_references
        self.sos_token = nn.Parameter(torch.randn(num_tokens, dim) / dim**0.5)
        layer = nn.TransformerEncoderLayer(
            dim, num_heads, dim_feedforward=ff_dim, dropout=0.0, activation="gelu", batch_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, reference_tokens: Tensor, context_tokens: Tensor) -> Tensor:
        """Predict the motion of every clip of the sequence from the clips before it.

        Args:
            reference_tokens: `(b k l d)`, motion tokens of the references, the most similar last; k may be 0.
            context_tokens: `(b k+1 l d)`, context tokens of the references and, last, of the query image, as the
                context resampler gives them: both position codes are added here.

        Returns:
            `(b k+1 l d)`: one prediction per clip; the last is the query's.

        Raises:
            ValueError: If shapes disagree or there are more than `max_references` references.
        """
        sequence = self.embed(reference_tokens, context_tokens)
        mask = block_causal_mask(context_tokens.shape[1], self.num_tokens, sequence.device)
        return rearrange(self.transformer(sequence, mask=mask), "b (k l) d -> b k l d", l=self.num_tokens)

    def embed(self, reference_tokens: Tensor, context_tokens: Tensor) -> Tensor:
        """Build the sequence that the transformer sees: shifted motion, context and both position codes, added.

        Args:
            reference_tokens: As in `forward`.
            context_tokens: As in `forward`.

        Returns:
            `(b (k+1)·l d)`.
        """
        self._check(reference_tokens, context_tokens)
        sos = repeat(self.sos_token, "l d -> b 1 l d", b=context_tokens.shape[0])
        motion = rearrange(torch.cat([sos, reference_tokens], dim=1), "b k l d -> b (k l) d")
        positions = sinusoid(motion.shape[1], self.dim, motion.device).to(motion.dtype)
        context = context_tokens + positions[: self.num_tokens]
        return motion + positions + rearrange(context, "b k l d -> b (k l) d")

    def predict(self, reference_tokens: Tensor, context_tokens: Tensor) -> Tensor:
        """Predict the motion tokens of the query image alone.

        Args:
            reference_tokens: As in `forward`.
            context_tokens: As in `forward`.

        Returns:
            `(b l d)`.
        """
        return self(reference_tokens, context_tokens)[:, -1]

    def _check(self, reference_tokens: Tensor, context_tokens: Tensor) -> None:
        token_shape = (self.num_tokens, self.dim)
        if reference_tokens.ndim != 4 or reference_tokens.shape[2:] != token_shape:
            raise ValueError(
                f"CAMA expects reference_tokens (b, k, {self.num_tokens}, {self.dim}), "
                f"got {tuple(reference_tokens.shape)}."
            )
        batch, num_references = reference_tokens.shape[:2]
        if context_tokens.shape != (batch, num_references + 1, *token_shape):
            raise ValueError(
                f"CAMA expects one context block per reference and one for the query image, "
                f"({batch}, {num_references + 1}, {self.num_tokens}, {self.dim}), got {tuple(context_tokens.shape)}."
            )
        if num_references > self.max_references:
            raise ValueError(
                f"CAMA got {num_references} references, but was built for at most {self.max_references}; "
                "keep the most similar ones."
            )
