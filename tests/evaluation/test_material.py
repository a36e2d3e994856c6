"""The material: domains that nobody trained on, and pairs of truths for the swap."""

import numpy as np
import pytest

from motionrag.evaluation import material
from motionrag.evaluation.material import COLUMNS
from motionrag.evaluation.swap import FREE_FAMILIES, swap_pairs
from motionrag.pocket.world import FAMILIES, HELD_OUT_FAMILIES, SIZE, TRAINED_FAMILIES, training_clip
from motionrag.pocket.world.dynamics import HELD_OUT_FROM


def domains(name, count):
    return material._domains(COLUMNS.index(name), count)


def first_share(made):
    return next(iter(made.dynamics.normalised.values()))


@pytest.mark.parametrize(
    ("name", "families", "is_upper"),
    [("seen", TRAINED_FAMILIES, False), ("held-out-parameters", TRAINED_FAMILIES, True)],
)
def test_columns_of_trained_families_differ_in_the_range_of_the_first_parameter(name, families, is_upper):
    made = domains(name, len(families))
    assert {each.dynamics.family for each in made} == set(families)
    assert all((first_share(each) >= HELD_OUT_FROM) == is_upper for each in made)


def test_the_third_column_holds_the_held_out_families_alone():
    assert {each.dynamics.family for each in domains("held-out-families", 4)} == set(HELD_OUT_FAMILIES)


def test_every_domain_of_a_column_has_a_verb_of_its_own():
    made = domains("seen", 300)
    assert len({each.verb for each in made}) == 300


def test_a_domain_stays_the_same_when_more_are_drawn():
    assert domains("seen", 9) == domains("seen", 20)[:9]


def test_no_query_is_a_training_clip():
    queries = material.TrueClips.of(
        [
            material.sample_clip(each, (material.SEED, 0, index, 1, 0), truth=False)
            for index, each in enumerate(domains("seen", 4))
        ]
    )
    trained = [training_clip(seed, index) for seed in (1, 2) for index in range(4)]
    for clip in trained:
        assert not any(np.array_equal(clip.frames, query) for query in queries.frames.numpy())


@pytest.fixture(scope="module")
def pairs():
    return swap_pairs(6)


def test_a_pair_shows_one_scene_from_one_start_under_two_dynamics(pairs):
    for pair in pairs:
        first, other = pair.truths
        assert np.array_equal(first.frames[0], other.frames[0])
        assert first.caption == other.caption
        assert first.family != other.family
        assert {first.family, other.family} <= set(FREE_FAMILIES)
        distance = np.linalg.norm(first.tracks - other.tracks, axis=-1)
        assert distance[0, 0] == pytest.approx(0)
        assert distance.max() > 0.1 * SIZE


def test_the_databases_of_a_pair_differ_in_motion_alone(pairs):
    for pair in pairs:
        one, other = pair.domains
        assert (one.verb, one.style) == (other.verb, other.style)
        assert one.dynamics != other.dynamics


def test_both_truths_stay_in_the_frame(pairs):
    for pair in pairs:
        for truth in pair.truths:
            assert truth.visible.all()
            assert truth.tracks.min() > 0
            assert truth.tracks.max() < SIZE


def test_swapped_families_move_the_same_wherever_they_start():
    for family in FREE_FAMILIES:
        dynamics = material.domain(1, family=family).dynamics
        paths = [dynamics.move(np.random.default_rng(seed), np.array([7.0])).positions for seed in (1, 2)]
        one, other = (path - path[:, :1] for path in paths)
        assert np.allclose(one, other)
        assert FAMILIES[family].num_things == 1
