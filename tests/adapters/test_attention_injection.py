"""Motion injection on real diffusers models: it leaves no trace, lands where it should, and refuses what cannot fit."""

from functools import partial

import pytest
import torch
from torch import nn

from motionrag.adapters import AttentionInjection
from tests.adapters.denoisers import DENOISERS, TOKEN_DIM, cogvideox, svd, tokens, trained

LAST_SITE = {
    "cogvideox": "transformer_blocks.1.attn1.to_out.0",
    "svd": "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0",
    "wan": "blocks.1.attn2.to_out.0",
    "ltx": "transformer_blocks.1.attn1.to_out.0",
}


@pytest.fixture(params=DENOISERS)
def family(request):
    return request.param


@pytest.fixture
def denoiser(family):
    return DENOISERS[family]()


def hooks_on(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


# No trace


@torch.no_grad()
def test_attach_and_detach_leave_no_trace(denoiser):
    model = denoiser.model
    plain, keys, hooks = denoiser.run(), list(model.state_dict()), hooks_on(model)
    adapter = trained(model, denoiser.sites)
    assert hooks_on(model) == hooks
    adapter.attach(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(denoiser.run(), plain)
    with adapter.condition(tokens()):
        moved = denoiser.run()
    assert (moved - plain).abs().max() > 1e-2
    assert torch.equal(denoiser.run(), plain)
    adapter.detach()
    assert hooks_on(model) == hooks
    assert torch.equal(denoiser.run(), plain)


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(denoiser):
    plain = denoiser.run()
    adapter = AttentionInjection.for_model(denoiser.model, token_dim=TOKEN_DIM, sites=denoiser.sites)
    adapter.attach(denoiser.model)
    with adapter.condition(tokens()) as condition:
        assert torch.equal(denoiser.run(), plain)
    assert condition.effect().mean == 0
    assert len(condition.effect().per_site) == len(adapter.sites)


def test_the_backbone_is_no_child_of_the_adapter(denoiser):
    adapter = trained(denoiser.model, denoiser.sites)
    before = list(adapter.state_dict())
    adapter.attach(denoiser.model)
    assert list(adapter.state_dict()) == before
    assert adapter.is_attached
    adapter.detach()
    adapter.detach()
    assert not adapter.is_attached


@torch.no_grad()
def test_an_error_inside_leaves_nothing_behind(family, denoiser):
    plain = denoiser.run()
    adapter = trained(denoiser.model, denoiser.sites)
    adapter.attach(denoiser.model)
    with pytest.raises(ZeroDivisionError), adapter.condition(tokens()):
        raise ZeroDivisionError
    assert torch.equal(denoiser.run(), plain)
    # Also one raised inside the model, half way through its sites.
    last = denoiser.model.get_submodule(LAST_SITE[family])
    handle = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), adapter.condition(tokens()):
        denoiser.run()
    handle.remove()
    assert torch.equal(denoiser.run(), plain)


def test_default_sites_of_the_families():
    assert trained(cogvideox().model).site_names == [f"transformer_blocks.{i}.attn1.to_out.0" for i in range(2)]
    names = trained(svd().model).site_names
    # Spatial attn2 only: 1 down, 1 middle, 2 up; none of the temporal blocks and no attn1.
    assert len(names) == 4
    assert all(".transformer_blocks." in name and name.endswith("attn2.to_out.0") for name in names)
    assert not any("temporal" in name for name in names)


# Scale


@torch.no_grad()
def test_scale_zero_is_the_plain_model_bit_for_bit(denoiser):
    plain = denoiser.run()
    adapter = trained(denoiser.model, denoiser.sites)
    adapter.attach(denoiser.model)
    for scale in (0, 0.0, torch.zeros(2)):
        with adapter.condition(tokens(), scale=scale) as condition:
            assert torch.equal(denoiser.run(), plain)
        assert condition.effect().mean == 0


@torch.no_grad()
def test_a_scale_for_every_row(denoiser):
    adapter = trained(denoiser.model, denoiser.sites)
    plain = denoiser.run()
    adapter.attach(denoiser.model)
    with adapter.condition(tokens(), scale=torch.tensor([0.0, 0.7])):
        mixed = denoiser.run()
    with adapter.condition(tokens(), scale=0.7):
        uniform = denoiser.run()
    assert torch.equal(mixed[0], plain[0])
    torch.testing.assert_close(mixed[1], uniform[1], atol=1e-6, rtol=1e-5)
    assert (mixed[1] - plain[1]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), torch.tensor([1.0, float("nan")])])
