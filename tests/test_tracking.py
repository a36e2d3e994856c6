"""Tracking: on shifts that are known, on the pocket's true flow, behind objects, and with a tracker of another kind."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange

from motionrag.pocket.world import SIZE, domain, sample_clip
from motionrag.tracking import CoTracker, Raft, dense_flow, load_tracker, track_points
from motionrag.tracking.chain import follow

# Every sort of motion without and with a camera; `world` below says how well it is followed.
FAMILIES = ("slide", "fall", "orbit", "spring", "collide", "zigzag", "pan", "zoom")


def texture(height, width, *, seed=0):
    """Noise with a spectrum like that of photographs: `(h w 3)` float, 0 to 255."""
    spectrum = np.fft.rfft2(np.random.default_rng(seed).standard_normal((height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    picture = np.fft.irfft2(spectrum / frequency**1.2, (height, width))
    picture = 127 + 50 * (picture - picture.mean()) / picture.std()
    return np.repeat(picture.clip(0, 255)[..., None], 3, axis=-1)


def shifting(num_frames, step, *, height=96, width=160):
    """A window that slides over a texture: its content moves by `step` (x, y) whole pixels a frame."""
    margin = num_frames * max(map(abs, step))
    picture = texture(height + 2 * margin, width + 2 * margin)
    frames = []
    for index in range(num_frames):
        top, left = margin - index * step[1], margin - index * step[0]
        frames.append(picture[top : top + height, left : left + width])
    return rearrange(torch.from_numpy(np.stack(frames)).round().to(torch.uint8), "t h w c -> t c h w")


@pytest.mark.parametrize("step", [(0, 0), (3, 0), (-2, 1), (1, -4)])
def test_a_shift_is_found_to_a_tenth_of_a_pixel(step):
    video = shifting(8, step)
    points = torch.tensor([[80.0, 48.0], [70.5, 40.25], [90.0, 52.0]])
    tracks, visible = track_points(video, points)
    expected = points[:, None] + torch.arange(8)[:, None] * torch.tensor(step, dtype=torch.float32)
    assert torch.equal(tracks[:, 0], points)
    assert (tracks - expected).norm(dim=-1).max() < 0.1
    assert visible.all()


def test_fifteen_large_steps_at_the_benchmarks_size():
    points = torch.tensor([[150.0, 90.0], [320.0, 130.5], [200.25, 240.0]])
    tracks, visible = track_points(shifting(16, (9, 4), height=320, width=512), points)
    assert (tracks[:, -1] - points - torch.tensor([135.0, 60.0])).norm(dim=-1).max() < 0.5
    assert visible.all()


def test_a_small_video_keeps_its_own_pixels():
    # 48 pixels are enlarged inside; coordinates must come back exactly, half a pixel included.
    tracks, _ = track_points(shifting(5, (1, 0), height=48, width=48), [[20.0, 24.0]])
    assert (tracks[0, :, 0] - torch.arange(20.0, 25.0)).abs().max() < 0.15
    assert (tracks[0, :, 1] - 24).abs().max() < 0.15


def test_floats_and_uint8_are_the_same_video():
    video = shifting(4, (2, 1))
    floats = video.float() / 127.5 - 1
    assert torch.equal(track_points(video, [[50.0, 50.0]])[0], track_points(floats, [[50.0, 50.0]])[0])


def test_dense_flow_agrees_with_tracks_of_the_same_pixels():
    video = shifting(5, (2, -1))
    flow, visible = dense_flow(video)
    assert (flow.shape, visible.shape) == ((5, 96, 160, 2), (5, 96, 160))
    assert not flow[0].any()
    tracks, seen = track_points(video, [[30.0, 20.0], [140.0, 90.0]])
    for index, (x, y) in enumerate([(30, 20), (140, 90)]):
        assert torch.allclose(flow[:, y, x], tracks[index] - tracks[index, 0], atol=1e-4)
        assert torch.equal(visible[:, y, x], seen[index])


def test_what_leaves_the_frame_is_not_visible():
    _, visible = dense_flow(shifting(8, (6, 0)))
    # Column 159 - 6 t is the last one whose content is still inside in frame t.
    for index in range(1, 8):
        assert not visible[index, :, 160 - 6 * index + 2 :].any()
        assert visible[index, 20:76, 40 : 160 - 6 * index - 12].float().mean() > 0.95


def test_what_is_covered_is_lost_and_stays_lost():
    picture = torch.from_numpy(np.stack([texture(96, 160)] * 16)).to(torch.uint8)
    video = rearrange(picture, "t h w c -> t c h w").clone()
    block = 255 - rearrange(torch.from_numpy(texture(40, 40, seed=1).astype(np.uint8)), "h w c -> c h w")
    for index in range(16):  # it covers column 60 in frames 3 to 9
        video[index, :, 28:68, 4 + 6 * index : 44 + 6 * index] = block
    tracks, visible = track_points(video, [[60.0, 48.0], [60.0, 10.0], [24.0, 48.0]])
    assert visible[0, :2].all()
    assert not visible[0, 4:].any()
    assert visible[1:].all()
    assert (tracks[1] - tracks[1, 0]).norm(dim=-1).max() < 0.2
    assert (tracks[2, -1] - torch.tensor([114.0, 48.0])).norm() < 1  # the block itself: 15 steps of 6


def test_points_outside_are_followed_unseen():
    tracks, visible = track_points(shifting(4, (1, 0)), [[-3.0, 50.0]])
    assert not visible.any()
    assert tracks[0, :, 0].tolist() == pytest.approx([-3, -2, -1, 0], abs=0.5)


@pytest.fixture(scope="module")
def world():
    """Errors on the pocket's true flow, in % of the frame's side, of what is said to be visible, and visibility."""
    errors, found, lost = {}, [], []
    for number, family in enumerate(FAMILIES):
        clip = sample_clip(domain((5, number), family=family), (5, number, 1))
        flow, visible = dense_flow(rearrange(torch.from_numpy(clip.frames), "t h w c -> t c h w"))
        truth, seen = torch.from_numpy(clip.flow), torch.from_numpy(clip.flow_visible)
        error = 100 / SIZE * (flow - truth).norm(dim=-1)
        errors[family] = float(error[1:][(visible & seen)[1:]].mean())
        found.append(float((visible & seen).sum() / seen.sum()))
        lost.append(float((~visible & ~seen).sum() / max(1, (~seen).sum())))
    return SimpleNamespace(errors=errors, found=np.mean(found), lost=np.mean(lost))


def test_true_flow_of_the_pockets_world(world):
    assert np.mean(list(world.errors.values())) < 1, world.errors
    assert world.found > 0.8
    assert world.lost > 0.6


@pytest.mark.parametrize(
    ("video", "points", "message"),
    [
        (torch.zeros(4, 48, 48, 3), [[1.0, 1.0]], r"\(t 3 h w\); this one is \(4, 48, 48, 3\)"),
        (torch.full((4, 3, 48, 48), 200.0), [[1.0, 1.0]], r"in \[-1, 1\]; this one is in \[200, 200\]"),
        (torch.full((4, 3, 48, 48), torch.nan), [[1.0, 1.0]], r"in \[nan, nan\]"),
        (torch.zeros(4, 3, 48, 48), [[1.0, 1.0, 1.0]], r"\(n 2\); these are \(1, 3\)"),
        (torch.zeros(4, 3, 48, 48), [[1.0, 1.0], [torch.nan, 1.0]], "Point 1 to track holds a number"),
    ],
)
def test_bad_input_is_named(video, points, message):
    with pytest.raises(ValueError, match=message):
        track_points(video, points)


def test_no_points_are_no_tracks():
    tracks, visible = track_points(torch.zeros(4, 3, 48, 48), torch.zeros(0, 2))
    assert (tracks.shape, visible.shape) == ((0, 4, 2), (0, 4))


def test_a_tracker_with_wrong_shapes_is_refused():
    class Wrong:
        name = "wrong"

        def __call__(self, frames, points):
            return torch.zeros(len(frames), len(points), 2), torch.zeros(len(frames), len(points))

    with pytest.raises(ValueError, match=r"'wrong' must return tracks \(1, 4, 2\)"):
        track_points(torch.zeros(4, 3, 48, 48), [[1.0, 1.0]], tracker=Wrong())


def test_without_opencv_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"motionrag\[control\]"):
        track_points(torch.zeros(4, 3, 48, 48), [[1.0, 1.0]])


class Predictor(torch.nn.Module):
    """Has CoTracker's calling convention, and moves every point by (frame, 2 · frame) from what it was asked."""

    def __init__(self, checkpoint):
        super().__init__()
        self.checkpoint = checkpoint

    def forward(self, video, queries):
        assert video.dtype == torch.float32
        assert video.max() == 255  # grey levels, not [-1, 1]
        assert not queries[..., 0].any()  # all from frame 0
        frames = torch.arange(video.shape[1])[:, None, None]
        tracks = queries[0, :, 1:] + frames * torch.tensor([1.0, 2.0])
        return tracks[None], torch.ones(1, video.shape[1], queries.shape[1], dtype=torch.bool)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    module = ModuleType("cotracker.predictor")
    module.CoTrackerPredictor = Predictor
    monkeypatch.setitem(sys.modules, "cotracker", ModuleType("cotracker"))
    monkeypatch.setitem(sys.modules, "cotracker.predictor", module)
    file = tmp_path / "cotracker.pth"
    file.write_bytes(b"weights")
    return file


