"""What the injection saves without gradients: the same numbers from fewer products; and guidance in two calls."""

import pytest
import torch
from torch import nn

from motionrag.adapters import AttentionInjection
from motionrag.adapters.attention import MotionAttention
from tests.adapters.denoisers import DENOISERS, TOKEN_DIM, cogvideox, svd, tokens, trained, wan

# The folded query


@torch.no_grad()
@pytest.mark.parametrize("family", DENOISERS)
@pytest.mark.parametrize("length", [1, 5, 40])
def test_the_shortcuts_give_what_is_written(family, length):
    denoiser = DENOISERS[family]()
    adapter = trained(denoiser.model, denoiser.sites)
    adapter.attach(denoiser.model)
    videos = []
    for adapter.takes_shortcuts in (True, False):
        with adapter.condition(tokens(length=length), scale=torch.tensor([0.5, 2.0])):
            videos.append(denoiser.run())
    torch.testing.assert_close(*videos, atol=1e-5, rtol=1e-5)


def real_width(dtype=torch.float32):
    """One site of 12 heads, tokens that have much in common as real ones do, and hidden states of 3 frames."""
    torch.manual_seed(0)
    attention = MotionAttention(hidden_dim=768, token_dim=1024, num_heads=12)
    nn.init.normal_(attention.to_v.weight, std=0.03)
    motion = torch.randn(2, 25, 1024) + 3 * torch.randn(1024)
    return attention.to(dtype), motion, torch.randn(6, 40, 768).to(dtype)


@torch.no_grad()
def test_folding_is_exact_in_float32():
    attention, motion, hidden = real_width()
    key, value = attention.keys_values(motion)
    assert attention.folds(25)
    assert not attention.folds(64)
    folded = attention.attend_folded(hidden, attention.folded_keys(key), value)
    torch.testing.assert_close(folded, attention(hidden, key, value), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_folding_is_as_exact_as_the_plain_form_in_bfloat16():
    attention, motion, hidden = real_width(torch.bfloat16)
    key, value = attention.keys_values(motion)
    rough = attention(hidden, key, value), attention.attend_folded(hidden, attention.folded_keys(key), value)
    attention.double()
    truth = attention(hidden.double(), *attention.keys_values(motion))
    plain, folded = ((each - truth).norm() / truth.norm() for each in rough)
    assert folded <= 1.02 * plain  # both 0.18 %


@torch.no_grad()
def test_the_query_is_not_projected_when_it_is_folded():
    denoiser = cogvideox()  # 2 heads of 16 channels: folding pays below 16 tokens
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    calls = []
    for attention in adapter.sites.values():
        attention.to_q.register_forward_hook(lambda *_: calls.append(1))
    for length, expected, path in ((5, 0, "folded"), (16, 2, "plain")):
        calls.clear()
        with adapter.condition(tokens(length=length)):
            denoiser.run()
        assert len(calls) == expected
        assert adapter.paths(length) == {path: 2}
    adapter.takes_shortcuts = False
    assert adapter.paths(5) == {"plain": 2}


def test_training_uses_the_plain_form():
    denoiser = cogvideox()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    with adapter.condition(tokens()) as condition:
        assert condition.prepared == {}
        denoiser.run().sum().backward()
    assert all(attention.to_q.weight.grad.any() for attention in adapter.sites.values())


@torch.no_grad()
def test_the_size_of_the_effect_is_measured_at_some_of_many_positions():
    adapter = AttentionInjection({"to_out.0": (32, 2)}, token_dim=TOKEN_DIM)
    nn.init.normal_(adapter.sites["to_out/0"].to_v.weight, std=0.5)
    model = nn.Module()
    model.to_out = nn.ModuleList([nn.Linear(32, 32)])
    adapter.attach(model)
    hidden, seen = torch.randn(2, 3000, 32), []
    model.to_out[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with adapter.condition(tokens()) as condition:
        model.to_out[0](hidden)
    exact = (seen[0] - hidden).norm() / hidden.norm()
    assert condition.effect().mean == pytest.approx(exact.item(), rel=0.02)


# One position for all


def positions_of_queries(model):
    """Collects how many positions the query projections of the cross-attentions see."""
    seen = []
    for name, layer in model.named_modules():
        if name.endswith("attn2.to_q") and "temporal" not in name:
            layer.register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))
    return seen


