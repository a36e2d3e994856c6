"""Bundles that take encoders, resamplers and CAMA from another one, and the 8 bits in which denoisers are shipped."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from motionrag import MotionDatabase
from motionrag.adapters import AttentionInjection
from motionrag.bundle import BundleConfig, EncoderSource, MotionBundle, resolve
from motionrag.encoder import MotionEncoder
from motionrag.models import CAMA
from motionrag.pocket.folder import write_clips
from motionrag.pocket.initialise_control import initialise_control
from motionrag.pocket.recipe import check_size, pack, store_in_8_bits
from motionrag.pocket.world import domain, sample_clip
from tests.test_bundle import PARTS, make, names

SITES = {"sites": {"up.0.attn2.to_out.0": [12, 3]}, "token_dim": 8}
LENT = ("motion_resampler", "context_resampler", "cama")


def dependent(shared="..", *, encoders=None, **parts):
    """A bundle of another family with an injection of its own."""
    torch.manual_seed(7)
    modules = {"motion_injection": AttentionInjection(**SITES)}
    modules |= {name: CAMA(**sizes) for name, sizes in parts.items()}
    config = BundleConfig(
        backbone="svd",
        base_model="someone/svd",
        encoders=encoders or {},
        parts={"motion_injection": SITES, **parts},
        shared=shared,
        licence="MIT",
    )
    return MotionBundle(config, **modules)


@pytest.fixture
def folder(tmp_path):
    """The dependent bundle, inside the one that it shares."""
    whole = make()
    encoders = {**whole.config.encoders, "image": EncoderSource("image_encoder", "MIT")}
    whole.config = replace(whole.config, encoders=encoders)
    whole.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "image_encoder").mkdir()
    (tmp_path / "whole" / "image_encoder" / "config.json").write_text('{"width": 6}')
    dependent().save_pretrained(tmp_path / "whole" / "control")
    return tmp_path / "whole" / "control"


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


# Opening


def test_what_it_has_not_comes_from_the_shared_bundle(folder):
    bundle, whole = MotionBundle.from_pretrained(folder), MotionBundle.from_pretrained(folder.parent)
    assert bundle.config.backbone == "svd"
    assert bundle.config.encoders == whole.config.encoders
    assert bundle.config.parts == {**PARTS, "motion_injection": SITES}
    for name in LENT:
        assert bundle.part_fingerprint(name) == whole.part_fingerprint(name) == make().part_fingerprint(name)
    assert torch.equal(bundle.unconditional_tokens, make().unconditional_tokens)
    assert bundle.path_or_id("image_encoder") == str(folder.parent.resolve() / "image_encoder")
    assert bundle.path_or_id("someone/videomae") == "someone/videomae"


def test_its_own_part_wins(folder):
    dependent(cama=PARTS["cama"]).save_pretrained(folder)
    bundle, whole = MotionBundle.from_pretrained(folder), MotionBundle.from_pretrained(folder.parent)
    assert bundle.part_fingerprint("cama") == dependent(cama=PARTS["cama"]).part_fingerprint("cama")
    assert bundle.part_fingerprint("cama") != whole.part_fingerprint("cama")
    assert bundle.motion_injection.config() == SITES


def test_a_lost_part_of_its_own_is_not_replaced_by_the_shared_one(folder):
    dependent(cama=PARTS["cama"]).save_pretrained(folder)
    (folder / "cama.safetensors").unlink()
    with pytest.raises(ValueError, match=r"control lacks cama\.safetensors"):
        _ = MotionBundle.from_pretrained(folder).cama


def test_adapters_of_another_backbone_are_not_shared(tmp_path):
    make().save_pretrained(tmp_path)
    config = BundleConfig(backbone="svd", base_model="someone/svd", shared="..")
    MotionBundle(config).save_pretrained(tmp_path / "bare")
    bundle = MotionBundle.from_pretrained(tmp_path / "bare")
    assert sorted(bundle.config.parts) == sorted(LENT)
    with pytest.raises(ValueError, match="has no motion_injection"):
        _ = bundle.motion_injection


def test_its_own_encoder_wins_over_a_shared_one_of_the_same_folder(folder):
    (folder / "image_encoder").mkdir()
    assert MotionBundle.from_pretrained(folder).path_or_id("image_encoder") == str(
        folder.parent.resolve() / "image_encoder"
    )
    dependent(encoders={"image": EncoderSource("image_encoder", "MIT")}).save_pretrained(folder)
    assert MotionBundle.from_pretrained(folder).path_or_id("image_encoder") == str(folder.resolve() / "image_encoder")


def test_base_model_and_denoiser_are_never_taken_from_the_shared_bundle(folder):
    bundle = MotionBundle.from_pretrained(folder)
    bundle.config = replace(bundle.config, base_model="image_encoder")
    with pytest.raises(FileNotFoundError, match=r"control names 'image_encoder', which is no folder in it"):
        bundle.path_or_id("image_encoder")


def test_tokens_of_the_shared_bundle_do_not_serve_another_video_encoder(folder):
    dependent(encoders={"video": EncoderSource("someone/other-videomae")}).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"control lacks unconditional_tokens.*someone/other-videomae"):
        _ = MotionBundle.from_pretrained(folder).unconditional_tokens


def test_an_embedded_bundle_can_be_shared_by_name(tmp_path):
    pocket = MotionBundle.from_pretrained("pocket")
    dependent("pocket").save_pretrained(tmp_path)
    assert MotionBundle.from_pretrained(tmp_path).part_fingerprint("cama") == pocket.part_fingerprint("cama")


def test_a_bundle_on_the_hub_can_be_shared(folder, tmp_path, monkeypatch):
    """Asked of the hub with the caller's token, but not at the revision of the dependent bundle's repository."""
    asked = []

    def snapshot(repository, **options):
        asked.append((repository, options))
        return str(folder.parent)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    dependent("someone/whole").save_pretrained(tmp_path / "other")
    bundle = MotionBundle.from_pretrained(tmp_path / "other", revision="v2", token="secret")
    assert bundle.part_fingerprint("cama") == make().part_fingerprint("cama")
    [(repository, options)] = asked
    assert (repository, options.get("revision"), options["token"]) == ("someone/whole", None, "secret")


def test_info_lists_the_licences_of_both(folder):
    info = MotionBundle.from_pretrained(folder).info()
    assert info["shared"] == str(folder.parent.resolve())
    assert info["licences"] == {
        "bundle": "MIT",
        "shared": "Apache-2.0",
        "someone/svd": "",
        "someone/videomae": "CC-BY-NC-4.0",
        "ViT": "MIT",
        "image_encoder": "MIT",
    }


# What cannot be opened


@pytest.mark.parametrize("shared", ["..", "../whole", "nowhere", "/nowhere/at/all", "sub/../../other/.."])
def test_a_missing_shared_bundle_is_named_and_not_asked_of_the_hub(tmp_path, monkeypatch, shared):
    def refuse(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    dependent(shared).save_pretrained(tmp_path / "control")
    monkeypatch.chdir(tmp_path)  # of no influence
    make().save_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"control takes what it has not from the bundle .* put it there, or"):
        MotionBundle.from_pretrained(tmp_path / "control")


def test_a_shared_bundle_that_the_hub_does_not_give_is_named(tmp_path):
    dependent("someone/that-does-not-exist").save_pretrained(tmp_path / "control")
    with pytest.raises(
        FileNotFoundError, match=r"control takes what it has not .*'someone/that-does-not-exist' is neit"
    ):
        MotionBundle.from_pretrained(tmp_path / "control")


@pytest.mark.parametrize("shared", [".", "../control"])
def test_a_cycle_is_refused(folder, shared):
    dependent(shared).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"a bundle that shares .* in turn; name one that has all its parts itself"):
        MotionBundle.from_pretrained(folder)


def test_a_chain_is_refused(folder):
    dependent().save_pretrained(folder / "further")
    with pytest.raises(ValueError, match=r"further shares '\.\.', a bundle that shares '\.\.' in turn"):
        MotionBundle.from_pretrained(folder / "further")


def test_a_shared_bundle_with_code_is_refused(folder):
    (folder.parent / "model.py").write_text("")
    with pytest.raises(ValueError, match=r"files that can run code \(model\.py\)"):
        MotionBundle.from_pretrained(folder)


# Saving


def test_in_its_own_folder_only_its_own_is_written(folder):
    before, whole = contents(folder), contents(folder.parent)
    assert sorted(before) == ["README.md", "config.json", "motion_injection.safetensors"]
    assert "come from another bundle: `..`" in (folder / "README.md").read_text()
    bundle = MotionBundle.from_pretrained(folder)
    _ = bundle.unconditional_tokens, bundle.cama
    bundle.save_pretrained(folder.parent / "control" / ".")
    assert contents(folder) == before
    assert contents(folder.parent) == whole
    assert names(folder) == sorted(before)


def test_elsewhere_it_stands_alone(folder, tmp_path):
    original = MotionBundle.from_pretrained(folder)
    original.save_pretrained(tmp_path / "copy")
    expected = {name: original.part_fingerprint(name) for name in original.config.parts}
    tokens = original.unconditional_tokens
    shutil.rmtree(folder.parent)
    copy = MotionBundle.from_pretrained(tmp_path / "copy")
    assert copy.shared is None
    assert copy.config == replace(original.config, shared=None, licence="MIT and Apache-2.0")
    assert {name: copy.part_fingerprint(name) for name in copy.config.parts} == expected
    assert torch.equal(copy.unconditional_tokens, tokens)
    assert Path(copy.path_or_id("image_encoder"), "config.json").read_text() == '{"width": 6}'
    assert "another bundle" not in (tmp_path / "copy" / "README.md").read_text()


def test_training_writes_its_own_part_back_and_goes_on_sharing(folder):
    from motionrag.training.diffusion import save_parts

    whole, bundle = contents(folder.parent), MotionBundle.from_pretrained(folder)
    with torch.no_grad():
        next(bundle.motion_injection.parameters()).add_(1)
    save_parts(bundle, folder, motion_injection=bundle.motion_injection)
    again = MotionBundle.from_pretrained(folder)
    assert again.own_config == dependent().config
    assert again.part_fingerprint("motion_injection") != dependent().part_fingerprint("motion_injection")
    assert names(folder) == ["README.md", "config.json", "motion_injection.safetensors"]
    assert contents(folder.parent) == whole


def test_a_shared_part_that_was_trained_becomes_its_own(folder):
    from motionrag.training.diffusion import save_parts

    bundle = MotionBundle.from_pretrained(folder)
    cama = CAMA(**PARTS["cama"])
    save_parts(bundle, folder, cama=cama)
    again = MotionBundle.from_pretrained(folder)
    assert sorted(again.own_config.parts) == ["cama", "motion_injection"]
    assert torch.equal(again.cama.sos_token, cama.sos_token)
    assert MotionBundle.from_pretrained(folder.parent).part_fingerprint("cama") == make().part_fingerprint("cama")


# The second pocket


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """The second pocket as training finds it, inside a copy of the first."""
    folder = tmp_path_factory.mktemp("weights") / "weights"
    shutil.copytree(resolve("pocket"), folder, ignore=shutil.ignore_patterns("control"))
    initialise_control(folder / "control")
    return folder / "control"


@pytest.mark.parametrize("what", ["motion_tokens", "context_tokens", "motion", "text", "image"])
def test_fingerprints_are_those_of_the_first_pocket(control, what):
    assert MotionEncoder.from_pretrained(control).fingerprint(what) == MotionEncoder.from_pretrained(
        "pocket"
    ).fingerprint(what)


def test_a_database_of_one_pocket_opens_with_the_other(control, tmp_path):
    write_clips(tmp_path / "clips", [(f"clip-{n}", sample_clip(domain(n), n, truth=False)) for n in range(3)])
    first, second = MotionEncoder.from_pretrained("pocket"), MotionEncoder.from_pretrained(control)
    frame = np.full((64, 64, 3), 40, np.uint8)
    for number, (maker, reader) in enumerate([(first, second), (second, first)]):
        database = MotionDatabase.create(tmp_path / f"db{number}", encoder=maker)
        database.add(tmp_path / "clips")
        found = MotionDatabase(database.path, encoder=reader).search(image=frame, k=3)
        assert len(found) == 3


def test_its_name_is_a_folder_in_the_first():
    assert resolve("pocket-control") == resolve("pocket") / "control"


def test_the_name_is_not_made_a_path(tmp_path, monkeypatch):
    """A database writes it down, and is opened from anywhere."""
    from motionrag.encoder import _lasting

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket-control").mkdir()
    assert _lasting("pocket-control") == "pocket-control"


# Packing


def by_hand(value):
    """The nearest number with 3 bits behind the point and exponents from -6 on, halves to even."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(value))), -6) - 3)
    return round(value / step) * step