def test_cotracker_is_asked_in_its_own_layout(weights):
    tracker = load_tracker("cotracker", weights=weights)
    video = torch.full((5, 3, 48, 64), 255, dtype=torch.uint8)
    tracks, visible = track_points(video, [[7.0, 9.0], [30.0, 40.0]], tracker=tracker)
    assert tracks[1, 3].tolist() == [33, 46]
    assert visible.shape == (2, 5)
    other = weights.with_name("other.pth")
    other.write_bytes(b"other weights")
    assert load_tracker("cotracker", weights=other).name != tracker.name


def test_cotracker_moves_cells_of_four_pixels(weights):
    # The last column of cells is cut to 2 pixels, the last row to 3.
    flow, visible = dense_flow(
        torch.full((5, 3, 47, 62), 255, dtype=torch.uint8), estimator="cotracker", weights=weights
    )
    assert torch.equal(flow, (torch.arange(5)[:, None, None, None] * torch.tensor([1.0, 2.0])).expand(5, 47, 62, 2))
    assert (visible.shape, visible.dtype) == ((5, 47, 62), torch.bool)
    assert visible.all()


def test_cells_keep_their_place(weights, monkeypatch):
    # A point goes as far as its column and row tell, so that every cell shows which point it was given.
    monkeypatch.setattr(
        Predictor,
        "forward",
        lambda self, video, queries: (
            torch.cat([queries[:, None, :, 1:], 2 * queries[:, None, :, 1:]], dim=1),
            rearrange(torch.stack([queries[..., 1] > 4, queries[..., 2] > 4]), "t 1 n -> 1 t n"),
        ),
    )
    flow, visible = dense_flow(torch.zeros(2, 3, 10, 16, dtype=torch.uint8), estimator="cotracker", weights=weights)
    middles = [1.5, 5.5, 9.5, 13.5]
    assert flow[1, 3, :, 0].tolist() == [middle for middle in middles for _ in range(4)]
    assert flow[1, :, 0, 1].tolist() == [1.5] * 4 + [5.5] * 4 + [9, 9]  # the last middle is moved into the frame
    assert torch.equal(visible[0], (torch.arange(16) >= 4).expand(10, 16))
    assert torch.equal(visible[1], (torch.arange(10) >= 4)[:, None].expand(10, 16))


