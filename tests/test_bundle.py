"""Bundles: round trips, strict reading of every field and tensor, and writing that survives a kill."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from motionrag.adapters import AttentionInjection
from motionrag.bundle import BundleConfig, EncoderSource, MotionBundle, resolve
from motionrag.encoder import MotionEncoder
from motionrag.models import CAMA, Resampler

RESAMPLER = {"input_dim": 6, "dim": 8, "output_dim": 8, "num_queries": 3, "depth": 1, "num_heads": 2, "head_dim": 4}
PARTS = {
    "motion_resampler": RESAMPLER,
    "context_resampler": RESAMPLER,
    "cama": {"dim": 8, "depth": 1, "num_heads": 2, "ff_dim": 8, "num_tokens": 3},
    "motion_injection": {"sites": {"blocks.0.attn.to_out.0": [16, 2]}, "token_dim": 8},
}
CLASSES = {
    "motion_resampler": Resampler,
    "context_resampler": Resampler,
    "cama": CAMA,
    "motion_injection": AttentionInjection,
}


def make(*names, seed=0, unconditional=True):
    torch.manual_seed(seed)
    chosen = {name: PARTS[name] for name in names or PARTS}
    config = BundleConfig(
        backbone="cogvideox",
        base_model="someone/base",
        encoders={"video": EncoderSource("someone/videomae", "CC-BY-NC-4.0"), "clip": EncoderSource("ViT", "MIT", "x")},
        parts=chosen,
        licence="Apache-2.0",
        min_similarity=0.25,
    )
    return MotionBundle(
        config,
        unconditional_tokens=torch.randn(3, 8) if unconditional else None,
        **{name: CLASSES[name](**sizes) for name, sizes in chosen.items()},
    )


@pytest.fixture
def folder(tmp_path):
    make().save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


def edit_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    content.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v != "REMOVE"}))


def edit_tensors(folder, name, change):
    state = load_file(folder / f"{name}.safetensors")
    change(state)
    save_file(state, folder / f"{name}.safetensors")


def names(folder):
    return sorted(file.name for file in folder.iterdir())


# Round trips


def test_save_and_load_give_the_same_bits(folder):
    original, again = make(), MotionBundle.from_pretrained(folder)
    assert again.config == original.config
    for name in PARTS:
        ours, theirs = (getattr(bundle, name).state_dict() for bundle in (original, again))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert original.part_fingerprint(name) == again.part_fingerprint(name)
    assert torch.equal(original.unconditional_tokens, again.unconditional_tokens)


def test_only_json_and_safetensors_are_written(folder):
    expected = [f"{name}.safetensors" for name in (*PARTS, "unconditional_tokens")]
    assert names(folder) == sorted(["README.md", "config.json", *expected])


def test_files_can_be_read_by_whoever_can_read_the_folder(folder):
    """safetensors alone would keep them to their owner."""
    assert len({(folder / file).stat().st_mode for file in names(folder)}) == 1


def test_saving_what_was_loaded_lazily(folder, tmp_path):
    MotionBundle.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    for file in names(folder):
        assert (tmp_path / "copy" / file).read_bytes() == (folder / file).read_bytes()


def test_saving_over_itself(folder):
    before = {file: (folder / file).read_bytes() for file in names(folder)}
    MotionBundle.from_pretrained(folder).save_pretrained(folder)
    assert {file: (folder / file).read_bytes() for file in names(folder)} == before


@pytest.mark.parametrize("kept", [("cama",), ("motion_injection",), ("motion_resampler", "context_resampler")])
def test_a_partial_bundle(tmp_path, kept):
    make(*kept, unconditional=False).save_pretrained(tmp_path / "part")
    bundle = MotionBundle.from_pretrained(tmp_path / "part")
    for name in kept:
        assert isinstance(getattr(bundle, name), CLASSES[name])
    for name in PARTS.keys() - set(kept):
        with pytest.raises(ValueError, match=rf"has no {name}; it has {', '.join(kept)}"):
            getattr(bundle, name)
    with pytest.raises(ValueError, match=r"lacks unconditional_tokens\.safetensors"):
        _ = bundle.unconditional_tokens


def test_a_smaller_bundle_leaves_nothing_of_the_larger_one_it_replaces(folder):
    """Old unconditional tokens would be read with the new parts, and nobody would notice."""
    make("cama", seed=5, unconditional=False).save_pretrained(folder)
    assert names(folder) == ["README.md", "cama.safetensors", "config.json"]


def test_parts_are_read_when_they_are_needed(folder):
    (folder / "cama.safetensors").write_bytes(b"")
    bundle = MotionBundle.from_pretrained(folder)
    assert isinstance(bundle.motion_resampler, Resampler)
    with pytest.raises(ValueError, match=r"cama\.safetensors is damaged"):
        _ = bundle.cama


def test_parts_come_frozen_in_evaluation_mode_and_float32(folder):
    edit_tensors(folder, "cama", lambda state: state.update({k: v.half() for k, v in state.items()}))
    cama = MotionBundle.from_pretrained(folder).cama
    assert not cama.training
    assert all(not weight.requires_grad and weight.dtype == torch.float32 for weight in cama.parameters())


def test_the_fingerprint_follows_weights_and_arguments_but_not_precision(folder):
    before = MotionBundle.from_pretrained(folder).part_fingerprint("motion_resampler")
    bundle = MotionBundle.from_pretrained(folder)
    bundle.motion_resampler.half()
    assert bundle.part_fingerprint("motion_resampler") == before
    assert make(seed=0).part_fingerprint("motion_resampler") == before
    assert make(seed=1).part_fingerprint("motion_resampler") != before
    edit_tensors(folder, "motion_resampler", lambda state: state["queries"][0, 0].add_(1e-3))
    assert MotionBundle.from_pretrained(folder).part_fingerprint("motion_resampler") != before


def test_a_part_that_the_config_does_not_describe_is_refused():
    with pytest.raises(ValueError, match=r"does not describe \['cama'\]"):
        MotionBundle(replace(make().config, parts={}), cama=CAMA(**PARTS["cama"]))


def test_a_described_part_that_is_not_there_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match=r"lacks motion_resampler\.safetensors"):
        MotionBundle(make().config).save_pretrained(tmp_path / "b")
    assert names(tmp_path / "b") == []


def test_info_lists_every_licence(folder):
    info = MotionBundle.from_pretrained(folder).info()
    assert info["licences"] == {
        "bundle": "Apache-2.0",
        "someone/base": "",
        "someone/videomae": "CC-BY-NC-4.0",
        "ViT": "MIT",
    }
    json.dumps(info, allow_nan=False)


# The config


@pytest.mark.parametrize("field", ["backbone", "base_model", "encoders", "parts", "format"])
def test_a_missing_field_is_named(folder, field):
    edit_config(folder, **{field: "REMOVE"})
    with pytest.raises(ValueError, match=rf"config\.json: missing fields: \['{field}'\]; unknown fields: none"):
        MotionBundle.from_pretrained(folder)


def test_unknown_fields_are_named_all_at_once(folder):
    edit_config(folder, trainde=True, colour="red")
    with pytest.raises(ValueError, match=r"unknown fields: \['colour', 'trainde'\]"):
        MotionBundle.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has bundle format 2, this version of motionrag reads 1"),
        ({"parts": {"lora": {}}}, r"unknown parts \['lora'\]; known are"),
        ({"encoders": {"video": {"sauce": "x"}}}, r"describes an encoder wrongly: .*'sauce'"),
        ({"encoders": {"video": {}}}, r"describes an encoder wrongly: .*'source'"),
    ],
)
def test_a_wrong_field_is_named(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        MotionBundle.from_pretrained(folder)


def test_wrong_arguments_of_a_part_are_named(folder):
    edit_config(folder, parts={"cama": {**PARTS["cama"], "dropout": 0.1}})
    with pytest.raises(ValueError, match=r"config\.json describes cama wrongly: .*'dropout'"):
        _ = MotionBundle.from_pretrained(folder).cama


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe", b'{"backbone": '])
def test_a_config_that_is_no_config_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is no (readable )?bundle config"):
        MotionBundle.from_pretrained(folder)


def test_a_folder_without_config_is_no_bundle(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no bundle: it has no config\.json"):
        MotionBundle.from_pretrained(tmp_path)


# The tensors


def test_missing_extra_and_reshaped_tensors_are_listed_together(folder):
    def change(state):
        del state["norm_out.bias"]
        state["surplus"] = torch.zeros(1)
        state["queries"] = torch.zeros(4, 8)

    edit_tensors(folder, "motion_resampler", change)
    with pytest.raises(ValueError, match=r"does not fit Resampler") as caught:
        _ = MotionBundle.from_pretrained(folder).motion_resampler
    message = str(caught.value)
    assert "motion_resampler.safetensors" in message
    assert "missing: ['norm_out.bias']" in message
    assert "unexpected: ['surplus']" in message
    assert "queries (4, 8), expected (3, 8)" in message


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_is_named(folder, poison):
    edit_tensors(folder, "cama", lambda state: state["sos_token"][1, 2].fill_(poison))
    with pytest.raises(ValueError, match=r"cama\.safetensors holds NaN or infinity in sos_token"):
        _ = MotionBundle.from_pretrained(folder).cama


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_named(folder, kept):
    file = folder / "cama.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cama\.safetensors is damaged .*fetch the bundle again"):
        _ = MotionBundle.from_pretrained(folder).cama


def test_a_missing_file_is_named(folder):
    (folder / "cama.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks cama\.safetensors"):
        _ = MotionBundle.from_pretrained(folder).cama


@pytest.mark.parametrize(
    "state",
    [
        {"tokens": torch.zeros(3, 8)},
        {"motion_tokens": torch.zeros(1, 3, 8)},
        {"motion_tokens": torch.full((3, 8), float("nan"))},
        {"motion_tokens": torch.zeros(3, 8), "more": torch.zeros(1)},
    ],
)
def test_malformed_unconditional_tokens_are_refused(folder, state):
    save_file(state, folder / "unconditional_tokens.safetensors")
    with pytest.raises(ValueError, match=r"unconditional_tokens\.safetensors must hold one finite"):
        _ = MotionBundle.from_pretrained(folder).unconditional_tokens


# Strangers


@pytest.mark.parametrize("name", ["a.pkl", "pytorch_model.bin", "x.ckpt", "code.py", "W.PT", "sub/deeper/m.pth"])
def test_files_that_can_run_code_are_refused(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"files that can run code \(.*bundles are safetensors"):
        MotionBundle.from_pretrained(folder)


def test_sources_inside_the_bundle_are_folders_and_all_others_are_ids(folder):
    (folder / "encoders" / "video").mkdir(parents=True)
    bundle = MotionBundle.from_pretrained(folder)
    assert bundle.path_or_id("encoders/video") == str((folder / "encoders" / "video").resolve())
    for outside in ("someone/base", "hf-hub:someone/base", str(folder.parent)):
        assert bundle.path_or_id(outside) == outside
    for nowhere in ("..", "../..", "encoders/../..", "backbone", "encoders/absent/one"):
        with pytest.raises(FileNotFoundError, match="no folder in it and no hub id"):
            bundle.path_or_id(nowhere)


def test_saving_takes_embedded_encoders_and_base_model_along(tmp_path):
    MotionBundle.from_pretrained("pocket").save_pretrained(tmp_path / "copy")
    copy = MotionEncoder.from_pretrained(tmp_path / "copy")
    original = MotionEncoder.from_pretrained("pocket")
    for what in ("motion_tokens", "context_tokens", "text", "image"):
        assert copy.fingerprint(what) == original.fingerprint(what)
    assert (tmp_path / "copy" / "backbone" / "model_index.json").is_file()


@pytest.mark.parametrize("source", ["someone/that-does-not-exist", "./nowhere", "/nowhere/at/all", "a b c"])
def test_a_bundle_that_does_not_exist_is_named(source):
    with pytest.raises(FileNotFoundError, match="is neither 'pocket' nor 'pocket-control', nor a folder, nor a"):
        MotionBundle.from_pretrained(source)


def test_pocket_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket").mkdir()
    assert (resolve("pocket") / "config.json").is_file()
    assert resolve("./pocket").resolve() == tmp_path / "pocket"


# Killed while writing

SAVE_AND_DIE = """
import os, sys
sys.path.insert(0, {root!r})
from tests.test_bundle import make
replace, left = os.replace, [int(sys.argv[2])]
def dying(source, target):
    if left[0] == 0:
        os._exit(9)
    left[0] -= 1
    replace(source, target)
