"""The pocket's world: physics, ground truth, and what training never sees."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from motionrag.pocket.world import (
    FAMILIES,
    FPS,
    HELD_OUT_FAMILIES,
    NUM_FRAMES,
    SIZE,
    TRAINED_FAMILIES,
    Dynamics,
    Style,
    domain,
    drag_clip,
    named_domain,
    same_start,
    sample_clip,
    training_clip,
)
from motionrag.pocket.world.dynamics import FLOOR, HELD_OUT_FROM
from motionrag.pocket.world.scene import COLOURS

TIMES = np.arange(NUM_FRAMES) / FPS
SYMMETRIC = Style(shapes=("ball", "box", "ring", "cross"))


@pytest.fixture(scope="module")
def clips():
    """Four clips of every family, symmetric shapes only, with ground truth."""
    return [
        sample_clip(domain((1, number, take), family=family, style=SYMMETRIC), (2, number, take))
        for number, family in enumerate(FAMILIES)
        for take in range(4)
    ]


@pytest.fixture(scope="module")
def many():
    """240 clips as training and evaluation draw them: all families, both parameter ranges, no flow."""
    return [
        sample_clip(
            domain((3, index), family=list(FAMILIES)[index % len(FAMILIES)], held_out_range=index % 5 == 0),
            (4, index),
            truth=False,
        )
        for index in range(240)
    ]


def radii(clip):
    return np.array([each.radius for each in clip.things])


def clips_of(clips, *families):
    return [clip for clip in clips if clip.family in families]


HASHES = """
import hashlib
from motionrag.pocket.world import named_domain, sample_clip, training_clip
for clip in [training_clip(7, 0), training_clip(7, 1), sample_clip(named_domain("blick", family="collide"), 5)]:
    arrays = (clip.frames, clip.tracks, clip.visible, clip.masks, clip.flow, clip.flow_visible)
    print(clip.caption, hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest())