class Stretch:
    """Everything moves away from column 0 by a share of its distance, and back; a known chain."""

    def __init__(self, share, *, back=True):
        self.share, self.back = share, back

    def pictures(self, frames, factor):
        assert factor == 2  # of 64 pixels
        return range(len(frames))

    def between(self, before, after):
        share = self.share if after > before else (1 / (1 + self.share) - 1) * self.back
        columns = torch.arange(144.0).expand(136, 144)  # more than the picture, as a method that pads returns it
        return torch.stack([share * (columns + 0.5), torch.zeros(136, 144)], dim=-1)


def test_the_chain_takes_each_step_from_where_the_last_one_ended():
    frames = torch.zeros(4, 3, 64, 70, dtype=torch.uint8)
    tracks, visible = follow(frames, torch.tensor([[19.5, 30.0], [49.5, 30.0]]), Stretch(0.1))
    # Pixel centres are half a pixel from the edge that stays: 20 · 1.1^t and 50 · 1.1^t from it.
    powers = 1.1 ** torch.arange(4)
    assert torch.allclose(tracks[0], torch.stack([20 * powers - 0.5, torch.full((4,), 30.0)], dim=1), atol=1e-4)
    assert tracks[1, :, 0] + 0.5 == pytest.approx(50 * powers, abs=1e-4)
    assert visible.tolist() == [[True] * 4, [True] * 4]  # 66.55 of 70
    _, visible = follow(frames[:, :, :, :64], torch.tensor([[19.5, 30.0], [49.5, 30.0]]), Stretch(0.1))
    assert visible.tolist() == [[True] * 4, [True, True, True, False]]
    _, visible = follow(frames, torch.tensor([[19.5, 30.0]]), Stretch(0.1, back=False))
    assert visible.tolist() == [[True, False, False, False]]  # |f|² = 16 > 0.01 · 16 + 0.5


