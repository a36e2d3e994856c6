"""CAMA: what each block sees, the order of references, position codes and what is refused."""

import math

import pytest
import torch

from motionrag.models import CAMA, cama_loss
from motionrag.models.cama import block_causal_mask, sinusoid

TOKENS, DIM = 3, 16


@pytest.fixture(scope="module")
def cama():
    torch.manual_seed(0)
    return CAMA(dim=DIM, depth=2, num_heads=4, ff_dim=32, num_tokens=TOKENS).eval()


def inputs(references, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    motion = torch.randn(batch, references, TOKENS, DIM, generator=generator)
    context = torch.randn(batch, references + 1, TOKENS, DIM, generator=generator)
    return motion, context


def close(a, b):
    torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("k", range(10))
def test_one_prediction_for_every_clip(cama, k):
    motion, context = inputs(k)
    predicted = cama(motion, context)
    assert predicted.shape == (2, k + 1, TOKENS, DIM)
    assert predicted.isfinite().all()
    assert torch.equal(cama.predict(motion, context), predicted[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("k", range(1, 10))
def test_a_block_sees_nothing_that_comes_later(cama, k):
    """Clip i is predicted from the motion of clips before it and the looks of clips up to it, and from all of these."""
    motion, context = inputs(k)
    predicted = cama(motion, context)
    for changed in range(k + 1):
        other = context.clone()
        other[:, changed] += 1
        moved = (cama(motion, other) - predicted).abs().amax(dim=(0, 2, 3))
        assert moved[:changed].eq(0).all()
        assert moved[changed:].gt(1e-4).all()
    for changed in range(k):
        other = motion.clone()
        other[:, changed] += 1
        moved = (cama(other, context) - predicted).abs().amax(dim=(0, 2, 3))
        assert moved[: changed + 1].eq(0).all()
        assert moved[changed + 1 :].gt(1e-4).all()


@torch.no_grad()
@pytest.mark.parametrize("k", range(1, 10))
def test_fewer_references_are_a_prefix(cama, k):
    motion, context = inputs(k)
    all_blocks = cama(motion, context)
    for fewer in range(k):
        close(cama(motion[:, :fewer], context[:, : fewer + 1]), all_blocks[:, : fewer + 1])


@torch.no_grad()
def test_inside_a_block_every_token_sees_every_other(cama):
    motion, context = inputs(2)
    predicted = cama(motion, context)
    other = context.clone()
    other[:, 1, TOKENS - 1] += 1
    moved = (cama(motion, other) - predicted).abs().amax(dim=(0, 3))
    assert moved[1].gt(1e-4).all()


@torch.no_grad()
def test_the_order_of_references_matters(cama):
    motion, context = inputs(3)
    order = [1, 0, 2]
    swapped = cama.predict(motion[:, order], context[:, [*order, 3]])
    assert (swapped - cama.predict(motion, context)).abs().max() > 1e-3


@torch.no_grad()
def test_rows_do_not_mix(cama):
    motion, context = inputs(4, batch=3)
    singles = torch.cat([cama(motion[i : i + 1], context[i : i + 1]) for i in range(3)])
    close(cama(motion, context), singles)


@torch.no_grad()
def test_evaluation_and_training_mode_agree(cama):
    """There is no dropout, and torch's fused inference path computes the same."""
    motion, context = inputs(3)
    evaluated = cama(motion, context)
    try:
        trained = cama.train()(motion, context)
    finally:
        cama.eval()
    close(trained, evaluated)


@torch.no_grad()
def test_the_sequence_is_motion_shifted_by_one_plus_context_plus_two_position_codes(cama):
    motion, context = inputs(2, batch=1)
    table = [
        [(math.sin, math.cos)[j % 2](position / 10000 ** (2 * (j // 2) / DIM)) for j in range(DIM)]
        for position in range(3 * TOKENS)
    ]
    table = torch.tensor(table)
    rows = []
    for block in range(3):
        for token in range(TOKENS):
            shifted = cama.sos_token[token] if block == 0 else motion[0, block - 1, token]
            rows.append(shifted + table[block * TOKENS + token] + context[0, block, token] + table[token])
    torch.testing.assert_close(cama.embed(motion, context)[0], torch.stack(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("length", "dim"), [(1, 1), (7, 5), (250, 64)])
def test_position_codes(length, dim):
    table = sinusoid(length, dim)
    assert table.dtype == torch.float32
    for position in (0, length // 2, length - 1):
        for channel in (0, dim // 2, dim - 1):
            angle = position / 10000 ** (2 * (channel // 2) / dim)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert table[position, channel].item() == pytest.approx(expected, abs=1e-6)


def test_the_mask_is_causal_by_blocks():
    mask = block_causal_mask(3, 2)
    for row in range(6):
        for column in range(6):
            assert mask[row, column].item() == (column // 2 > row // 2)


def test_more_references_than_trained_with_are_refused(cama):
    with pytest.raises(ValueError, match=r"got 10 references.*at most 9; keep the most similar"):
        cama(*inputs(10))
    torch.manual_seed(0)
    wider = CAMA(dim=DIM, depth=1, num_heads=4, ff_dim=32, num_tokens=TOKENS, max_references=12)
    assert wider(*inputs(12)).shape[1] == 13


@pytest.mark.parametrize(
    ("motion", "context", "message"),
    [
        (
            (2, 3, TOKENS, DIM + 1),
            (2, 4, TOKENS, DIM),
            r"expects reference_tokens \(b, k, 3, 16\), got \(2, 3, 3, 17\)",
        ),
        ((2, 3, TOKENS + 1, DIM), (2, 4, TOKENS, DIM), r"expects reference_tokens \(b, k, 3, 16\)"),
        ((3, TOKENS, DIM), (4, TOKENS, DIM), r"expects reference_tokens"),
        ((2, 3, TOKENS, DIM), (2, 3, TOKENS, DIM), r"one context block per reference and one for the query image"),
        ((2, 3, TOKENS, DIM), (2, 5, TOKENS, DIM), r"\(2, 4, 3, 16\), got \(2, 5, 3, 16\)"),
        ((2, 3, TOKENS, DIM), (1, 4, TOKENS, DIM), r"\(2, 4, 3, 16\), got \(1, 4, 3, 16\)"),
        ((1, 3, TOKENS, DIM), (2, 4, TOKENS, DIM), r"\(1, 4, 3, 16\), got \(2, 4, 3, 16\)"),
        ((2, 3, TOKENS, DIM), (2, 4, TOKENS + 1, DIM), r"one context block"),
        ((2, 3, TOKENS, DIM), (2, 4 * TOKENS, DIM), r"one context block"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(cama, motion, context, message):
    with pytest.raises(ValueError, match=message):
        cama(torch.zeros(motion), torch.zeros(context))


def test_loss_over_all_blocks_and_over_the_query_alone():
    predicted, target = torch.randn(2, 4, TOKENS, DIM), torch.randn(2, 4, TOKENS, DIM)
    assert cama_loss(predicted, target).item() == pytest.approx(((predicted - target) ** 2).mean().item(), rel=1e-5)
    last = ((predicted[:, 3] - target[:, 3]) ** 2).mean().item()
    assert cama_loss(predicted, target, query_only=True).item() == pytest.approx(last, rel=1e-5)
    assert cama_loss(target, target).item() == 0


@pytest.mark.parametrize("k", [0, 4])
def test_gradients_reach_every_parameter(cama, k):
    motion, context = inputs(k)
    cama.zero_grad()
    cama_loss(cama(motion, context), torch.randn(2, k + 1, TOKENS, DIM)).backward()
    without = [name for name, value in cama.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []
    assert "sos_token" in dict(cama.named_parameters())


def test_the_query_loss_sends_gradients_to_every_reference(cama):
    motion, context = inputs(3)
    motion.requires_grad_(), context.requires_grad_()
    cama_loss(cama(motion, context), torch.randn(2, 4, TOKENS, DIM), query_only=True).backward()
    assert motion.grad.abs().amax(dim=(0, 2, 3)).gt(0).all()
    assert context.grad.abs().amax(dim=(0, 2, 3)).gt(0).all()


def test_position_codes_are_no_part_of_the_state(cama):
    assert all(key == "sos_token" or key.startswith("transformer.") for key in cama.state_dict())
