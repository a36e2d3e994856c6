"""Each metric on clips whose figure is known."""

import numpy as np
import pytest
import torch

from motionrag.evaluation.appearance import appearance
from motionrag.evaluation.diversity import diversity
from motionrag.evaluation.family_accuracy import FAMILY_NAMES, guess_families, track_features, train_classifier
from motionrag.evaluation.intervals import interval
from motionrag.evaluation.reconstruction import reconstruct
from motionrag.evaluation.track_error import position_errors
from motionrag.pocket.world import Scene, domain, sample_clip
from motionrag.pocket.world.scene import COLOURS
from tests.evaluation.clips import true_clips


def test_track_error_is_the_root_of_the_mean_square_in_percent_without_frame_zero():
    truth = torch.zeros(1, 2, 3, 2)
    truth[0, 1] = torch.nan  # no second thing
    positions = truth.clone()
    positions[0, 0, 0] = 1000
    positions[0, 0, 1] = torch.tensor([3.0, 4.0])
    assert position_errors(positions, truth, 50).item() == pytest.approx(100 / 50 * (25 / 2) ** 0.5)


def test_diversity_is_the_mean_over_pairs_of_seeds():
    positions = torch.zeros(3, 1, 1, 5, 2)
    positions[2, ..., 0] = 6.4
    assert diversity(positions, 64).item() == pytest.approx(2 / 3 * 10)
    with pytest.raises(ValueError, match="1 seed"):
        diversity(positions[:1], 64)


def looks(clips, frames):
    return appearance(frames, clips.frames[:, 0], clips.track(frames), clips.tracks, clips.masks)


def test_a_true_clip_keeps_its_looks():
    clips = true_clips("drift", "orbit", "grow", count=3)
    kept = looks(clips, clips.frames)
    assert kept.psnr.min() > 60
    assert kept.colour_kept.mean() > 0.95
    assert kept.shape_kept.mean() > 0.8


def test_psnr_is_that_of_frame_zero_alone():
    clips = true_clips("drift", count=1)
    frames = clips.frames.clone()
    frames[:, 1:] = 0
    assert looks(clips, frames).psnr.item() > 60
    frames[:, 0] = (frames[:, 0].int() + 10).clamp(0, 255).byte()
    assert looks(clips, frames).psnr.item() == pytest.approx(20 * np.log10(255 / 10), abs=0.5)


def test_a_thing_that_changes_its_colour_loses_colour_and_shape():
    clips = true_clips("drift", count=1)
    [name] = [each for number, each in enumerate(COLOURS) if number == clips.colours[0, 0]]
    other = COLOURS["green" if name != "green" else "red"]
    frames = clips.frames.clone()
    frames[clips.masks > 0] = torch.tensor(other, dtype=torch.uint8)
    frames[:, 0] = clips.frames[:, 0]
    kept = looks(clips, frames)
    assert kept.colour_kept.item() < 0.2
    assert kept.shape_kept.item() < 0.2


def test_shape_is_compared_where_the_thing_is_and_not_where_it_should_be():
    clips = true_clips("drift", count=2)
    still = clips.frames[:, :1].expand_as(clips.frames)
    assert looks(clips, still).shape_kept.mean() > 0.75


def test_another_shape_of_the_same_colour_is_noticed():
    made = domain(3, family="drift")
    ball, cross = (true_clip_with(made, shape) for shape in ("ball", "cross"))
    same, changed = (
        appearance(frames, ball.frames[:, 0], ball.track(frames), ball.tracks, ball.masks).shape_kept.item()
        for frames in (ball.frames, cross.frames)
    )
    assert same - changed > 0.15


def true_clip_with(made, shape):
    from dataclasses import replace

    from motionrag.evaluation.material import TrueClips

    style = replace(made.style, shapes=(shape,), colours=("red", "blue", "green", "pink"), textures=("flat",))
    return TrueClips.of([sample_clip(replace(made, style=style), 4, truth=False)])


FEW = ("fall", "orbit", "grow", "slide")


@pytest.fixture(scope="module")
def judge_material():
    clips = true_clips(*FEW, count=12)
    families = torch.tensor([FAMILY_NAMES.index(family) for family in clips.families])
    return clips, clips.track(clips.frames), families


@pytest.mark.slow
def test_the_judge_learns_families_and_is_the_same_for_a_seed(judge_material):
    clips, tracked, families = judge_material
    features = track_features(tracked)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = train_classifier(features, families, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    again = train_classifier(features, families, seed=1)
    assert torch.equal(first(features), again(features))
    assert guess_families(first, tracked) == clips.families


def test_the_judge_sees_no_place_of_things_that_are_not_there(judge_material):
    _, tracked, _ = judge_material
    features = track_features(tracked)
    assert features.isfinite().all()
    width = features.shape[1] // 3
    assert (features[:, width:] == 0).all()


def test_intervals_hold_the_figure_and_narrow_with_more_queries():
    values = np.random.default_rng(0).normal(10, 2, 400)
    figure, low, high = interval(values)
    assert figure == pytest.approx(values.mean())
    assert low < figure < high
    assert high - low == pytest.approx(4 * 2 / 400**0.5, rel=0.2)
    _, low, high = interval(values[:40])
    assert high - low > 2 * (4 * 2 / 400**0.5)


def test_intervals_of_a_ratio_are_paired():
    plain = np.random.default_rng(0).normal(10, 4, 50)
    figure, low, high = interval(plain, 0.5 * plain, figure=lambda before, after: 1 - after / before)
    assert (figure, low, high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_perfect_autoencoder_gives_the_clip_back():
    class Latents:
        def __init__(self, video):
            self.latent_dist, self.video, self.sample = self, video, video

        def mode(self):
            return self.video

    class Perfect:
        device, dtype = "cpu", torch.float32
        encode = staticmethod(Latents)
        decode = staticmethod(Latents)

    class Pipeline:
        vae = Perfect()

    frames = torch.randint(0, 256, (9, 17, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(reconstruct(Pipeline(), frames), frames)


def test_scenes_are_drawn_as_the_metrics_assume():
    """The tracker tells things apart by colour, so no two things of a scene may share one."""
    made = domain(1, family="swarm")
    for seed in range(20):
        scene = Scene.sample(np.random.default_rng(seed), made.style, 3)
        assert len({thing.colour for thing in scene.things}) == 3