def test_a_scale_that_is_no_number_is_refused(scale):
    denoiser = cogvideox()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    with pytest.raises(ValueError, match="must be finite"):
        adapter.set_condition(tokens(), scale)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1,), (3,), (), (2, 1)])
def test_a_scale_for_another_number_of_rows_is_refused(shape):
    denoiser = cogvideox()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    with pytest.raises(ValueError, match=r"must be \(2,\), got"):
        adapter.set_condition(tokens(), torch.ones(shape))


# Where it lands


@torch.no_grad()
def test_the_injected_term_is_attention_from_the_attention_output_to_the_tokens():
    """One site, written out by hand."""
    denoiser = cogvideox()
    site = "transformer_blocks.0.attn1.to_out.0"
    adapter = trained(denoiser.model, [site])
    seen = []
    layer = denoiser.model.get_submodule(site)
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    adapter.attach(denoiser.model)
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    motion = tokens()
    with adapter.condition(motion, scale=0.5) as condition:
        denoiser.run()
    before, after = seen
    weights = adapter.sites[site.replace(".", "/")]
    expected = torch.empty_like(before)
    for row in range(2):
        query, key, value = (
            (source @ projection.weight.T).unflatten(-1, (2, 16)).transpose(0, 1)
            for source, projection in (
                (before[row], weights.to_q),
                (motion[row], weights.to_k),
                (motion[row], weights.to_v),
            )
        )
        attention = torch.softmax(query @ key.transpose(1, 2) / 4, dim=-1)
        expected[row] = 0.5 * (attention @ value).transpose(0, 1).flatten(1)
    torch.testing.assert_close(after - before, expected, atol=1e-5, rtol=1e-4)
    effect = condition.effect()
    assert effect.per_site[site] == pytest.approx((expected.norm() / before.norm()).item(), rel=1e-4)
    assert effect.mean == pytest.approx(effect.per_site[site])


@torch.no_grad()
def test_the_effect_sums_over_calls_and_averages_over_sites():
    denoiser = cogvideox()
    adapter = trained(denoiser.model)
    norms = {site: torch.zeros(2) for site in adapter.site_names}
    before = {}

    def remember(site, _, args):
        before[site] = args[0]

    def measure(site, _, args):
        norms[site] += torch.stack([(args[0] - before[site]).square().sum(), before[site].square().sum()])

    for site in norms:
        denoiser.model.get_submodule(site).register_forward_pre_hook(partial(remember, site))
    adapter.attach(denoiser.model)
    for site in norms:
        denoiser.model.get_submodule(site).register_forward_pre_hook(partial(measure, site))
    with adapter.condition(tokens()) as condition:
        denoiser.run()
        denoiser.run(hidden_states=3 * denoiser.arguments["hidden_states"])
    expected = {site: (motion / attention).sqrt().item() for site, (motion, attention) in norms.items()}
    effect = condition.effect()
    assert effect.per_site == pytest.approx(expected, rel=1e-3)
    assert effect.mean == pytest.approx(sum(expected.values()) / 2, rel=1e-3)


@torch.no_grad()
def test_a_subset_of_sites():
    denoiser = svd()
    everywhere = trained(denoiser.model)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    one = AttentionInjection.for_model(denoiser.model, token_dim=TOKEN_DIM, sites=[name])
    assert one.site_names == [f"{name}.to_out.0"]
    one.load_state_dict({key: value for key, value in everywhere.state_dict().items() if "mid_block" in key})
    one.attach(denoiser.model)
    with one.condition(tokens()) as condition:
        some = denoiser.run()
    one.detach()
    everywhere.attach(denoiser.model)
    with everywhere.condition(tokens()):
        every = denoiser.run()
    assert list(condition.effect().per_site) == [f"{name}.to_out.0"]
    assert (some - every).abs().max() > 1e-3


