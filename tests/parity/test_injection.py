"""Motion injection against the published processors: whole models and single attentions."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, UNetSpatioTemporalConditionModel
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from torch import nn

from motionrag import convert
from motionrag.adapters import AttentionInjection
from tests.parity.golden import assert_golden, load_case

SCALES = [0, 0.5, 1]


@pytest.fixture(params=[True, False], ids=["shortcuts", "as written"])
def shortcuts(request):
    return request.param


def attach(model: nn.Module, case, shortcuts, *, backbone: str, prefix: str = "", sites=None) -> AttentionInjection:
    """Load the backbone's own keys into `model` and the processors' keys into an adapter at its sites."""
    own = {k.removeprefix(prefix): v for k, v in case.state.items() if ".processor." not in f".{k}"}
    model.load_state_dict(own, strict=True)
    model.eval()
    adapter_state = convert.injection({k: v for k, v in case.state.items() if ".processor." in f".{k}"}, backbone)
    adapter = AttentionInjection.for_model(model, token_dim=case.inputs["motion_tokens"].shape[-1], sites=sites)
    adapter.load_state_dict(adapter_state, strict=True)
    adapter.takes_shortcuts = shortcuts
    adapter.attach(model)
    return adapter


def capture_input(layer: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Collect what reaches a layer before and after the adapter's hook; both lists get one tensor a call."""
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: before.append(args[0]), prepend=True)
    layer.register_forward_pre_hook(lambda _, args: after.append(args[0]))
    return before, after


@torch.no_grad()
@pytest.mark.parametrize("files", [["svd_unet"], ["svd_unet_widths.part1of2", "svd_unet_widths.part2of2"]])
def test_svd_unet(files, shortcuts):
    case = load_case(*files)
    unet = UNetSpatioTemporalConditionModel(**case.config["args"])
    adapter = attach(unet, case, shortcuts, backbone="svd", prefix="unet.")
    expected_sites = {name.removesuffix("processor") + "to_out.0" for name in case.config["adapter_modules"]}
    assert set(adapter.site_names) == expected_sites

    def run(image="image_embeddings"):
        inputs = case.inputs
        return unet(inputs["sample"], inputs["timestep"], inputs[image], added_time_ids=inputs["added_time_ids"]).sample

    plain = run()
    assert_golden(plain, case.outputs["plain"])
    tokens = case.inputs["motion_tokens"]
    before, after = capture_input(unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_out[0])
    for scale in SCALES:
        with adapter.condition(tokens, scale=scale):
            assert_golden(run(), case.outputs[f"scale_{scale}"])
    with adapter.condition(tokens):
        assert_golden(run("image_embeddings2"), case.outputs["scale_1_image2"])
    # With a single image token the shortcut runs one position, which stands for all.
    assert before[-1].shape[1] == (1 if shortcuts else case.outputs["mid_attn2_attention_output"].shape[1])
    for seen, name in ((before, "mid_attn2_attention_output"), (after, "mid_attn2_after_injection")):
        assert_golden(seen[-1].expand_as(case.outputs[name]), case.outputs[name])
    with adapter.condition(tokens, scale=0):
        assert torch.equal(run(), plain)
    adapter.detach()
    assert torch.equal(run(), plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cogvideox_rope", "cogvideox_norope"])
def test_cogvideox_transformer(name, shortcuts):
    case = load_case(name)
    transformer = CogVideoXTransformer3DModel(**case.config["args"])
    adapter = attach(transformer, case, shortcuts, backbone="cogvideox", prefix="transformer.")
    assert adapter.site_names == [f"transformer_blocks.{i}.attn1.to_out.0" for i in range(len(adapter.sites))]

    def run():
        inputs = case.inputs
        rope = (inputs["rope_cos"], inputs["rope_sin"]) if "rope_cos" in inputs else None
        return transformer(
            inputs["hidden_states"], inputs["encoder_hidden_states"], inputs["timestep"], image_rotary_emb=rope
        ).sample

    plain = run()
    assert_golden(plain, case.outputs["plain"])
    before, after = capture_input(transformer.transformer_blocks[0].attn1.to_out[0])
    for scale in SCALES:
        with adapter.condition(case.inputs["motion_tokens"], scale=scale):
            assert_golden(run(), case.outputs[f"scale_{scale}"])
    assert_golden(before[-1], case.outputs["block0_attention_output"])
    assert_golden(after[-1], case.outputs["block0_after_injection"])
    adapter.detach()
    assert torch.equal(run(), plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["svd_attn_frames_repeat", "svd_attn_aligned", "svd_attn_image4d"])
def test_single_cross_attention(name, shortcuts):
    case = load_case(name)
    attention = Attention(**case.config["attention_args"])
    adapter = attach(attention, case, shortcuts, backbone="svd", sites=["to_out.0"])
    before, after = capture_input(attention.to_out[0])

    def run():
        return attention(case.inputs["hidden_states"], encoder_hidden_states=case.inputs["context"])

    assert_golden(run(), case.outputs["plain"])
    for scale in SCALES:
        with adapter.condition(case.inputs["motion_tokens"], scale=scale):
            assert_golden(run(), case.outputs[f"scale_{scale}"])
    for seen, output in ((before, "attention_output"), (after, "after_injection")):
        assert_golden(seen[-1].expand_as(case.outputs[output]), case.outputs[output])


@torch.no_grad()
@pytest.mark.parametrize("name", ["cog_attn_repeat", "cog_attn_rope"])
def test_single_joint_attention(name, shortcuts):
    case = load_case(name)
    attention = Attention(**case.config["attention_args"], processor=CogVideoXAttnProcessor2_0())
    adapter = attach(attention, case, shortcuts, backbone="cogvideox", sites=["to_out.0"])
    inputs = case.inputs
    rope = (inputs["rope_cos"], inputs["rope_sin"]) if "rope_cos" in inputs else None
    for scale in SCALES:
        with adapter.condition(inputs["motion_tokens"], scale=scale):
            video, text = attention(
                inputs["hidden_states"],
                encoder_hidden_states=inputs["encoder_hidden_states"],
                image_rotary_emb=rope,
            )
        assert_golden(video, case.outputs[f"scale_{scale}_video"])
        assert_golden(text, case.outputs[f"scale_{scale}_text"])
