"""Batches in an order that continues, what is encoded once, and references that are never of the same video."""

import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from motionrag.database import MotionDatabase
from motionrag.database.database import FingerprintMismatch
from motionrag.encoder import MotionEncoder
from motionrag.training import (
    AdaptationTraining,
    DatabaseReferences,
    EncodedClips,
    JointTraining,
    ReferencedClips,
    RetrievedReferences,
)
from motionrag.training.adaptation import nearest
from motionrag.training.data import ClipDataModule, ShuffledBatches
from tests.training.parts import Squares
from tests.video_files import make_video

# Order


def flat(batches, count):
    return [index for batch in islice(batches, count) for index in batch]


def test_every_sample_comes_once_in_an_epoch_and_epochs_differ():
    batches = iter(ShuffledBatches(12, 3, seed=1))
    first, second = flat(batches, 4), flat(batches, 4)
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert first == flat(iter(ShuffledBatches(12, 3, seed=1)), 4)
    assert first != flat(iter(ShuffledBatches(12, 3, seed=7)), 4)


def test_devices_share_an_epoch():
    ranks = [flat(iter(ShuffledBatches(12, 2, seed=1, rank=rank, world_size=3)), 2) for rank in range(3)]
    assert sorted(index for rank in ranks for index in rank) == list(range(12))


@pytest.mark.parametrize("skip", [1, 4, 5, 11])
def test_skipped_batches_are_those_that_came_before(skip):
    whole = flat(iter(ShuffledBatches(13, 3, seed=1)), skip + 6)
    assert flat(iter(ShuffledBatches(13, 3, seed=1, skip=skip)), 6) == whole[3 * skip :]


def test_fewer_samples_than_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"7 samples, fewer than one batch of 4 on each of 2 devices; lower"):
        ShuffledBatches(7, 4, seed=0, world_size=2)


def test_a_restored_position_is_where_the_loader_goes_on():
    data = ClipDataModule(Squares(8), batch_size=2, seed=3)
    videos = [batch["video"] for batch in islice(data.train_dataloader(), 7)]
    restored = ClipDataModule(Squares(8), batch_size=2, seed=3)
    restored.load_state_dict({"used_batches": 5})
    assert restored.state_dict() == {"used_batches": 5}
    for expected, batch in zip(videos[5:], restored.train_dataloader(), strict=False):
        assert torch.equal(batch["video"], expected)


# What is encoded once


def encoded(bundle, cache, features=("motion_features",), count=4, **options):
    return EncodedClips(
        Squares(count),
        folder=str(cache),
        bundle=str(bundle),
        features=list(features),
        precision="float32",
        **options,
    )


def reads(make):
    before = Squares.reads
    made = make()
    return made, Squares.reads - before


def test_clips_are_encoded_once_for_the_same_weights(bundle, tmp_path):
    first, count = reads(lambda: encoded(bundle, tmp_path / "cache"))
    assert count == 4
    again, count = reads(lambda: encoded(shutil.copytree(bundle, tmp_path / "elsewhere"), tmp_path / "cache"))
    assert count == 0
    assert torch.equal(first[2]["motion_features"], again[2]["motion_features"])


def test_other_weights_or_other_clips_are_encoded_anew(bundle, tmp_path):
    from motionrag.bundle import MotionBundle
    from motionrag.training.diffusion import save_parts

    encoded(bundle, tmp_path / "cache", ["motion_tokens"])
    opened = MotionBundle.from_pretrained(bundle)
    resampler = opened.motion_resampler
    with torch.no_grad():
        next(resampler.parameters()).add_(1)
    save_parts(opened, bundle, motion_resampler=resampler)
    assert reads(lambda: encoded(bundle, tmp_path / "cache", ["motion_tokens"]))[1] == 4
    assert reads(lambda: encoded(bundle, tmp_path / "cache", ["motion_tokens"], count=6))[1] == 6
    assert reads(lambda: encoded(bundle, tmp_path / "cache", ["motion_tokens"]))[1] == 0