def test_a_site_named_by_its_attention_or_by_its_projection_is_the_same():
    model = cogvideox().model
    by_attention = AttentionInjection.for_model(model, token_dim=8, sites=["transformer_blocks.1.attn1"])
    by_projection = AttentionInjection.for_model(model, token_dim=8, sites=["transformer_blocks.1.attn1.to_out.0"])
    assert by_attention.config() == by_projection.config()
    assert by_attention.config() == {"sites": {"transformer_blocks.1.attn1.to_out.0": [32, 2]}, "token_dim": 8}


@torch.no_grad()
def test_config_and_state_dict_build_the_adapter_again(denoiser):
    adapter = trained(denoiser.model, denoiser.sites)
    again = AttentionInjection(**adapter.config())
    again.load_state_dict(adapter.state_dict())
    results = []
    for each in (adapter, again):
        each.attach(denoiser.model)
        with each.condition(tokens()):
            results.append(denoiser.run())
        each.detach()
    assert torch.equal(*results)


# Batches


@torch.no_grad()
def test_rows_get_their_own_tokens(denoiser):
    adapter = trained(denoiser.model, denoiser.sites)
    adapter.attach(denoiser.model)
    motion = tokens()
    with adapter.condition(motion):
        both = denoiser.run()
    for row in range(2):
        single = {
            name: value[row : row + 1] if isinstance(value, torch.Tensor) and value.ndim and len(value) == 2 else value
            for name, value in denoiser.arguments.items()
        }
        with adapter.condition(motion[row : row + 1]):
            alone = denoiser.run(**single)
        torch.testing.assert_close(both[row : row + 1], alone, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_one_row_of_tokens_serves_the_whole_batch(denoiser):
    adapter = trained(denoiser.model, denoiser.sites)
    adapter.attach(denoiser.model)
    motion = tokens(1)
    with adapter.condition(motion):
        shared = denoiser.run()
    with adapter.condition(motion.expand(2, -1, -1)):
        torch.testing.assert_close(shared, denoiser.run(), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_frames_in_the_batch_share_the_tokens_of_their_video():
    """Interleaved, not tiled: rows 0-2 are the frames of video 0."""
    adapter = AttentionInjection({"site": (32, 2)}, token_dim=TOKEN_DIM)
    attention = adapter.sites["site"]
    nn.init.normal_(attention.to_v.weight)
    hidden, motion = torch.randn(6, 9, 32), tokens()
    together = attention(hidden, *attention.keys_values(motion))
    for frame in range(6):
        video = frame // 3
        alone = attention(hidden[frame : frame + 1], *attention.keys_values(motion[video : video + 1]))
        torch.testing.assert_close(together[frame : frame + 1], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_guidance_batches_the_unconditional_rows_first():
    denoiser = cogvideox()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    unconditional, conditional = tokens(2, seed=5), tokens(2, seed=6)
    doubled = {name: torch.cat([value, value]) for name, value in denoiser.arguments.items()}
    with adapter.condition(torch.cat([unconditional, conditional])):
        first, second = denoiser.run(**doubled).chunk(2)
    for half, motion in ((first, unconditional), (second, conditional)):
        with adapter.condition(motion):
            torch.testing.assert_close(half, denoiser.run(), atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rows", [3, 4, 5])
def test_token_rows_that_do_not_divide_the_batch_are_an_error(rows):
    """The published code injects nothing, without a word, for twice as many token rows as videos."""
    denoiser = cogvideox()
    plain = denoiser.run()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    with (
        adapter.condition(tokens(rows)),
        pytest.raises(ValueError, match=rf"batch of 2 at transformer_blocks\.0.*tokens for {rows} rows"),
    ):
        denoiser.run()
    assert torch.equal(denoiser.run(), plain)


@torch.no_grad()
def test_more_token_rows_than_folded_frames_are_an_error():
    denoiser = svd()  # its sites see 2 videos × 3 frames
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    for rows in (4, 5, 12):
        with adapter.condition(tokens(rows)), pytest.raises(ValueError, match="batch of 6"):
            denoiser.run()


# What is refused


def test_an_unknown_site_is_named_with_close_ones():
    model = cogvideox().model
    with pytest.raises(ValueError, match=r"'transformer_blocks.0.atn1.to_out.0'; close names: transformer_blocks"):
        AttentionInjection.for_model(model, sites=["transformer_blocks.0.atn1"])
    with pytest.raises(ValueError, match=r"no layer at"):
        AttentionInjection.for_model(model, sites=["transformer_blocks.7.attn1"])


@pytest.mark.parametrize("site", ["patch_embed", "transformer_blocks.0.ff", "", "to_out.0"])
def test_a_site_that_is_no_attention_is_refused(site):
    with pytest.raises(ValueError, match=r"no layer at|is not an attention"):
        AttentionInjection.for_model(cogvideox().model, sites=[site])


def test_an_unknown_family_needs_sites():
    with pytest.raises(ValueError, match=r"No backbone family knows Linear; known are .*CogVideoXTransformer3DModel"):
        AttentionInjection.for_model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="offers no site"):
        AttentionInjection.for_model(cogvideox().model, sites=[])


def test_another_model_is_refused_and_gets_no_hook():
    adapter = AttentionInjection({"transformer_blocks.0.attn1.to_out.0": (48, 3)}, token_dim=TOKEN_DIM)
    model = cogvideox().model
    with pytest.raises(ValueError, match=r"has 32 input channels, the adapter expects 48"):
        adapter.attach(model)
    beyond = AttentionInjection(
        {"transformer_blocks.0.attn1.to_out.0": (32, 2), "transformer_blocks.9.attn1.to_out.0": (32, 2)},
        token_dim=TOKEN_DIM,
    )
    with pytest.raises(ValueError, match=r"no layer at 'transformer_blocks\.9"):
        beyond.attach(model)
    assert hooks_on(model) == 0
    assert not adapter.is_attached
    assert not beyond.is_attached


def test_attaching_twice_is_refused():
    first, second = cogvideox().model, cogvideox().model
    adapter = trained(first)
    adapter.attach(first)
    with pytest.raises(RuntimeError, match="already attached to a CogVideoXTransformer3DModel; detach"):
        adapter.attach(second)
    assert hooks_on(second) == 0


def test_a_condition_needs_an_attached_adapter():
    adapter = trained(cogvideox().model)
    with pytest.raises(RuntimeError, match="nothing would be injected; call attach"):
        adapter.set_condition(tokens())
    with pytest.raises(RuntimeError, match="call attach"):
        adapter.reattach()


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 5, 13), torch.zeros(5, 12), torch.zeros(2, 2, 5, 12), torch.zeros(0, 5, 12), torch.zeros(2, 0, 12)],
)
def test_tokens_of_another_shape_are_refused(wrong):
    denoiser = cogvideox()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    with pytest.raises(ValueError, match=r"must be \(b, l, 12\), got"):
        adapter.set_condition(wrong)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_tokens_with_nan_or_infinity_are_refused(poison):
    denoiser = cogvideox()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    wrong = tokens()
    wrong[1, 2, 3] = poison
    with pytest.raises(ValueError, match=r"NaN or infinity; reindex"):
        adapter.set_condition(wrong)
    adapter.set_condition(tokens())  # the refused one is not in the way


