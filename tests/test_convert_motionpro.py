"""Key maps from the published MotionPro files: the whole table at real size, and what is refused."""

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel

from motionrag import MotionBundle, MotionRAGPipeline, convert_motionpro
from motionrag.adapters import FeatureModulation, published_group_norm
from motionrag.conversion import convert_files
from motionrag.convert import load_published
from tests.parity.golden_motionpro import FOLDER, load_networks, read_json
from tests.parity.test_modulation import assert_close, run

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def published():
    """The real checkpoint's UNet: names and shapes, on the meta device."""
    parts = read_json("keys_real_size.json")
    return {key: torch.empty(shape, device="meta") for part in parts.values() for key, shape in part.items()}


@pytest.fixture(scope="module")
def real_unet():
    with torch.device("meta"):
        return UNetSpatioTemporalConditionModel(**read_json("key_map.json")["diffusers_real_config"])


def tiny_state():
    """A checkpoint of two levels with LoRA."""
    return load_published(FOLDER / "checkpoint_tiny.pt")


def shapes(state):
    return {key: tuple(value.shape) for key, value in state.items()}


def test_the_published_unet_at_real_size(published, real_unet):
    assert shapes(convert_motionpro.svd_unet(published)) == shapes(real_unet.state_dict())


def test_the_published_modulation_at_real_size(published, real_unet):
    with torch.device("meta"):
        modulation = FeatureModulation.for_model(real_unet)
    converted = convert_motionpro.modulation(published)
    assert shapes(converted) == shapes(modulation.state_dict())
    assert sum(value.numel() for key, value in converted.items() if key.startswith("encoder.")) == 69_195_440
    assert sum(value.numel() for key, value in converted.items() if key.startswith("sites.")) == 45_497_280


def test_every_key_goes_where_the_published_table_says():
    """Shapes alone would not tell a query from a key: every tensor carries the number of its name."""
    table = read_json("key_map.json")
    base = {official: torch.tensor(float(number)) for number, official in enumerate(table["base"])}
    converted = convert_motionpro.svd_unet(base)
    assert {official: int(value) for official, value in base.items()} == {
        official: int(converted[ours]) for official, ours in table["base"].items()
    }
    assert len(converted) == len(table["base"])

    flow = [key.removeprefix(PREFIX) for key in read_json("keys_real_size.json")["flow_blocks"]]
    numbered = {key: torch.tensor(float(number)) for number, key in enumerate([*flow, *table["flow_resnets"]])}
    converted = convert_motionpro.modulation(numbered)
    names = {"cond_norm": "norm"} | {
        f"{which}_{axis}": f"{which}.{axis}" for which in ("gamma", "beta") for axis in ("spatial", "temporal")
    }
    for official, (resnet, _) in table["flow_resnets"].items():
        layer, _, kind = official.partition(".flow_")[2].rpartition(".")
        path = f"{resnet}.conv1".replace(".", "/")
        assert converted[f"sites.{path}.{names[layer]}.{kind}"] == numbered[official]
    assert len(converted) == len(numbered)


def test_levels_of_the_modulated_blocks_at_real_size(real_unet):
    with torch.device("meta"):
        sites = FeatureModulation.for_model(real_unet).config()["sites"]
    expected = {f"{resnet}.conv1": level for resnet, level in read_json("key_map.json")["flow_resnets"].values()}
    assert {site: level for site, (_, level) in sites.items()} == expected


@pytest.mark.parametrize("convert", [convert_motionpro.svd_unet, convert_motionpro.modulation])
def test_the_prefix_may_be_there_or_not(convert):
    state = tiny_state()
    bare = {key.removeprefix(PREFIX): value for key, value in state.items()}
    with_others = state | {"conditioner.embedders.0.x": torch.zeros(1), "first_stage_model.encoder.x": torch.zeros(1)}
    expected = convert(state)
    for other in (bare, with_others):
        actual = convert(other)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in actual.items())


def test_lora_is_merged_in_the_dtype_of_the_file():
    state = tiny_state()
    linear = f"{PREFIX}input_blocks.1.1.proj_in"
    ours = "down_blocks.0.attentions.0.proj_in"
    base, down, up = (state[f"{linear}.{part}.weight"].double() for part in ("linear", "lora_down", "lora_up"))
    merged = convert_motionpro.svd_unet(state)
    torch.testing.assert_close(merged[f"{ours}.weight"].double(), base + torch.einsum("or,ri->oi", up, down))
    assert torch.equal(merged[f"{ours}.bias"], state[f"{linear}.linear.bias"])
    half = convert_motionpro.svd_unet({key: value.half() for key, value in state.items()})
    assert {value.dtype for value in half.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("convert", "missing"),
    [
        ("svd_unet", "time_embed.0.lora_up.weight"),
        ("svd_unet", "time_embed.0.linear.weight"),
        ("svd_unet", "input_blocks.1.0.time_mixer.mix_factor"),
        ("svd_unet", "output_blocks.0.0.skip_connection.bias"),
        ("svd_unet", "middle_block.2.in_layers.0.weight"),
        ("modulation", "flow_blocks.0.9.weight"),
        ("modulation", "flow_blocks.1.4.op.bias"),
        ("modulation", "input_blocks.3.0.flow_gamma_temporal.bias"),
    ],
)
def test_a_missing_key_is_named(convert, missing):
    state = tiny_state()
    del state[PREFIX + missing]
    with pytest.raises(ValueError, match=rf"missing keys: {missing}"):
        getattr(convert_motionpro, convert)(state)


def test_a_missing_site_is_named():
    state = {key: value for key, value in tiny_state().items() if "output_blocks.2.0.flow_" not in key}
    with pytest.raises(
        ValueError, match=r"missing keys: output_blocks\.2\.0\.flow_beta_spatial\.bias, .*unknown keys: none"
    ):
        convert_motionpro.modulation(state)


