"""Flow for feature modulation: what is stored of it, from trackers and from clips that know it themselves."""

import pytest
import torch
from torch.utils.data import Dataset

from motionrag.pocket.clips import PocketClips
from motionrag.tracking import Raft, dense_flow
from motionrag.training import EncodedClips


class Shifts(Dataset):
    """Noise that moves by whole pixels a frame, (clip, -1) in clip `clip`; its true flow says so."""

    reads = 0

    def __init__(self, count=3, *, blind=(), knows=True):
        picture = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
        self.picture = torch.nn.functional.interpolate(picture, size=96, mode="bicubic")[0].clamp(0, 1) * 2 - 1
        self.count, self.blind, self.knows = count, blind, knows
        self.identity = f"shifts {count} {blind}"

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        Shifts.reads += 1
        starts = [(20 + time, 20 - index * time) for time in range(4)]
        video = torch.stack([self.picture[:, y : y + 48, x : x + 48] for y, x in starts])
        if not self.knows:
            return {"video": video, "caption": ""}
        flow = torch.arange(4.0)[:, None, None, None] * torch.tensor([float(index), -1.0])
        visible = torch.ones(4, 48, 48, dtype=torch.bool)
        visible[2, :16] = False
        if index in self.blind:
            visible[3, ::8, ::8] = False
        return {"video": video, "caption": "", "true_flow": flow.expand(4, 48, 48, 2), "true_visible": visible}


def encoded(clips, folder, flow, **options):
    return EncodedClips(clips, folder=str(folder), flow=flow, batch_size=2, **options)


def test_true_flow_is_stored_as_the_clips_give_it(tmp_path):
    clips = encoded(Shifts(), tmp_path, "true")
    sample = clips[2]
    assert {name: values.dtype for name, values in sample.items()} == dict.fromkeys(["flow", "visible"], torch.float32)
    assert torch.equal(sample["flow"], Shifts()[2]["true_flow"])
    assert sample["visible"].shape == (48, 48)
    assert not sample["visible"][:16].any()  # hidden in one frame is hidden
    assert sample["visible"][16:].all()


def test_a_tracker_sees_the_video_in_full_precision(tmp_path):
    clips = encoded(Shifts(), tmp_path, "optical-flow")
    for index in range(3):
        flow, visible = dense_flow(Shifts()[index]["video"])
        assert torch.equal(clips[index]["flow"], flow.half().float())
        assert torch.equal(clips[index]["visible"].bool(), visible.all(0))
    moved = clips[2]["flow"][3, 12:36, 12:36]
    assert (moved - torch.tensor([6.0, -3.0])).norm(dim=-1).mean() < 0.3


def test_flow_is_found_once_for_each_tracker(tmp_path):
    def reads(flow):
        before = Shifts.reads
        encoded(Shifts(), tmp_path, flow)
        return Shifts.reads - before

    assert [reads(flow) for flow in ("optical-flow", "true", "optical-flow", "true")] == [3, 3, 0, 0]


def test_weights_of_a_learned_tracker_name_its_cache(tmp_path, monkeypatch):
    from safetensors.torch import save_file
    from torchvision.models.optical_flow import raft_large

    # The pictures are found by the real class, the flow by a constant: the network itself is slow.
    constant = torch.tensor([0.3, 0.0])  # so small that there and back still agree
    monkeypatch.setattr(Raft, "between", lambda self, before, after: constant.expand(*before.shape[1:], 2))
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(raft_large().state_dict(), tmp_path / f"{seed}.safetensors")
    before = Shifts.reads
    flows = [
        encoded(Shifts(), tmp_path / "cache", "raft", flow_weights=str(tmp_path / f"{seed}.safetensors"))
        for seed in (0, 1, 0)
    ]
    assert Shifts.reads - before == 6
    # 48 pixels are enlarged threefold: 0.3 pixels there are 0.1 here.
    expected = torch.arange(4.0)[:, None] * torch.tensor([0.1, 0.0])
    torch.testing.assert_close(flows[0][0]["flow"][:, 5, 5], expected, rtol=0, atol=1e-3)


def test_a_clip_without_a_visible_block_is_named(tmp_path):
    with pytest.raises(ValueError, match="Clip 3: no 8x8 block of its first frame is visible in all frames"):
        encoded(Shifts(5, blind=(3,)), tmp_path, "true")
    with pytest.raises(ValueError, match="Clip 3"):  # what was begun is not taken for done
        encoded(Shifts(5, blind=(3,)), tmp_path, "true")


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="these bring no true_flow and no true_visible"):
        encoded(Shifts(knows=False), tmp_path, "true")
    with pytest.raises(ValueError, match="has no weights"):
        encoded(Shifts(), tmp_path, "true", flow_weights="raft.safetensors")
    with pytest.raises(ValueError, match="flow_weights belong to a flow"):
        EncodedClips(Shifts(), folder=str(tmp_path), flow_weights="raft.safetensors")
    with pytest.raises(ValueError, match="no tracker 'farneback'; choose from optical-flow, raft, cotracker"):
        encoded(Shifts(), tmp_path, "farneback")


def test_the_pocket_knows_its_flow(tmp_path):
    options = {"seed": 3, "clips_per_domain": 2, "folder": str(tmp_path), "num_workers": 1}
    plain = PocketClips(5, **options)
    clips = PocketClips(5, **options, true_flow=True)
    assert clips.identity == plain.identity
    assert "true_flow" not in plain[0]
    for index in range(5):
        sample = clips[index]
        assert torch.equal(sample["true_flow"][:, 4::8, 4::8].half(), sample["flow"])
        height, width = sample["video"].shape[-2:]
        assert sample["true_visible"].shape == (17, height, width)
        assert sample["true_visible"][0].all()
    assert not torch.equal(clips[0]["true_flow"], clips[1]["true_flow"])
