"""The resampler: any number of features, no positions, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motionrag.models import Resampler

SIZES = {"input_dim": 12, "dim": 16, "output_dim": 20, "num_queries": 5, "depth": 2, "num_heads": 3, "head_dim": 8}


def make(**changes):
    torch.manual_seed(0)
    return Resampler(**{**SIZES, **changes}).eval()


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 7, 300])
def test_takes_any_number_of_features(length):
    tokens = make()(torch.randn(2, length, 12))
    assert tokens.shape == (2, 5, 20)
    assert tokens.isfinite().all()


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(9)))
def test_features_are_a_set(order):
    """There are no positions: permuted features give the same tokens."""
    resampler, features = make(), torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(resampler(features[:, list(order)]), resampler(features), atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_every_feature_counts():
    resampler, features = make(), torch.randn(1, 9, 12)
    tokens = resampler(features)
    for index in range(9):
        changed = features.clone()
        changed[:, index] += 1
        assert (resampler(changed) - tokens).abs().max() > 1e-4


@torch.no_grad()
def test_rows_do_not_mix():
    resampler, features = make(), torch.randn(3, 9, 12)
    singles = torch.cat([resampler(row[None]) for row in features])
    torch.testing.assert_close(resampler(features), singles, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_queries_differ():
    """Queries that all gave one token would carry a fifth of what they could."""
    tokens = make()(torch.randn(1, 9, 12))[0]
    distances = torch.cdist(tokens, tokens) + torch.eye(5) * 10
    assert distances.min() > 1e-2


def test_tokens_are_normalised_at_the_end():
    tokens = make()(100 * torch.randn(2, 9, 12))
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(-1, unbiased=False), torch.ones(2, 5), atol=1e-3, rtol=0)


def test_gradients_reach_every_parameter():
    resampler = make()
    # A plain sum of normalised tokens is constant.
    (resampler(torch.randn(2, 9, 12)) * torch.randn(2, 5, 20)).sum().backward()
    without = [name for name, value in resampler.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_depth_is_the_number_of_layers(depth):
    assert len(make(depth=depth).layers) == depth


@pytest.mark.parametrize("shape", [(2, 9, 13), (9, 12), (2, 1, 9, 12), (2, 12, 9)])
def test_another_width_or_rank_is_refused(shape):
    with pytest.raises(ValueError, match=r"expects features \(b, l, 12\), got .*check that the encoder"):
        make()(torch.randn(shape))


def test_sizes_are_named_never_positional():
    with pytest.raises(TypeError):
        Resampler(12, 16, 20, 5, 2, 3, 8)
