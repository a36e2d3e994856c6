"""The resampler against the published one, weights carried over by `convert.resampler`."""

import pytest
import torch

from motionrag import convert
from motionrag.models import Resampler
from tests.parity.golden import assert_golden, load_case


def build(state: dict, args: dict) -> Resampler:
    model = Resampler(
        input_dim=args["embedding_dim"],
        dim=args["dim"],
        output_dim=args["output_dim"],
        num_queries=state["queries"].shape[0],
        depth=args["depth"],
        num_heads=args["heads"],
        head_dim=args["dim_head"],
        ff_mult=args.get("ff_mult", 4),
    )
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.mark.parametrize("name", ["resampler_base", "resampler_rect", "resampler_video"])
def test_tokens(name):
    case = load_case(name)
    model = build(convert.resampler(case.state), case.config["args"])
    assert_golden(model(case.inputs["x"]), case.outputs["tokens"])


def test_class_token_is_the_first_query():
    case = load_case("resampler_cls")
    tokens = build(convert.resampler(case.state), case.config["args"])(case.inputs["x"])
    assert_golden(tokens[:, 0], case.outputs["cls_token"])
    assert_golden(tokens[:, 1:], case.outputs["tokens"])


@pytest.mark.parametrize("prefix", ["action_proj_model.", "condition_transformer.vision_proj.", "vision_proj."])
def test_published_prefixes_are_understood(prefix):
    state = load_case("resampler_base").state
    prefixed = {prefix + key: value for key, value in state.items()}
    assert convert.resampler(prefixed).keys() == convert.resampler(state).keys()


def test_unknown_and_missing_keys_are_named():
    state = load_case("resampler_base").state
    with pytest.raises(ValueError, match=r"unknown keys: layers\.0\.0\.to_w\.weight"):
        convert.resampler({**state, "layers.0.0.to_w.weight": torch.zeros(1)})
    state.pop("latents")
    with pytest.raises(ValueError, match="missing keys: latents"):
        convert.resampler(state)


def test_two_resamplers_in_one_file_are_not_guessed():
    state = load_case("resampler_base").state
    both = {prefix + key: value for prefix in ("vision_proj.", "condition_proj.") for key, value in state.items()}
    with pytest.raises(ValueError, match="several resamplers"):
        convert.resampler(both)