@torch.no_grad()
def test_a_cross_attention_with_one_context_token_runs_at_one_position():
    denoiser = svd()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    seen = positions_of_queries(denoiser.model)
    plain = denoiser.run()
    assert min(seen) > 1
    seen.clear()
    with adapter.condition(tokens()) as condition:
        moved = denoiser.run()
    assert set(seen) == {1}
    assert adapter.paths(5) == {"one position": len(seen)}
    assert moved.shape == plain.shape
    shortcut = condition.effect()
    adapter.takes_shortcuts = False
    with adapter.condition(tokens()) as condition:
        torch.testing.assert_close(denoiser.run(), moved, atol=1e-5, rtol=1e-5)
    assert shortcut.mean == pytest.approx(condition.effect().mean, rel=1e-4)


@torch.no_grad()
def test_in_one_generation_the_constant_term_is_computed_once(monkeypatch):
    denoiser = svd()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    steps = [denoiser.arguments["sample"], torch.randn_like(denoiser.arguments["sample"])]
    with adapter.condition(tokens()):
        expected = [denoiser.run(sample=sample) for sample in steps]
    calls = []
    for name in ("forward", "attend_folded"):
        original = getattr(MotionAttention, name)
        monkeypatch.setattr(MotionAttention, name, lambda *args, original=original: calls.append(1) or original(*args))
    with adapter.condition(tokens(), is_one_generation=True) as condition:
        for sample, video in zip(steps, expected, strict=True):
            torch.testing.assert_close(denoiser.run(sample=sample), video, atol=1e-5, rtol=1e-5)
    assert len(calls) == len(adapter.sites)
    assert condition.effect().mean > 0
    calls.clear()
    # Without that promise another image embedding in the same condition gives another video.
    other = {"encoder_hidden_states": torch.randn(2, 1, 16)}
    with adapter.condition(tokens()):
        denoiser.run()
        changed = denoiser.run(**other)
    assert len(calls) == 2 * len(adapter.sites)
    with adapter.condition(tokens()):
        assert torch.equal(denoiser.run(**other), changed)