@pytest.mark.parametrize(
    ("convert", "unknown"),
    [
        ("svd_unet", "input_blocks.1.0.surplus.weight"),
        ("svd_unet", "time_embed.0.lora_middle.weight"),
        ("svd_unet", "time_embed.0.weight"),
        ("modulation", "flow_blocks.0.3.weight"),
        ("modulation", "middle_block.0.flow_gamma_spatial.weight"),
        ("modulation", "surplus.weight"),
    ],
)
def test_an_unknown_key_is_named(convert, unknown):
    state = tiny_state() | {PREFIX + unknown: torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"unknown keys: (\S+, )?" + unknown.replace("time_embed.0.weight", "time_embed")
    ):
        getattr(convert_motionpro, convert)(state)


def test_another_published_file_is_refused():
    with pytest.raises(ValueError, match=r"missing keys: flow_blocks\.0\.0\.bias.*unknown keys: none"):
        convert_motionpro.modulation({key: value for key, value in tiny_state().items() if "flow_" not in key})
    with pytest.raises(ValueError, match=r"unknown keys: transformer\.layers\.0\.weight"):
        convert_motionpro.modulation({"transformer.layers.0.weight": torch.zeros(1)})


# A bundle of the published file


@pytest.fixture
def base_model(tmp_path):
    """A folder with no more of the base model than the UNet's config."""
    folder = tmp_path / "base"
    config = load_networks("checkpoint_tiny_io").config["diffusers_config"]
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(**config)
    unet.save_config(folder / "unet")
    return folder


def test_the_published_file_becomes_a_bundle_that_gives_the_published_numbers(base_model, tmp_path):
    report = convert_files(
        [FOLDER / "checkpoint_tiny.pt"], tmp_path / "bundle", backbone="svd", base_model=str(base_model)
    )
    assert [part.part for part in report.parts] == ["feature_modulation"]
    assert any("its LoRA merged" in note for note in report.notes)

    bundle = MotionBundle.from_pretrained(tmp_path / "bundle")
    assert (bundle.config.height, bundle.config.width, bundle.config.num_frames, bundle.config.fps) == (320, 512, 16, 8)
    assert bundle.config.guidance_scale == 2.5
    assert bundle.config.encoders == {}
    unet = UNetSpatioTemporalConditionModel.from_pretrained(bundle.path_or_id(bundle.config.denoiser)).eval()
    case = load_networks("checkpoint_tiny_io")
    bundle.feature_modulation.attach(unet)
    with torch.no_grad(), published_group_norm(unet), bundle.feature_modulation.condition(case.inputs["flow"]):
        assert_close(run(unet, case), case.outputs["sample"], 2e-5)


def test_the_bundles_own_denoiser_takes_the_base_models_place(base_model, tmp_path):
    """Also after the bundle was saved elsewhere."""
    from tests.training.parts import svd_pipeline

    convert_files([FOLDER / "checkpoint_tiny.pt"], tmp_path / "bundle", backbone="svd", base_model=str(base_model))
    MotionBundle.from_pretrained(tmp_path / "bundle").save_pretrained(tmp_path / "moved")
    unet = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path / "moved" / "unet")
    pipeline = svd_pipeline()
    with torch.device("cpu"):
        pipeline.register_modules(unet=UNetSpatioTemporalConditionModel.from_config(unet.config))
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipe = MotionRAGPipeline.from_pretrained(tmp_path / "pipeline", bundle=tmp_path / "moved")
    for name, weight in pipe.pipeline.unet.state_dict().items():
        assert torch.equal(weight, unet.state_dict()[name])
    assert pipe.modulation.is_attached
    assert pipe.pipeline.unet.config.num_frames == 16

    from diffusers import StableVideoDiffusionPipeline

    plain = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=r"a unet of its own.*from_pretrained\(bundle\).*moved/unet"):
        MotionRAGPipeline(plain, MotionBundle.from_pretrained(tmp_path / "moved"))


@pytest.mark.parametrize(
    ("copies", "backbone", "message"),
    [
        (1, "cogvideox", "belong to svd, not to cogvideox"),
        (2, "svd", "both hold MotionPro's networks"),
        (0, "svd", "no file to convert"),
    ],
)
def test_what_cannot_be_a_bundle_is_refused_and_leaves_no_folder(base_model, tmp_path, copies, backbone, message):
    files = [tmp_path / f"{number}.pt" for number in range(copies)]
    for file in files:
        file.write_bytes((FOLDER / "checkpoint_tiny.pt").read_bytes())
    with pytest.raises(ValueError, match=message):
        convert_files(files, tmp_path / "bundle", backbone=backbone, base_model=str(base_model))
    assert not (tmp_path / "bundle").exists()


def test_other_networks_in_the_file_are_reported_as_left_out(base_model, tmp_path):
    state = {**tiny_state(), "first_stage_model.decoder.conv_in.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "more.pt")
    report = convert_files([tmp_path / "more.pt"], tmp_path / "bundle", backbone="svd", base_model=str(base_model))
    assert [each.keys for each in report.left_out] == [["first_stage_model.decoder.conv_in.weight"]]


def test_a_file_that_lacks_a_tensor_is_refused_by_name(base_model, tmp_path):
    state = tiny_state()
    key = next(key for key in state if key.endswith("flow_gamma_spatial.weight"))
    torch.save({name: value for name, value in state.items() if name != key}, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"less\.pt: .*flow_gamma_spatial\.weight"):
        convert_files([tmp_path / "less.pt"], tmp_path / "bundle", backbone="svd", base_model=str(base_model))