def test_an_interrupted_encoding_is_done_again(bundle, tmp_path):
    whole = encoded(bundle, tmp_path / "cache")[3]["motion_features"]
    [done] = (tmp_path / "cache").rglob("done.json")
    done.unlink()
    with (done.parent / "motion_features.npy").open("r+b") as file:
        file.truncate(200)
    again, count = reads(lambda: encoded(bundle, tmp_path / "cache"))
    assert count == 4
    assert torch.equal(again[3]["motion_features"], whole)


def test_what_is_stored_is_what_the_encoders_give(bundle, tmp_path):
    clips = encoded(
        bundle, tmp_path / "cache", ["motion_tokens", "context_features"], pipeline=str(bundle / "backbone")
    )
    encoder = MotionEncoder.from_pretrained(bundle)
    video = Squares(4).videos[3]
    expected = encoder.encode_motion([video[[0, 1, 3, 4]]])[0]  # 4 of 5 frames, halves to even
    torch.testing.assert_close(clips[3]["motion_tokens"], expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(clips[3]["context_features"], encoder.image_encoder(video[:1])[0], rtol=2e-3, atol=2e-3)
    assert clips[0]["latents"].shape[0] == 5


def test_features_need_a_bundle(tmp_path):
    with pytest.raises(ValueError, match="name both or neither"):
        EncodedClips(Squares(2), folder=str(tmp_path), features=["motion_tokens"])


# References


def test_references_are_the_most_similar_of_other_videos():
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(40, 6)).astype(np.float32)
    embeddings[1::2] = embeddings[::2]  # a clip's own video holds the very nearest
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    sources = [str(clip // 4) for clip in range(40)]
    found = nearest(embeddings, sources, 5)
    similarity = embeddings @ embeddings.T
    for clip, row in enumerate(found):
        others = [other for other in range(40) if other // 4 != clip // 4]
        best = sorted(similarity[clip, others], reverse=True)[:5]
        np.testing.assert_allclose(similarity[clip, row], best, rtol=1e-5)
        assert not {other // 4 for other in row} & {clip // 4}


def test_too_few_other_videos_are_an_error():
    embeddings = np.eye(4, dtype=np.float32)
    with pytest.raises(ValueError, match="4 clips are too few for 3 references of other source videos each"):
        nearest(embeddings, ["a", "a", "b", "c"], 3)
    with pytest.raises(ValueError, match="0 clips are too few"):
        nearest(embeddings[:0], [], 1)


def test_the_best_reference_stands_before_the_clip_itself(bundle, tmp_path):
    clips = encoded(bundle, tmp_path / "cache", ["motion_tokens", "context_features"], count=8)
    references = RetrievedReferences(clips, str(bundle), num_references=3)
    sample, row = references[2], references.neighbours[2]
    for name in ("motion_tokens", "context_features"):
        expected = torch.stack([clips[index][name] for index in (*row[::-1], 2)])
        assert torch.equal(sample[name], expected)


def test_cama_is_not_told_the_motion_that_it_shall_predict(bundle, tmp_path):
    clips = encoded(bundle, tmp_path / "cache", ["motion_tokens", "context_features"], count=8)
    references = RetrievedReferences(clips, str(bundle), num_references=3)
    batch = default_collate([references[0], references[5]])
    module = AdaptationTraining(str(bundle))
    told = {**batch, "motion_tokens": batch["motion_tokens"].clone()}
    told["motion_tokens"][:, -1] += 5
    with torch.no_grad():
        assert torch.equal(module(batch), module(told))


# From a database


@pytest.fixture(scope="module")
def database(made_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    lines = ["file,caption,source"]
    for number in range(8):
        make_video(folder / f"{number}.mp4", num_frames=6, size=(32, 32), seed=number)
        lines.append(f"{number}.mp4,{'' if number == 7 else 'a ball blicks'},{number // 2}")
    (folder / "captions.csv").write_text("\n".join(lines))
    path = tmp_path_factory.mktemp("db") / "db"
    made = MotionDatabase.create(path, encoder=MotionEncoder.from_pretrained(made_bundle))
    made.add(folder, captions=folder / "captions.csv", num_workers=1)
    return path


def test_stage_2_learns_from_the_tokens_of_a_database(database, bundle):
    references = DatabaseReferences(str(database), bundle=str(bundle), num_references=4)
    assert len(references) == 7  # the clip without a caption is found by nobody
    rows = references.table.scan(["id", "source"]).to_pylist()
    source = {row["id"]: row["source"] for row in rows}
    for clip, neighbours in enumerate(references.neighbours):
        assert source[references.ids[clip]] not in {source[references.ids[other]] for other in neighbours}
    opened = MotionDatabase(database)
    uri = {row["id"]: row["uri"] for row in references.table.scan(["id", "uri"]).to_pylist()}
    found = opened.search(text="a ball blicks", k=7)
    stored = {each.id: each for each in found}
    sample = references[3]
    order = [references.ids[row] for row in (*references.neighbours[3][::-1], 3)]
    assert uri.keys() >= set(order)
    assert torch.equal(sample["motion_tokens"], torch.stack([stored[id_].motion_tokens for id_ in order]))
    assert torch.equal(sample["context_tokens"], torch.stack([stored[id_].context_tokens for id_ in order]))

    module = AdaptationTraining(str(bundle), train_context=False)
    batch = default_collate([references[0], references[1]])
    module.log = lambda *_, **__: None
    module.training_step(batch, 0).backward()
    assert all(parameter.grad is not None for parameter in module.cama.parameters())
    assert not any(parameter.requires_grad for parameter in module.resampler.parameters())
    with pytest.raises(ValueError, match="set train_context to false"):
        AdaptationTraining(str(bundle))(batch)


def test_a_database_of_another_bundle_is_refused(database, bundle):
    from motionrag.bundle import MotionBundle
    from motionrag.training.diffusion import save_parts

    opened = MotionBundle.from_pretrained(bundle)
    with torch.no_grad():
        next(opened.context_resampler.parameters()).add_(1)
    save_parts(opened, bundle, context_resampler=opened.context_resampler)
    with pytest.raises(FingerprintMismatch, match="context tokens"):
        DatabaseReferences(str(database), bundle=str(bundle))


# Stage 3


def test_joint_training_reaches_every_trained_part(bundle, tmp_path, monkeypatch):
    clips = encoded(
        bundle,
        tmp_path / "cache",
        ["motion_features", "context_features"],
        count=8,
        pipeline=str(bundle / "backbone"),
    )
    references = ReferencedClips(clips, str(bundle), num_references=3)
    batch = default_collate([references[0], references[1]])
    assert batch["motion_features"].shape[1] == 3
    assert batch["context_features"].shape[1] == 4
    assert torch.equal(batch["context_features"][0, -1], clips[0]["context_features"])
    monkeypatch.setattr(JointTraining, "batches", 0, raising=False)
    module = JointTraining(str(bundle), token_dropout=0.0)
    assert module.hparams["learning_rate"] == 5e-5
    module.log = lambda *_, **__: None
    module.training_step(batch, 0).backward()
    parts = {
        name.split(".")[0] for name, each in module.named_parameters() if each.grad is not None and each.grad.any()
    }
    assert parts == {"injection", "resampler", "cama", "context_resampler"}
    assert all(each.grad is None for each in module.denoiser.parameters())
    dropped = module.motion_tokens(batch, torch.tensor([True, False]))
    assert torch.equal(dropped[1], module.motion_tokens(batch)[1])
    torch.testing.assert_close(dropped[0], module.resampler(batch["grey_features"][:1])[0])