@torch.no_grad()
def test_a_second_condition_inside_the_first_is_refused_and_the_first_goes_on():
    denoiser = cogvideox()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    with adapter.condition(tokens()):
        moved = denoiser.run()
        with pytest.raises(RuntimeError, match="already carries a condition"), adapter.condition(tokens()):
            pass
        with pytest.raises(RuntimeError, match="already carries a condition"):
            adapter.reattach()
        assert torch.equal(denoiser.run(), moved)


# Gradients


def test_gradients_reach_the_adapter_and_nothing_else(denoiser):
    model = denoiser.model.requires_grad_(False)
    adapter = trained(model, denoiser.sites)
    adapter.attach(model)
    motion = tokens().requires_grad_()
    with adapter.condition(motion):
        denoiser.run().square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in adapter.parameters())
    moving = [name for name, weight in adapter.named_parameters() if weight.grad.any()]
    # In SVD the query is the same everywhere, but it still chooses among the tokens.
    assert len(moving) == len(list(adapter.parameters()))
    assert motion.grad.any()
    assert all(weight.grad is None for weight in model.parameters())


def test_a_condition_that_was_set_without_gradients_still_trains_every_weight():
    """Keys and values that are kept for inference have no graph."""
    denoiser = cogvideox()
    adapter = trained(denoiser.model.requires_grad_(False))
    adapter.attach(denoiser.model)
    with torch.no_grad():
        adapter.set_condition(tokens())
    denoiser.run().square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in adapter.parameters())


