"""The resampler: learned queries read a long sequence of features into a few tokens.

One class serves twice: motion features (1568×768 from the video encoder) become 25×1024 motion tokens, context
features (257×1024 from the image encoder) become 25×1024 context tokens. It does not know which of the two it does.

Shapes: b batch, l features, n queries, h heads, c channels of a head, d width.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F


class QueryAttention(nn.Module):
    """Queries attend to features and to themselves, both normalised first; no biases (MotionRAG, section 3.2)."""

    def __init__(self, *, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        inner_dim = num_heads * head_dim
        self.num_heads = num_heads
        self.norm_features = nn.LayerNorm(dim)
        self.norm_queries = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """Update queries `(b n d)` from features `(b l d)`, without the residual."""
        queries, features = self.norm_queries(queries), self.norm_features(features)
        query = rearrange(self.to_q(queries), "b n (h c) -> b h n c", h=self.num_heads)
        key, value = rearrange(
            self.to_kv(torch.cat([features, queries], dim=1)),
            "b l (kv h c) -> kv b h l c",
            kv=2,
            h=self.num_heads,
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(rearrange(attended, "b h n c -> b n (h c)"))


class FeedForward(nn.Module):
    """LayerNorm, widening by `mult`, exact GELU, back; no biases."""

    def __init__(self, *, dim: int, mult: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, dim * mult, bias=False)
        self.down = nn.Linear(dim * mult, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `(b n d)` position by position, without the residual."""
        return self.down(F.gelu(self.up(self.norm(x))))


class ResamplerLayer(nn.Module):
    """One attention and one feed-forward, each with a residual on the queries."""

    def __init__(self, *, dim: int, num_heads: int, head_dim: int, ff_mult: int) -> None:
        super().__init__()
        self.attention = QueryAttention(dim=dim, num_heads=num_heads, head_dim=head_dim)
        self.feed_forward = FeedForward(dim=dim, mult=ff_mult)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """Update queries `(b n d)` from features `(b l d)`."""
        queries = queries + self.attention(queries, features)
        return queries + self.feed_forward(queries)


class Resampler(nn.Module):
    """Perceiver resampler: a sequence of features of any length becomes `num_queries` tokens.

    Published sizes (MotionRAG configs): dim 1024, output_dim 1024, 25 queries, depth 4, 12 heads of 64; input_dim is
    768 for motion and 1024 for context. `num_heads * head_dim` need not equal `dim`.

    Args:
        input_dim: Channels of the features.
        dim: Width inside.
        output_dim: Channels of the tokens.
        num_queries: Number of tokens.
        depth: Number of layers.
        num_heads: Attention heads.
        head_dim: Channels of one head.
        ff_mult: Widening of the feed-forward.
    """

    def __init__(
        self,
        *,
        input_dim: int,
        dim: int,
        output_dim: int,
        num_queries: int,
        depth: int,
        num_heads: int,
        head_dim: int,
        ff_mult: int = 4,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, dim) / dim**0.5)
        self.proj_in = nn.Linear(input_dim, dim)
        self.layers = nn.ModuleList(
            ResamplerLayer(dim=dim, num_heads=num_heads, head_dim=head_dim, ff_mult=ff_mult) for _ in range(depth)
        )
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Read features into tokens.

        Args:
            features: `(b l input_dim)`, output of a frozen encoder.

        Returns:
            Tokens `(b num_queries output_dim)`.

        Raises:
            ValueError: If `features` has another rank or width.
        """
        if features.ndim != 3 or features.shape[-1] != self.proj_in.in_features:
            raise ValueError(
                f"The resampler expects features (b, l, {self.proj_in.in_features}), got {tuple(features.shape)}; "
                "check that the encoder is the one it was trained with."
            )
        features = self.proj_in(features)
        queries = repeat(self.queries, "n d -> b n d", b=features.shape[0])
        for layer in self.layers:
            queries = layer(queries, features)
        return self.norm_out(self.proj_out(queries))