@pytest.fixture(scope="module")
def raft_weights(tmp_path_factory):
    from safetensors.torch import save_file
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("raft") / "raft.safetensors"
    save_file(raft_large().state_dict(), file)
    return file


def test_raft_chains_what_its_network_says(raft_weights):
    # 60 pixels are enlarged to 180 and filled up to 184; the video is wider than that is high.
    video = shifting(2, (1, 0), height=60, width=68)
    flow, visible = dense_flow(video, estimator="raft", weights=raft_weights)
    assert (flow.shape, visible.shape) == ((2, 60, 68, 2), (2, 60, 68))
    assert flow.isfinite().all()
    tracker = Raft(raft_weights)
    before, after = tracker.pictures(video, 3)
    assert before.shape == (3, 184, 208)
    assert before.abs().max() <= 1
    assert torch.equal(before[:, 180:], before[:, 179:180].expand(-1, 4, -1))
    # The middle of pixel (x, y) is that of (3 x + 1, 3 y + 1), and 3 pixels there are one here.
    found = tracker.model(before[None], after[None])[-1][0, :, 1:180:3, 1:204:3] / 3
    assert torch.allclose(flow[1], rearrange(found, "xy h w -> h w xy"), atol=1e-4)
    assert flow[1].abs().max() > 0


def test_raft_says_what_is_wrong_with_its_weights(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no RAFT weights at"):
        load_tracker("raft", weights=tmp_path / "none.safetensors")
    (tmp_path / "raft.pth").write_bytes(b"PK of a checkpoint")
    with pytest.raises(ValueError, match=r"raft\.pth is no safetensors file; write"):
        load_tracker("raft", weights=tmp_path / "raft.pth")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds other weights than those of torchvision's raft_large"):
        load_tracker("raft", weights=tmp_path / "other.safetensors")


def test_cotracker_says_what_it_lacks(tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match="no CoTracker weights at"):
        CoTracker(file)
    file.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "cotracker", None)
    with pytest.raises(ImportError, match="CoTracker is not installed: pip install git"):
        CoTracker(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "farneback"}, "no tracker 'farneback'; choose from optical-flow, raft, cotracker"),
        ({"name": "cotracker"}, "needs the path of its weights"),
        ({"name": "optical-flow", "weights": "x.pth"}, "has no weights"),
    ],
)
def test_tracker_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_tracker(**arguments)
