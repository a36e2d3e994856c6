"""The evaluation's course: what each row injects, that noise is shared, and that a stopped run continues."""

import json

import numpy as np
import pytest
import torch

from motionrag import MotionRAGPipeline
from motionrag.adapters import InjectedEffect
from motionrag.encoders.preprocessing import frames_to_tensor
from motionrag.evaluation import Sizes, evaluate_pocket
from motionrag.evaluation.material import SEED
from motionrag.evaluation.pocket import Condition
from motionrag.output import MotionRAGOutput
from motionrag.pocket.world import NUM_FRAMES

SMALL = Sizes(domains=2, queries=2, seeds=2, side_queries=2, side_seeds=1, swap_pairs=1, judge_clips=1, batch_size=3)


@pytest.fixture(scope="module")
def pipe():
    return MotionRAGPipeline.from_pretrained("pocket")


@pytest.fixture
def calls(monkeypatch):
    """Generation is replaced by still pictures; what was asked for is written down."""
    made = []

    def generate(self, images, prompts, **options):
        made.append({"prompts": prompts, "database": self.database, **options})
        still = np.stack([np.repeat(np.asarray(image, np.float32)[None] / 255, NUM_FRAMES, 0) for image in images])
        searches = options.get("num_references") != 0 and "motion_tokens" not in options
        weights = options.get("retrieval_weights", {"text": 1.0})
        found = [
            self.database.search(
                text=prompt if "text" in weights else None,
                image=image if "image" in weights else None,
                k=options.get("num_references", 9),
                exclude=options.get("exclude", ()),
            )
            if searches
            else []
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return MotionRAGOutput(still, found, [False] * len(images), InjectedEffect(0.0, {}), None, 8)

    monkeypatch.setattr(MotionRAGPipeline, "__call__", generate)
    return made


@pytest.fixture(autouse=True)
def no_judge(monkeypatch):
    """A judge of a few steps, and an autoencoder that is not asked: neither is what is tested here."""
    monkeypatch.setattr("motionrag.evaluation.family_accuracy._STEPS", 5)
    monkeypatch.setattr("motionrag.evaluation.pocket.reconstruct", lambda pipeline, frames: frames)


def noises(call):
    return [generator.initial_seed() for generator in call["generator"]]


def test_rows_share_images_and_noise_and_differ_in_what_is_injected(pipe, calls, tmp_path):
    report = evaluate_pocket(pipe, out=tmp_path, sizes=SMALL, columns=["seen"], num_inference_steps=3)
    assert all(call["num_inference_steps"] == 3 for call in calls)
    assert not any("guidance_scale" in call for call in calls)
    # The bundle's, and recorded, so that results of another are not mixed in.
    assert {call["motion_guidance_scale"] for call in calls} == {4.0}
    assert json.loads((tmp_path / "settings.json").read_text())["options"]["motion_guidance_scale"] == 4.0
    main = calls[: 5 * 2 * 2]  # rows, seeds, batches of 3 and 1
    rows = [main[4 * number : 4 * number + 4] for number in range(5)]
    plain, top, mean, cama, ceiling = rows
    for row in rows:
        assert [call["prompts"] for call in row] == [call["prompts"] for call in plain]
        assert [noises(call) for call in row] == [noises(call) for call in plain]
    assert noises(plain[0]) + noises(plain[1]) != noises(plain[2]) + noises(plain[3])
    assert all(call["num_references"] == 0 for call in plain)
    assert all("motion_tokens" not in call and call["num_references"] == 9 for call in cama)

    hits = cama[0]["database"].search(text=cama[0]["prompts"][0], k=9)
    assert torch.equal(top[0]["motion_tokens"][0], hits[0].motion_tokens)
    expected = torch.stack([hit.motion_tokens for hit in hits]).mean(0)
    assert torch.allclose(mean[0]["motion_tokens"][0], expected)
    from motionrag.evaluation.material import _domains, sample_clip

    clip = sample_clip(_domains(0, 1)[0], (SEED, 0, 0, 1, 0), truth=False)
    kept = np.linspace(0, 16, 16).round().astype(int)
    [tokens] = pipe.encoder.encode_motion([frames_to_tensor(clip.frames[kept])])
    assert torch.allclose(ceiling[0]["motion_tokens"][0], tokens, atol=1e-4)

    # Retrieval by the made-up verb finds the right domain, unless its clips are left out.
    main_rows, side = report.summary["main"]["seen"], report.summary["side"]["seen"]
    assert main_rows["d-k9-text-wrong0"]["precision"] > 0.8
    assert side["d-k9-text-wrong100"]["precision"] == 0
    assert side["d-k9-text-wrong50"]["precision"] == pytest.approx(5 / 9, abs=0.01)
    assert set(side) == {
        "d-k1-text-wrong0",
        "d-k3-text-wrong0",
        "d-k9-image-wrong0",
        "d-k9-text+image-wrong0",
        "d-k9-text-wrong50",
        "d-k9-text-wrong100",
    }
    # Still pictures: every row has the error of standing still, and nothing is gained.
    still = report.summary["checks"]["still_error"]["seen"]
    for row in main_rows.values():
        assert row["track_error"][0] == pytest.approx(still, abs=0.5)
        assert row["diversity"] == pytest.approx(0)
    swap = report.summary["swap"]
    assert (swap["clips"], swap["pairs"]) == (4, 1)
    assert (tmp_path / "swap.png").exists()

    # The same call again generates nothing, a lost file alone is made again.
    done = len(calls)
    again = evaluate_pocket(pipe, out=tmp_path, sizes=SMALL, columns=["seen"], num_inference_steps=3)
    assert len(calls) == done
    assert again.summary["main"] == report.summary["main"]
    (tmp_path / "clips" / "seen_e_seed1.csv").unlink()
    evaluate_pocket(pipe, out=tmp_path, sizes=SMALL, columns=["seen"], num_inference_steps=3)
    assert [noises(call) for call in calls[done:]] == [noises(call) for call in ceiling[2:]]

    with pytest.raises(ValueError, match=r"holds figures with options .*; choose another folder"):
        evaluate_pocket(pipe, out=tmp_path, sizes=SMALL, columns=["seen"], num_inference_steps=4)
    assert pipe.database is None


def test_an_unknown_column_is_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="columns are some of"):
        evaluate_pocket(pipe, out=tmp_path, columns=["unseen"])


def test_conditions_have_names_of_their_own():
    assert Condition("a").name == "a"
    assert Condition("d", k=3, by=("text", "image"), wrong=0.5).name == "d-k3-text+image-wrong50"