"""


def test_the_same_seed_gives_the_same_clip_in_every_process():
    printed = [
        subprocess.run(
            [sys.executable, "-c", HASHES],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1]
    assert len(set(printed[0].split("\n"))) == 4  # three clips and the end


def test_another_seed_gives_another_clip_of_the_same_motion():
    blick = named_domain("blick")
    first, second = sample_clip(blick, 0), sample_clip(blick, 1)
    assert first.parameters == second.parameters
    assert (first.frames != second.frames).any()


def test_a_named_domain_means_the_same_to_everybody():
    assert named_domain("Blick") == named_domain("blick")
    assert named_domain("blick").dynamics != named_domain("zeeg").dynamics
    assert named_domain("blick", family="eight").dynamics.family == "eight"
    with pytest.raises(ValueError, match="one word of letters"):
        named_domain("two words")
    with pytest.raises(ValueError, match=r"no motion family 'fly'; there are fall, throw"):
        named_domain("blick", family="fly")


def test_there_are_enough_families_and_what_is_held_out_is_never_trained_on():
    assert len(TRAINED_FAMILIES) >= 16
    assert len(HELD_OUT_FAMILIES) >= 4
    drawn = [domain((11, index)).dynamics for index in range(2000)]
    assert {each.family for each in drawn} == set(TRAINED_FAMILIES)
    for family in TRAINED_FAMILIES:
        first = next(iter(FAMILIES[family].parameters))
        shares = [each.normalised[first] for each in drawn if each.family == family]
        assert 0 <= min(shares) < 0.1
        assert HELD_OUT_FROM - 0.1 < max(shares) <= HELD_OUT_FROM
    assert {training_clip(11, index).family for index in range(40)} <= set(TRAINED_FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_held_out_range_lies_above_the_trained_one(family):
    drawn = [Dynamics.sample(np.random.default_rng(seed), family, held_out_range=True) for seed in range(200)]
    shares = np.array([list(each.normalised.values()) for each in drawn])
    assert shares[:, 0].min() >= HELD_OUT_FROM
    assert shares[:, 0].max() <= 1
    if shares.shape[1] > 1:
        assert shares[:, 1:].min() < 0.1
        assert shares[:, 1:].max() > 0.9


def test_shapes_and_types(clips):
    for clip in clips:
        things = len(clip.things)
        assert clip.frames.shape == (NUM_FRAMES, SIZE, SIZE, 3)
        assert clip.frames.dtype == np.uint8
        assert clip.tracks.shape == (things, NUM_FRAMES, 2)
        assert clip.visible.shape == (things, NUM_FRAMES)
        assert clip.masks.shape == clip.flow_visible.shape == (NUM_FRAMES, SIZE, SIZE)
        assert clip.flow.shape == (NUM_FRAMES, SIZE, SIZE, 2)
        assert clip.masks.max() == things


def test_tracks_are_the_middles_of_the_masks(clips):
    compared = 0
    for clip in clips:
        # What is cut by the edge or hidden in part has its middle elsewhere.
        reach = 1.15 * radii(clip).max()
        for index, track in enumerate(clip.tracks):
            alone = len(clip.things) == 1 or index == len(clip.things) - 1
            for time in np.flatnonzero(clip.visible[index]) if alone else ():
                if track[time].min() > reach and track[time].max() < SIZE - reach:
                    rows, columns = np.nonzero(clip.masks[time] == index + 1)
                    middle = np.array([columns.mean(), rows.mean()]) + 0.5
                    assert np.abs(middle - track[time]).max() < 0.75, (clip.family, time)
                    compared += 1
    assert compared > 700


def test_flow_at_a_thing_follows_its_track_turn_and_size(clips):
    columns, rows = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)
    places = np.stack([columns, rows], axis=-1)
    for clip in clips:
        turn = math.tau * clip.parameters["turns"] if clip.family == "spin" else 0
        stretch = math.exp(clip.parameters["rate"] * TIMES[-1]) if clip.family in ("grow", "zoom") else 1
        change = stretch * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        for index, track in enumerate(clip.tracks):
            mine = clip.masks[0] == index + 1
            expected = track[-1] + (places[mine] - track[0]) @ change.T - places[mine]
            np.testing.assert_allclose(clip.flow[-1, mine], expected, atol=2e-3)


def test_flow_leads_to_the_same_colour(clips):
    columns, rows = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)
    for clip in clips:
        target = np.floor(np.stack([columns, rows], axis=-1) + clip.flow).astype(int)
        for time in (8, 16):
            x, y = target[time][clip.flow_visible[time]].T
            difference = clip.frames[time, y, x].astype(int) - clip.frames[0][clip.flow_visible[time]]
            assert np.abs(difference).mean() < 8, (clip.family, time)
            assert np.median(np.abs(difference)) < 4, (clip.family, time)


def test_flow_visible_is_false_behind_things_and_outside(clips):
    for clip in clips:
        assert clip.flow_visible[0].all()
        if clip.family not in ("pan", "zoom"):
            backdrop = clip.masks[0] == 0
            np.testing.assert_array_equal(clip.flow_visible[:, backdrop], clip.masks[:, backdrop] == 0)
    for clip in clips_of(clips, "pan"):
        columns, rows = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)
        target = np.stack([columns, rows], axis=-1) + clip.flow[-1]
        outside = ((target < 0) | (target >= SIZE)).any(axis=-1)
        assert outside.any()
        assert not clip.flow_visible[-1][outside].any()


def test_panning_moves_the_backdrop_and_the_thing_alike(clips):
    for clip in clips_of(clips, "pan"):
        speed, angle = clip.parameters["speed"], clip.parameters["angle"]
        shift = speed * TIMES[:, None] * [math.cos(angle), math.sin(angle)]
        np.testing.assert_allclose(clip.flow, np.broadcast_to(shift[:, None, None], clip.flow.shape), atol=1e-4)
        np.testing.assert_allclose(clip.tracks[0] - clip.tracks[0, 0], shift, atol=1e-4)


def test_zooming_moves_everything_away_from_the_middle(clips):
    columns, rows = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)
    for clip in clips_of(clips, "zoom"):
        stretch = math.exp(clip.parameters["rate"] * TIMES[-1]) - 1
        expected = (np.stack([columns, rows], axis=-1) - SIZE / 2) * stretch
        np.testing.assert_allclose(clip.flow[-1], expected, atol=1e-3)


def test_falling_is_half_g_t_squared_until_it_lands(clips):
    for clip in clips_of(clips, "fall"):
        [track] = clip.tracks
        expected = track[0, 1] + 0.5 * clip.parameters["gravity"] * TIMES**2
        in_the_air = expected < FLOOR - radii(clip)[0]
        assert in_the_air.sum() > 4
        # The simulation's steps of 1/128 s overshoot by g t / 256.
        np.testing.assert_allclose(track[in_the_air, 1], expected[in_the_air], atol=0.6)
        np.testing.assert_allclose(track[:, 0], track[0, 0], atol=1e-3)
        assert track[:, 1].max() < FLOOR - radii(clip)[0] + 1.5  # nothing sinks into the floor


def test_what_is_thrown_flies_a_parabola(clips):
    for clip in clips_of(clips, "throw"):
        [track], values = clip.tracks, clip.parameters
        rise = track[0, 1] - values["speed_up"] * TIMES + 0.5 * values["gravity"] * TIMES**2
        flying = np.cumprod(rise < FLOOR - radii(clip)[0]).astype(bool)
        np.testing.assert_allclose(track[flying, 1], rise[flying], atol=0.6)
        across = track[0, 0] + values["speed_x"] * TIMES
        np.testing.assert_allclose(track[flying, 0], across[flying], atol=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_a_pendulum_keeps_its_length_and_its_energy(seed):
    rng = np.random.default_rng(seed)
    dynamics = Dynamics.sample(rng, "pendulum")
    motion = dynamics.move(rng, np.array([8.0]))
    rope = motion.positions[0] - np.array(motion.pivot)
    np.testing.assert_allclose(np.linalg.norm(rope, axis=1), dynamics.parameters["length"], atol=0.2)
    angles = np.arctan2(rope[:, 0], rope[:, 1])
    amplitude = abs(dynamics.parameters["amplitude"])
    assert np.abs(angles).max() < amplitude + 0.02
    # Whole swings last 2 π √(l / g), and longer for wide ones.
    period = math.tau * math.sqrt(dynamics.parameters["length"] / dynamics.parameters["gravity"])
    period *= 1 + amplitude**2 / 16 + 11 * amplitude**4 / 3072
    small = np.abs(angles[min(round(period * FPS), NUM_FRAMES - 1)] / amplitude)
    if period < TIMES[-1]:
        assert small > 0.8


def test_a_collision_keeps_momentum_and_loses_speed_by_elasticity(clips):
    met = 0
    for clip in clips_of(clips, "collide"):
        middle = clip.tracks.mean(axis=0)
        steps = np.diff(middle, axis=0)
        np.testing.assert_allclose(steps, np.broadcast_to(steps[0], steps.shape), atol=0.01)
        approach, separation = (
            np.linalg.norm(np.subtract(*np.diff(clip.tracks[:, at], axis=1))) for at in (slice(0, 2), slice(-2, None))
        )
        if np.abs(np.diff(clip.tracks[1, [0, -1]], axis=0)).max() > 1:  # it was hit
            # Both discs have the elasticity, and pymunk multiplies the two.
            assert separation == pytest.approx(clip.parameters["elasticity"] ** 2 * approach, abs=0.15)
            met += 1
    assert met >= 2


def test_what_ricochets_keeps_its_speed_and_stays_within_the_walls(clips):
    turned = 0
    for clip in clips_of(clips, "ricochet"):
        [track], [radius] = clip.tracks, radii(clip)
        speeds = np.linalg.norm(np.diff(track, axis=0), axis=1) * FPS
        assert np.median(speeds) == pytest.approx(clip.parameters["speed"], rel=0.02)
        assert track.min() > radius - 1.5
        assert track.max() < SIZE - radius + 1.5
        first, last = np.diff(track[:2], axis=0)[0], np.diff(track[-2:], axis=0)[0]
        turned += (np.abs(first - last) > 0.5).any()
    assert turned >= 2


def test_what_slides_slows_down_evenly_and_stops(clips):
    for clip in clips_of(clips, "slide"):
        speed, friction = clip.parameters["speed"], clip.parameters["friction"]
        times = np.minimum(TIMES, speed / friction)
        expected = speed * times - 0.5 * friction * times**2
        way = np.linalg.norm(clip.tracks[0] - clip.tracks[0, 0], axis=1)
        np.testing.assert_allclose(way, expected, atol=0.4)


def test_things_stay_in_the_frame(many):
    inside = []
    for clip in many:
        reach = 0.8 * radii(clip)[:, None]
        low, high = clip.tracks.min(axis=2), clip.tracks.max(axis=2)
        # What grows or is zoomed at reaches further; there the share that can be seen decides.
        fits = (low >= reach).all() and (high <= SIZE - reach).all()
        inside.append(clip.visible.all() and (fits or clip.family in ("grow", "zoom")))
    assert np.mean(inside) >= 0.97


def test_nothing_moves_further_than_its_own_size_in_a_frame(many):
    for clip in many:
        steps = np.linalg.norm(np.diff(clip.tracks, axis=1), axis=-1).max(axis=1)
        assert (steps <= 2 * radii(clip)).all(), (clip.family, clip.parameters)


def test_something_moves_in_nearly_every_clip(many):
    change = [np.abs(clip.frames.astype(int) - clip.frames[:1]).max() for clip in many]
    assert np.mean(np.array(change) > 30) > 0.97


def test_captions_hold_the_verb_and_the_things(many):
    for index, clip in enumerate(many):
        verb = domain((3, index), family=clip.family).verb
        assert clip.caption.split()[-1] == (verb.removesuffix("s") if len(clip.things) > 1 else verb)
        assert all(f"{each.colour} {each.shape}" in clip.caption for each in clip.things)
        assert clip.plain_caption.endswith(FAMILIES[clip.family].words)
        assert "a orange" not in clip.caption


def test_things_stand_out_from_the_backdrop_and_from_each_other(many):
    names = list(COLOURS)
    for number, name in enumerate(names):
        for other in names[:number]:
            assert np.linalg.norm(np.subtract(COLOURS[name], COLOURS[other])) > 50, (name, other)
    contrast = []
    for clip in many:
        frame, mask = clip.frames[0].astype(float), clip.masks[0]
        backdrop = frame[mask == 0].mean(axis=0)
        contrast += [np.linalg.norm(frame[mask == i + 1].mean(axis=0) - backdrop) for i in range(len(clip.things))]
    assert min(contrast) > 40
    assert np.median(contrast) > 100


def test_the_same_start_under_other_dynamics():
    domains = [named_domain("blick", family=family) for family in ("orbit", "hop", "drift", "grow")]
    for seed in range(5):
        moved = same_start(domains, seed)
        for clip, each in zip(moved, domains, strict=True):
            np.testing.assert_array_equal(clip.frames[0], moved[0].frames[0])
            own = sample_clip(each, 0)  # the path is the domain's, wherever it begins
            np.testing.assert_allclose(clip.tracks[0] - clip.tracks[0, 0], own.tracks[0] - own.tracks[0, 0], atol=1e-3)
            assert clip.caption.split()[-1] == "blicks"
            assert clip.visible.all()
        assert not np.allclose(moved[0].tracks[0, -1], moved[1].tracks[0, -1], atol=3)


@pytest.mark.parametrize("family", ["fall", "pendulum", "pan", "collide", "ricochet"])
def test_no_same_start_where_the_place_matters(family):
    with pytest.raises(ValueError, match=f"The motion of '{family}' cannot be begun at any place"):
        same_start([named_domain("blick", family=family)], 0)


def test_in_drags_every_thing_goes_a_way_of_its_own_or_stays():
    clips = [drag_clip(1, index) for index in range(60)]
    assert {len(clip.things) for clip in clips} == {1, 2, 3}
    lengths = []
    for clip in clips:
        reach = radii(clip)[:, None, None]
        assert (clip.tracks >= reach - 1e-3).all()
        assert (clip.tracks <= SIZE - reach + 1e-3).all()
        moved = clip.tracks - clip.tracks[:, :1]
        lengths.append(np.linalg.norm(moved, axis=-1).max(axis=1))
        # The backdrop stands still, and so do the pixels of things that stay.
        stays = np.isin(clip.masks[0], [0, *(np.nonzero(lengths[-1] == 0)[0] + 1)])
        assert np.abs(clip.flow[:, stays]).max() < 1e-6
        assert clip.family == ""
        assert clip.caption == clip.plain_caption
    lengths = np.concatenate(lengths)
    assert 0.25 < (lengths == 0).mean() < 0.5
    assert lengths.max() > 30
    ends = [(clip.tracks[:, -1] - clip.tracks[:, 0])[:2] for clip in clips if len(clip.things) > 1]
    assert all(not np.allclose(*pair) for pair in ends if pair.any())
    again = drag_clip(1, 5)
    assert np.array_equal(again.frames, clips[5].frames)
    assert not np.array_equal(drag_clip(2, 5).frames, clips[5].frames)