@pytest.fixture(scope="module")
def packed(control, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    shutil.copytree(control.parent, folder / "weights", ignore=shutil.ignore_patterns("control"))
    pack(control, folder / "weights" / "control")
    return folder / "weights" / "control"


def test_a_bundle_that_shares_is_packed_without_what_it_shares(packed, control):
    assert names(packed) == [
        "README.md",
        "backbone",
        "config.json",
        "feature_modulation.safetensors",
        "motion_injection.safetensors",
    ]
    content, before = (json.loads((folder / "config.json").read_text()) for folder in (packed, control))
    assert content == {**before, "trained": True}
    assert (content["shared"], content["encoders"]) == ("..", {})
    assert {value.dtype for value in load_file(packed / "motion_injection.safetensors").values()} == {torch.float16}


def test_matrices_of_the_denoiser_are_rounded_to_8_bits(packed, control):
    file = "backbone/unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(control / file), load_file(packed / file)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if value.ndim < 2:
            assert torch.equal(after[key], value.half()), key
            continue
        assert after[key].dtype == torch.float8_e4m3fn
        some = value.half().flatten()[:50].tolist()
        assert after[key].float().flatten()[:50].tolist() == [by_hand(each) for each in some], key
    with safe_open(packed / file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    for other in ("vae/diffusion_pytorch_model", "image_encoder/model"):
        state = load_file(packed / "backbone" / f"{other}.safetensors")
        assert torch.float8_e4m3fn not in {value.dtype for value in state.values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize("which", ["transformer", "unet"])
def test_diffusers_casts_8_bits_back(request, tmp_path, which, dtype):
    """By the class of the model, by the pipeline, and by what training loads."""
    import diffusers

    from motionrag.training.encoded import load_pipeline

    base = tmp_path / "base"
    source = (
        resolve("pocket") / "backbone" if which == "transformer" else request.getfixturevalue("packed") / "backbone"
    )
    shutil.copytree(source, base)
    file = base / which / "diffusion_pytorch_model.safetensors"
    store_in_8_bits(file)  # changes nothing where they are 8 bits already
    expected = load_file(file)
    assert torch.float8_e4m3fn in {value.dtype for value in expected.values()}
    options = {} if dtype is None else {"dtype": dtype}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base, **options)
    denoisers = [
        getattr(pipeline, which),
        type(getattr(pipeline, which)).from_pretrained(base, subfolder=which, **options),
        getattr(load_pipeline(str(base), frozen=False, **options)[1], which),
    ]
    for denoiser in denoisers:
        state = denoiser.state_dict()
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            if dtype is not None or value.dtype == torch.float8_e4m3fn:
                assert state[key].dtype in (dtype or torch.float32, torch.float64), key
            assert torch.equal(state[key].float(), value.to(dtype or torch.float32).float()), key


def test_packing_in_32_bits_gives_the_shipped_values_to_train_on(packed, tmp_path):
    shutil.copytree(packed.parent, tmp_path / "weights", ignore=shutil.ignore_patterns("control"))
    pack(packed, tmp_path / "weights" / "control", dtype=torch.float32)
    file = "backbone/unet/diffusion_pytorch_model.safetensors"
    shipped, unpacked = load_file(packed / file), load_file(tmp_path / "weights" / "control" / file)
    assert {value.dtype for value in unpacked.values()} == {torch.float32}
    assert all(torch.equal(unpacked[key], value.float()) for key, value in shipped.items())


@pytest.mark.parametrize("value", [448.5, -449.0, math.inf, math.nan])
def test_what_8_bits_cannot_hold_is_refused(tmp_path, value):
    file = tmp_path / "model.safetensors"
    save_file({"fits.weight": torch.full((2, 2), -448.0), "bias": torch.full((2,), 500.0)}, file)
    store_in_8_bits(file)
    assert load_file(file)["fits.weight"].float().tolist() == [[-448.0] * 2] * 2
    save_file({"fits.weight": torch.ones(2, 2), "large.weight": torch.tensor([[1.0, value]])}, file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"values above 448, too large for float8: large\.weight\.$"):
        store_in_8_bits(file)
    assert file.read_bytes() == before
    assert names(tmp_path) == ["model.safetensors"]


def test_all_bundles_of_the_package_count_for_the_size(tmp_path):
    (tmp_path / "control").mkdir()
    (tmp_path / "a").write_bytes(bytes(24_000_000))
    (tmp_path / "control" / "b").write_bytes(bytes(1_000_000))
    check_size(tmp_path)
    (tmp_path / "control" / "c").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"holds 25\.0 MB, more than the 25 MB that ship"):
        check_size(tmp_path)