def test_a_fresh_adapter_can_learn():
    """`to_v` is zero, so only it gets a gradient at first; the others follow after one step."""
    denoiser = cogvideox()
    model = denoiser.model.requires_grad_(False)
    adapter = AttentionInjection.for_model(model, token_dim=TOKEN_DIM)
    adapter.attach(model)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for expected in ({"to_v"}, {"to_q", "to_k", "to_v"}):
        optimiser.zero_grad()
        with adapter.condition(tokens()):
            denoiser.run().square().mean().backward()
        learning = {name.split(".")[-2] for name, weight in adapter.named_parameters() if weight.grad.any()}
        assert learning == expected
        optimiser.step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_the_backward_pass_outside(denoiser, reentrant):
    """As in Lightning: the step returns its loss, then the backward pass runs the forward pass again."""
    model = denoiser.model.requires_grad_(False)
    adapter = trained(model, denoiser.sites)
    adapter.attach(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
            model.enable_gradient_checkpointing(checkpoint)
            model.train()
        adapter.zero_grad()
        # Reentrant checkpoints only run backward if an input needs a gradient.
        arguments = {
            name: value.clone().requires_grad_() if name in ("hidden_states", "sample") else value
            for name, value in denoiser.arguments.items()
        }
        adapter.set_condition(tokens())
        loss = denoiser.run(**arguments).square().mean()
        loss.backward()
        adapter.clear_condition()
        adapter.clear_condition()
        gradients.append([weight.grad.clone() for weight in adapter.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-7, rtol=1e-5)


def test_weights_changed_between_training_steps_are_used_at_once():
    """Keys and values are kept for a generation, never over an optimiser's step."""
    denoiser = cogvideox()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    adapter.set_condition(tokens())
    before = denoiser.run().detach()
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.mul_(2)
    assert (denoiser.run().detach() - before).abs().max() > 1e-2


@torch.no_grad()
def test_keys_and_values_are_computed_once_for_a_condition():
    denoiser = cogvideox()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    calls = []
    for attention in adapter.sites.values():
        attention.to_k.register_forward_hook(lambda *_: calls.append(1))
    with adapter.condition(tokens()):
        for _ in range(3):
            denoiser.run()
    assert len(calls) == len(adapter.sites)


# torch.compile


@torch.no_grad()
@pytest.mark.parametrize("order", ["attach, compile", "compile, run, attach", "in place", "wrapped"])
def test_compiled_models_inject_the_same(order):
    torch._dynamo.reset()
    denoiser = cogvideox()
    model = denoiser.model
    adapter = trained(model)
    plain = denoiser.run()
    conditions = [tokens(), tokens(seed=3, length=7)]
    if order == "attach, compile":
        conditions += [tokens(seed=4), tokens(1)]
    adapter.attach(model)
    expected = []
    for motion in conditions:
        with adapter.condition(motion):
            expected.append(denoiser.run())
    adapter.detach()

    compiled = model
    if order == "in place":
        model.compile(fullgraph=True, backend="eager")
        denoiser.run()
    elif order != "attach, compile":
        compiled = torch.compile(model, fullgraph=True, backend="eager")
    if order == "compile, run, attach":
        denoiser.run(compiled)
    if order == "wrapped":  # the compiled model itself is given to the adapter
        again = AttentionInjection.for_model(compiled, token_dim=TOKEN_DIM)
        again.load_state_dict(adapter.state_dict())
        adapter = again
        denoiser.run(compiled)
    adapter.attach(compiled if order == "wrapped" else model)
    if order == "attach, compile":
        compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(denoiser.run(compiled), plain)
    for motion, reference in zip(conditions, expected, strict=True):
        with adapter.condition(motion) as condition:
            torch.testing.assert_close(denoiser.run(compiled), reference)
        assert condition.effect().mean > 0
    torch.testing.assert_close(denoiser.run(compiled), plain)
    adapter.detach()
    torch.testing.assert_close(denoiser.run(compiled), plain)
    torch._dynamo.reset()


# Precision


@torch.no_grad()
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_a_half_precision_model(family, adapter_dtype):
    denoiser = DENOISERS[family]()
    adapter = trained(denoiser.model, denoiser.sites)
    adapter.attach(denoiser.model)
    with adapter.condition(tokens()):
        exact = denoiser.run()
    plain = denoiser.run()
    denoiser.model.to(torch.bfloat16)
    adapter.to(adapter_dtype)
    halves = {
        name: value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in denoiser.arguments.items()
    }
    with adapter.condition(tokens()):  # float32 tokens, as a database gives them
        rough = denoiser.run(**halves)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).norm() < 0.2 * (exact - plain).norm()


@torch.no_grad()
def test_autocast():
    denoiser = cogvideox()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    plain = denoiser.run()
    with adapter.condition(tokens()):
        exact = denoiser.run()
    with torch.autocast("cpu", torch.bfloat16), adapter.condition(tokens()):
        inside = denoiser.run()
    with adapter.condition(tokens()), torch.autocast("cpu", torch.bfloat16):  # tokens set outside of it
        around = denoiser.run()
    for rough in (inside, around):
        assert (rough - exact).norm() < 0.2 * (exact - plain).norm()


def test_training_under_autocast():
    denoiser = cogvideox()
    model = denoiser.model.requires_grad_(False)
    adapter = trained(model)
    adapter.attach(model)
    with torch.autocast("cpu", torch.bfloat16), adapter.condition(tokens()):
        loss = denoiser.run().float().square().mean()
    loss.backward()
    assert all(weight.grad.any() and weight.grad.dtype == torch.float32 for weight in adapter.parameters())


# LoRA


def lora(model):
    """LoRA on the very layers that carry the hooks."""
    from peft import LoraConfig

    torch.manual_seed(7)
    # Not zero, as after training.
    model.add_adapter(LoraConfig(r=2, target_modules=["to_out.0", "to_q"], init_lora_weights=False))


def merged():
    denoiser = cogvideox()
    lora(denoiser.model)
    denoiser.model.fuse_lora()
    return denoiser


@torch.no_grad()
def test_lora_loaded_before_the_adapter():
    expected = merged()
    adapter = trained(expected.model)
    adapter.attach(expected.model)
    with adapter.condition(tokens()):
        reference = expected.run()
    adapter.detach()

    denoiser = cogvideox()
    lora(denoiser.model)
    adapter.attach(denoiser.model)
    with adapter.condition(tokens()):
        torch.testing.assert_close(denoiser.run(), reference, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_lora_loaded_after_the_adapter_is_noticed_and_put_right():
    expected = merged()
    adapter = trained(expected.model)
    adapter.attach(expected.model)
    with adapter.condition(tokens()):
        reference = expected.run()
    adapter.detach()

    denoiser = cogvideox()
    plain = denoiser.run()
    adapter.attach(denoiser.model)
    lora(denoiser.model)
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.0.*replaced.*LoRA → attach"):
        adapter.set_condition(tokens())
    adapter.reattach()
    with adapter.condition(tokens()):
        torch.testing.assert_close(denoiser.run(), reference, atol=1e-4, rtol=1e-4)
    denoiser.model.unload_lora()
    adapter.reattach()
    assert torch.equal(denoiser.run(), plain)
    with adapter.condition(tokens()):
        assert (denoiser.run() - plain).abs().max() > 1e-2
    adapter.detach()
    assert hooks_on(denoiser.model) == 0


@torch.no_grad()
def test_reattach_moves_to_another_model():
    first, second = cogvideox(), cogvideox()
    adapter = trained(first.model)
    adapter.attach(first.model)
    adapter.reattach(second.model)
    assert hooks_on(first.model) == 0
    with adapter.condition(tokens()):
        assert (second.run() - first.run()).abs().max() > 1e-2


@torch.no_grad()
def test_a_replaced_block_is_noticed():
    denoiser = cogvideox()
    adapter = trained(denoiser.model)
    adapter.attach(denoiser.model)
    denoiser.model.transformer_blocks[1] = cogvideox().model.transformer_blocks[1]
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.1\.attn1\.to_out\.0 was replaced"):
        adapter.set_condition(tokens())
