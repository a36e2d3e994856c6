"""CAMA, its two resamplers and the guidance tokens against the published condition transformer."""

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from motionrag import convert
from motionrag.models import CAMA, cama_loss
from motionrag.models.cama import block_causal_mask
from tests.parity.golden import assert_golden, load_case
from tests.parity.test_resampler import build as build_resampler


def build(case):
    args, states = case.config["args"], convert.cama(case.state)
    transformer = args["transformer"]
    cama = CAMA(
        dim=transformer["d_model"],
        depth=transformer["num_layers"],
        num_heads=transformer["nhead"],
        ff_dim=transformer["dim_feedforward"],
        num_tokens=args["vision_proj"]["num_queries"],
    )
    cama.load_state_dict(states["cama"], strict=True)
    motion = build_resampler(states["motion_resampler"], args["vision_proj"])
    context = build_resampler(states["context_resampler"], args["condition_proj"])
    return cama.eval(), motion, context


def per_clip(resampler, features):
    batch = features.shape[0]
    return rearrange(resampler(rearrange(features, "b k l c -> (b k) l c")), "(b k) l d -> b k l d", b=batch)


@pytest.fixture(params=[0, 1, 2, 3, 9], ids=lambda k: f"{k} references")
def case(request):
    return load_case(f"cama_ref{request.param}")


@pytest.mark.parametrize("grad", [False, True], ids=["fused", "autograd"])
def test_predictions_and_losses(case, grad):
    cama, motion_resampler, context_resampler = build(case)
    with torch.set_grad_enabled(grad):
        motion = per_clip(motion_resampler, case.inputs["motion_features"])
        context = per_clip(context_resampler, case.inputs["context_features"])
        assert_golden(motion, case.outputs["motion_tokens"])
        assert_golden(cama.embed(motion[:, :-1], context), case.outputs["transformer_input"])
        predicted = cama(motion[:, :-1], context)
        assert_golden(predicted, case.outputs["predicted_tokens"])
        assert_golden(cama.predict(motion[:, :-1], context), case.outputs["predict"])
        assert_golden(cama_loss(predicted, motion), case.outputs["loss_mse"])
        assert_golden(cama_loss(predicted, motion, query_only=True), case.outputs["loss_mse_target_only"])
        assert_golden(F.smooth_l1_loss(predicted, motion), case.outputs["loss_smooth_l1"])


def test_mask(case):
    blocks = case.outputs["motion_tokens"].shape[1]
    assert torch.equal(block_causal_mask(blocks, 5), case.outputs["attention_mask"])


def test_guidance_tokens(case):
    if "uncond_tokens" not in case.outputs:
        pytest.skip("the published guidance form raises without references")
    cama, motion_resampler, context_resampler = build(case)
    unconditional = motion_resampler(case.inputs["uncond_motion_features"])
    assert_golden(unconditional, case.outputs["uncond_tokens"])
    motion = per_clip(motion_resampler, case.inputs["motion_features"])
    context = per_clip(context_resampler, case.inputs["context_features"])
    conditional = cama.predict(motion[:, :-1], context)
    assert_golden(torch.cat([unconditional, conditional]), case.outputs["predict_cfg"])


def test_references_go_least_similar_first():
    case = load_case("cama_ref9")
    retrieved = case.inputs["ref_motion_features_retrieval_order"]
    assert torch.equal(retrieved.flip(1), case.inputs["motion_features"][:, :-1])


def test_missing_sos_token_needs_a_choice():
    case = load_case("cama_ref1")
    token = case.state.pop("sos_token")
    with pytest.raises(ValueError, match="sos_token=…"):
        convert.cama(case.state)
    assert torch.equal(convert.cama(case.state, sos_token=token)["cama"]["sos_token"], token[0])


def test_prefixed_keys_and_foreign_keys():
    state = load_case("cama_ref1").state
    prefixed = {f"condition_transformer.{key}": value for key, value in state.items()}
    plain, same = convert.cama(state), convert.cama(prefixed)
    assert {name: part.keys() for name, part in plain.items()} == {name: part.keys() for name, part in same.items()}
    with pytest.raises(ValueError, match=r"unknown keys: surprise\.weight"):
        convert.cama({**state, "surprise.weight": torch.zeros(1)})