@torch.no_grad()
def test_what_mixes_positions_is_never_taken_for_constant():
    """A self-attention that runs after a cross-attention of one position."""
    denoiser = svd()
    sites = [name for name, _ in denoiser.model.named_modules() if name.endswith(("attn1.to_out.0", "attn2.to_out.0"))]
    adapter = trained(denoiser.model, [site for site in sites if "temporal" not in site])
    adapter.attach(denoiser.model)
    steps = [denoiser.arguments["sample"], torch.randn_like(denoiser.arguments["sample"])]
    videos = []
    for promised in (False, True):
        with adapter.condition(tokens(), is_one_generation=promised):
            videos.append([denoiser.run(sample=sample) for sample in steps])
    for plain, kept in zip(*videos, strict=True):
        torch.testing.assert_close(kept, plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reason", ["two context tokens", "a row with scale 0", "no condition", "scale 0"])
def test_otherwise_it_runs_at_every_position(reason):
    denoiser = svd()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    seen = positions_of_queries(denoiser.model)
    changes = {}
    if reason == "two context tokens":
        changes["encoder_hidden_states"] = torch.randn(2, 2, 16)
    scale = {"a row with scale 0": torch.tensor([1.0, 0.0]), "scale 0": 0.0}.get(reason, 1.0)
    plain = denoiser.run(**changes)
    if reason != "no condition":
        adapter.set_condition(tokens(), scale)
    moved = denoiser.run(**changes)
    assert min(seen) > 1
    if reason == "a row with scale 0":
        assert torch.equal(moved[1], plain[1])
        assert not torch.equal(moved[0], plain[0])


@torch.no_grad()
def test_shortcut_and_training_in_one_condition():
    denoiser = svd()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    with adapter.condition(tokens()):
        moved = denoiser.run()
        with torch.enable_grad():
            torch.testing.assert_close(denoiser.run().detach(), moved, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(denoiser.run(), moved)


@torch.no_grad()
def test_compiled_with_one_position():
    torch._dynamo.reset()
    denoiser = svd()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    plain = denoiser.run()
    with adapter.condition(tokens()):
        expected = denoiser.run()
    compiled = torch.compile(denoiser.model, fullgraph=True, backend="eager")
    torch.testing.assert_close(denoiser.run(compiled), plain)
    with adapter.condition(tokens()):
        torch.testing.assert_close(denoiser.run(compiled), expected)
    torch.testing.assert_close(denoiser.run(compiled), plain)
    torch._dynamo.reset()


# Guidance in two calls, and two networks


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_each_pass_of_guidance_gets_its_half_of_the_tokens(compiled):
    torch._dynamo.reset()
    denoiser = wan()
    adapter = trained(denoiser.model, denoiser.sites)
    adapter.attach(denoiser.model)
    expected = {}
    for name, rows in (("uncond", tokens(seed=2)), ("cond", tokens(seed=3))):
        with adapter.condition(rows):
            expected[name] = denoiser.run()
    model = torch.compile(denoiser.model, fullgraph=True, backend="eager") if compiled else denoiser.model
    with adapter.condition(torch.cat([tokens(seed=2), tokens(seed=3)])):
        for name in ("cond", "uncond", "cond"):
            with model.cache_context(name):
                torch.testing.assert_close(denoiser.run(model), expected[name], atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match=r"batch of 2 .* tokens for 4 rows"):
            denoiser.run()
    # Without guidance there is one pass, which is called "cond" too.
    with adapter.condition(tokens(seed=3)), model.cache_context("cond"):
        torch.testing.assert_close(denoiser.run(model), expected["cond"], atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
def test_the_pass_is_forgotten_after_an_error_and_the_listener_goes_with_the_adapter():
    denoiser = wan()
    adapter = trained(denoiser.model, denoiser.sites)
    adapter.attach(denoiser.model)
    with pytest.raises(ZeroDivisionError), denoiser.model.cache_context("uncond"):
        raise ZeroDivisionError
    assert adapter._attachment.guidance_pass is None
    adapter.detach()
    assert "cache_context" not in vars(denoiser.model)
    with denoiser.model.cache_context("cond"):
        pass


@torch.no_grad()
def test_diffusers_own_caches_still_hear_the_name_of_the_pass():
    """FirstBlockCache keeps a state for each pass: it must not mix them, nor fail for want of a name."""
    from diffusers import FirstBlockCacheConfig

    denoiser = wan()
    adapter = trained(denoiser.model, denoiser.sites)
    adapter.attach(denoiser.model)
    denoiser.model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with adapter.condition(torch.cat([tokens(seed=2), tokens(seed=3)])):
        videos = {}
        for name in ("cond", "uncond"):
            with denoiser.model.cache_context(name):
                videos[name] = denoiser.run()
    assert (videos["cond"] - videos["uncond"]).abs().max() > 1e-2


@torch.no_grad()
def test_two_networks_share_one_adapter():
    first, second = wan(), wan()
    torch.manual_seed(5)
    for weight in second.model.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    plain = [first.run(), second.run()]
    adapter = trained(first.model, first.sites)
    adapter.attach(first.model, second.model)
    with adapter.condition(tokens()) as condition:
        moved = [first.run(), second.run()]
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(moved, plain, strict=True))
    assert len(condition.effect().per_site) == len(adapter.sites)
    adapter.detach()
    assert torch.equal(first.run(), plain[0])
    assert torch.equal(second.run(), plain[1])