os.replace = dying
make(seed=1).save_pretrained(sys.argv[1])
"""


@pytest.mark.parametrize("renames", [0, 3])
def test_a_kill_while_saving_leaves_whole_files(folder, tmp_path, renames):
    root = os.path.dirname(os.path.dirname(__file__))
    command = [sys.executable, "-c", SAVE_AND_DIE.format(root=root), str(folder), str(renames)]
    assert subprocess.run(command, check=False).returncode == 9
    for name in PARTS:
        state = getattr(MotionBundle.from_pretrained(folder), name).state_dict()
        either = [getattr(make(seed=seed), name).state_dict() for seed in (0, 1)]
        assert any(all(torch.equal(state[key], each[key]) for key in state) for each in either)
    make(seed=1).save_pretrained(folder)
    assert MotionBundle.from_pretrained(folder).part_fingerprint("cama") == make(seed=1).part_fingerprint("cama")


def test_an_error_while_saving_leaves_the_old_bundle(folder):
    before = {file: (folder / file).read_bytes() for file in names(folder)}
    broken = make(seed=1)
    broken.config.parts["cama"]["oops"] = object()  # not JSON
    try:
        with pytest.raises(TypeError):
            broken.save_pretrained(folder)
    finally:
        del broken.config.parts["cama"]["oops"]
    assert {file: (folder / file).read_bytes() for file in names(folder)} == before
