"""Control on the pipeline: trajectories, mask and camera on a tiny SVD, alone and together with motion tokens."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.hooks import HookRegistry, apply_pyramid_attention_broadcast
from PIL import Image

from motionrag import Clip, MotionRAGPipeline, Reference, RegionTrajectory
from motionrag.adapters import AttentionInjection, FeatureModulation
from motionrag.bundle import BundleConfig, EncoderSource, MotionBundle
from motionrag.control import control_flow
from motionrag.models import Resampler
from motionrag.trajectory import Tracks, write_tracks
from tests.backbones.every.families import NUM_TOKENS, RESAMPLER, TOKEN_DIM, motion_pipeline, tokens
from tests.test_cli import run as run_command
from tests.training.parts import svd_pipeline
from tests.video_files import make_video

SIZE = (64, 64)
FRAMES = 3
WAY = [(20, 20), (40, 30)]


@pytest.fixture(scope="module")
def diffusers_pipe():
    """The tiny SVD with an autoencoder that divides by 8, as MotionPro's networks expect."""
    made = svd_pipeline(levels=4)
    made.vae.eval()
    made.set_progress_bar_config(disable=True)
    return made


def bundle(diffusers_pipe, *, modulation=True, injection=True, zero=False):
    torch.manual_seed(1)
    unet = diffusers_pipe.unet
    parts, described = {"motion_resampler": Resampler(**RESAMPLER)}, {"motion_resampler": RESAMPLER}
    if injection:
        parts["motion_injection"] = AttentionInjection.for_model(unet, TOKEN_DIM)
        for adapter in parts["motion_injection"].sites.values():
            torch.nn.init.normal_(adapter.to_v.weight, std=0.5)
        described["motion_injection"] = parts["motion_injection"].config()
    if modulation:
        parts["feature_modulation"] = FeatureModulation.for_model(unet)
        for name, weight in parts["feature_modulation"].named_parameters():
            if not zero and ".temporal." in name and name.startswith("sites"):
                torch.nn.init.normal_(weight, std=0.3)
        described["feature_modulation"] = parts["feature_modulation"].config()
    config = BundleConfig(
        backbone="svd", base_model="backbone", encoders={"video": EncoderSource("video")}, parts=described
    )
    unconditional = torch.randn(NUM_TOKENS, TOKEN_DIM)
    return MotionBundle(
        config, unconditional_tokens=unconditional, **{name: part.eval() for name, part in parts.items()}
    )


@pytest.fixture
def pipe(diffusers_pipe):
    made = MotionRAGPipeline(diffusers_pipe, bundle(diffusers_pipe))
    yield made
    made.injection.detach()
    made.modulation.detach()


def picture(size=SIZE, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)


def run(pipe, image=None, **options):
    settings = {
        "height": SIZE[0],
        "width": SIZE[1],
        "num_frames": FRAMES,
        "num_inference_steps": 2,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipe(picture() if image is None else image, **{**settings, **options}).frames


def plain(pipe, image=None, **options):
    return run(pipe, image, num_references=0, **options)


# The condition


def test_ways_and_brush_follow_the_image_to_the_videos_size():
    brush = np.zeros((32, 128), np.uint8)
    brush[16:, 64:] = 255
    flow = control_flow(
        image_size=(32, 128), video_size=(64, 64), num_frames=4, trajectories=[[(40, 10), (80, 15)]], motion_mask=brush
    )
    assert flow.shape == (4, 3, 64, 64)
    # Half the width, twice the height: from (20, 20) to (40, 30).
    torch.testing.assert_close(flow[-1, :2, 20, 20], torch.tensor([20.0, 10.0]))
    assert flow[0, :2].abs().max() == 0
    mask = flow[0, 2]
    assert mask[32:, 32:].all()
    assert mask[16:24, 16:24].all()
    assert mask.sum() == 32 * 32 + 8 * 8


def test_tracks_of_a_file_are_stretched_from_their_canvas():
    tracks = Tracks([[(128, 64), (192, 64)]], height=256, width=256)
    flow, expected = (
        control_flow(image_size=(100, 200), video_size=SIZE, num_frames=4, trajectories=ways)
        for ways in (tracks, [[(100, 25), (150, 25)]])
    )
    torch.testing.assert_close(flow, expected)


def test_normalised_ways_need_no_size():
    sizes = {"image_size": (100, 200), "video_size": SIZE, "num_frames": 4}
    ways = [RegionTrajectory([(0.25, 0.5), (0.5, 0.5)], normalised=True)], [[(50, 50), (100, 50)]]
    normalised, pixels = (control_flow(**sizes, trajectories=way) for way in ways)
    torch.testing.assert_close(normalised, pixels)


def test_a_camera_move_is_added_to_the_ways_and_lets_everything_move():
    sizes = {"image_size": SIZE, "video_size": SIZE, "num_frames": 4}
    camera = control_flow(**sizes, camera="pan left")
    both = control_flow(**sizes, camera="pan left", trajectories=[WAY])
    way = control_flow(**sizes, trajectories=[WAY])
    assert camera[:, 2].all()
    told = camera[-1, :2].abs().sum(0) > 0
    assert 0.05 < told.float().mean() < 0.3  # blocks are told of it with probability 0.15
    inside = way[-1, :2].abs().sum(0) > 0
    outside = ~inside
    torch.testing.assert_close(both[-1, :2][:, outside], camera[-1, :2][:, outside])
    moved = both[-1, :2][:, inside] - way[-1, :2][:, inside]
    assert moved.abs().sum(0).min() > 0


def test_what_stays_is_not_told_of_the_camera_and_what_leaves_keeps_no_half_of_its_way():
    sizes = {"image_size": SIZE, "video_size": SIZE, "num_frames": 4, "camera": "truck right"}
    pinned = control_flow(**sizes, trajectories=[[(32, 32)]])
    assert not pinned[:, :2, 28:36, 28:36].any()
    # The picture goes left: a block at that side leaves it, and is told of its own motion alone.
    border = control_flow(**sizes, trajectories=[[(4, 32), (4, 40)]])
    visible = border[-1, 1, 28:36, 0:8] != 0
    assert visible.all()
    camera_share = border[:, 0, 28:36, 0:8]
    ended = camera_share[-1] == 0
    assert not camera_share[:, ended].any()


def test_a_thin_stroke_on_a_large_image_is_kept():
    brush = np.zeros((640, 640), np.uint8)
    brush[300:302] = 1
    flow = control_flow(image_size=(640, 640), video_size=SIZE, num_frames=2, motion_mask=brush)
    assert flow[0, 2, 30].all()


def test_a_point_at_the_edge_of_any_image_stays_inside():
    for width in range(500, 600):
        ways = [RegionTrajectory([(0.5, 0.5), (1.0, 1.0)], normalised=True)]
        control_flow(image_size=(width, width), video_size=(576, 576), num_frames=2, trajectories=ways)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"trajectories": [[(5, 5), (500, 5)]]}, r"trajectories\[0\] leaves the image of 64x64"),
        ({"trajectories": [WAY, [(float("nan"), 3)]]}, r"trajectories\[1\]"),
        ({"motion_mask": np.ones((8, 8))}, "8x8 pixels, the image 64x64"),
        ({"camera": "sideways"}, "pan left"),
    ],
)
def test_what_makes_no_sense_is_named(pipe, wrong, message):
    with pytest.raises(ValueError, match=message):
        plain(pipe, **wrong)


# On the pipeline


def test_control_changes_the_video_and_scale_zero_does_not(pipe):
    without = plain(pipe)
    controlled = plain(pipe, trajectories=[WAY])
    assert (controlled - without).abs().max() > 1e-3
    assert torch.equal(plain(pipe), without)
    assert torch.equal(plain(pipe, trajectories=[WAY], control_scale=0), without)
    stronger = plain(pipe, trajectories=[WAY], control_scale=2.0)
    assert not torch.equal(stronger, controlled)


def test_guidance_of_the_control(pipe):
    way = {"trajectories": [WAY]}
    controlled = plain(pipe, **way)
    assert torch.equal(plain(pipe, **way, control_guidance_scale=1), controlled)
    assert torch.equal(plain(pipe, control_guidance_scale=3.0), plain(pipe))
    plain(pipe, num_inference_steps=1, control_guidance_scale=3.0, **way)  # places its hook before the one below
    outputs = []
    spy = pipe.pipeline.unet.register_forward_hook(lambda _unet, _inputs, output: outputs.append(output[0]))
    told = {"fps": 9, "motion_bucket_id": 17}  # what a controlled call tells the UNet
    for options in (told, way, {**way, "control_guidance_scale": 3.0}):
        plain(pipe, num_inference_steps=1, **options)
    spy.remove()
    without, with_it, guided = outputs
    torch.testing.assert_close(guided, without + 3 * (with_it - without), atol=1e-5, rtol=1e-5)
    assert not torch.equal(guided, with_it)


def test_a_bundle_may_name_its_own_guidance_of_the_control(diffusers_pipe, pipe):
    expected = plain(pipe, trajectories=[WAY], control_guidance_scale=3.0)
    pipe.injection.detach()
    pipe.modulation.detach()
    own = bundle(diffusers_pipe)
    own.config = replace(own.config, control_guidance_scale=3.0)
    named = MotionRAGPipeline(diffusers_pipe, own)
    try:
        assert torch.equal(plain(named, trajectories=[WAY]), expected)
        output = named(picture(), trajectories=[WAY], height=64, width=64, num_frames=FRAMES, num_inference_steps=1)
        assert output.settings["control_guidance_scale"] == 3.0
    finally:
        for adapter in (named.injection, named.modulation):
            adapter.detach()
        for adapter in (pipe.injection, pipe.modulation):
            adapter.attach(diffusers_pipe.unet)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2"])
@pytest.mark.parametrize("name", ["motion_guidance_scale", "control_guidance_scale"])
def test_a_guidance_scale_that_is_no_number_is_refused(pipe, name, scale):
    with pytest.raises(ValueError, match=f"{name} must be a finite number, got .*; 1 is off"):
        plain(pipe, **{name: scale})


def test_guidance_of_the_control_and_pyramid_attention_broadcast_are_refused_together(pipe):
    unet = pipe.pipeline.unet
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    apply_pyramid_attention_broadcast(unet, config)
    try:
        with pytest.raises(ValueError, match=r"UNetSpatioTemporal.*mix up the runs.*control_guidance_scale=1"):
            plain(pipe, trajectories=[WAY], control_guidance_scale=2.0)
    finally:
        HookRegistry.check_if_exists_or_initialize(unet).remove_hook("pyramid_attention_broadcast", recurse=True)


def test_control_stands_alone_without_a_database(pipe):
    controlled = run(pipe, trajectories=[WAY])
    assert torch.equal(controlled, plain(pipe, trajectories=[WAY]))
    with pytest.raises(ValueError, match="no database to retrieve motion from"):
        run(pipe)


def test_a_fresh_modulation_changes_nothing(diffusers_pipe):
    pipe = MotionRAGPipeline(diffusers_pipe, bundle(diffusers_pipe, injection=False, zero=True))
    expected = plain(pipe, fps=9, motion_bucket_id=17)
    assert torch.equal(plain(pipe, trajectories=[WAY]), expected)
    with pytest.raises(ValueError, match="no motion_injection"):
        run(pipe, motion_tokens=tokens())
    with pytest.raises(ValueError, match=r"read the file: read_tracks\('ways.json'\)"):
        plain(pipe, trajectories="ways.json")
    pipe.modulation.detach()


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_control_and_motion_tokens_together(pipe, guidance_scale):
    options = {"guidance_scale": guidance_scale}
    motion = {"motion_tokens": tokens()}
    videos = [
        run(pipe, **motion, trajectories=[WAY], **options),
        run(pipe, **motion, **options),
        plain(pipe, trajectories=[WAY], **options),
        plain(pipe, **options),
    ]
    differences = [(videos[i] - videos[j]).abs().max() for i in range(4) for j in range(i)]
    assert min(differences) > 1e-4
    # Attached the other way round it is the same video.
    pipe.injection.detach()
    pipe.injection.attach(pipe.pipeline.unet)
    again = run(pipe, **motion, trajectories=[WAY], **options)
    torch.testing.assert_close(again, videos[0], atol=1e-5, rtol=1e-4)


def test_the_condition_itself_can_be_given(pipe):
    flow = control_flow(image_size=SIZE, video_size=SIZE, num_frames=FRAMES, trajectories=[WAY])
    drawn = plain(pipe, trajectories=[WAY])
    assert torch.equal(plain(pipe, flow=flow), drawn)
    assert torch.equal(plain(pipe, flow=flow[None]), drawn)
    with pytest.raises(ValueError, match="flow is the whole condition; leave out trajectories and camera"):
        plain(pipe, flow=flow, trajectories=[WAY], camera="pan left")
    with pytest.raises(ValueError, match=r"flow must be \(1, 3, 3, 64, 64\) or \(3, 3, 64, 64\), got \(2, 3, 64, 64\)"):
        plain(pipe, flow=flow[:2])


@pytest.mark.parametrize(
    "form", [lambda way: np.array([way]), lambda way: [np.array(way)], lambda way: RegionTrajectory(way)]
)
def test_ways_come_in_many_forms(pipe, form):
    assert torch.equal(plain(pipe, trajectories=form(WAY)), plain(pipe, trajectories=[WAY]))


def test_no_way_is_no_control(pipe):
    for nothing in (None, (), [], np.zeros((0, 2, 2))):
        assert torch.equal(plain(pipe, trajectories=nothing), plain(pipe))
    mask = np.ones(SIZE)
    assert torch.equal(plain(pipe, trajectories=None, motion_mask=mask), plain(pipe, motion_mask=mask))


def test_control_of_scale_zero_is_left_out_and_asks_for_no_database(pipe):
    assert torch.equal(run(pipe, trajectories=[WAY], control_scale=0), plain(pipe))


def test_motion_of_scale_zero_is_left_out(pipe):
    assert torch.equal(run(pipe, motion_tokens=tokens(), motion_scale=0), plain(pipe))


def test_several_images_with_several_videos_each_are_refused(pipe):
    with pytest.raises(ValueError, match="num_videos_per_prompt is for one image"):
        plain(pipe, [picture(), picture(seed=1)], num_videos_per_prompt=2)


def test_half_precision_keeps_displacements_exact(diffusers_pipe):
    """A displacement of 129 pixels would become 128 in bfloat16."""
    pipe = MotionRAGPipeline(diffusers_pipe, bundle(diffusers_pipe))
    flow = torch.zeros(1, FRAMES, 3, *SIZE)
    videos = []
    try:
        pipe.pipeline.to(torch.bfloat16)
        for displacement in (128.0, 129.0):
            flow[:, 1:, 0] = displacement
            videos.append(plain(pipe, flow=flow))
    finally:
        pipe.pipeline.to(torch.float32)
        pipe.injection.detach()
        pipe.modulation.detach()
    assert not torch.equal(*videos)


def test_several_images_get_the_ways_at_their_own_size(pipe):
    images = [picture(), picture((128, 64), seed=1)]
    ways = [RegionTrajectory([(0.3, 0.3), (0.6, 0.5)], normalised=True)]
    together = plain(pipe, images, trajectories=ways, generator=[torch.Generator().manual_seed(i) for i in (0, 1)])
    for index, image in enumerate(images):
        alone = plain(pipe, image, trajectories=ways, generator=torch.Generator().manual_seed(index))
        torch.testing.assert_close(together[index], alone[0], atol=1e-4, rtol=1e-3)


def test_the_flow_is_encoded_once_for_a_generation_and_the_model_is_told_as_in_training(pipe):
    calls, told = [], []
    handles = [
        pipe.modulation.encoder.register_forward_hook(lambda *_: calls.append(1)),
        pipe.pipeline.unet.register_forward_pre_hook(
            lambda _, args, kwargs: told.append(kwargs["added_time_ids"]), with_kwargs=True
        ),
    ]
    plain(pipe, trajectories=[WAY], num_inference_steps=4, guidance_scale=2.5)
    plain(pipe)
    for handle in handles:
        handle.remove()
    assert len(calls) == 1
    assert told[0][0].tolist() == pytest.approx([8, 17, 0.02])
    assert told[-1][0].tolist() == pytest.approx([6, 127, 0.02])


def test_an_error_in_a_call_leaves_no_control_behind(pipe):
    before = plain(pipe)

    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        plain(pipe, trajectories=[WAY], callback_on_step_end=fail)
    assert torch.equal(plain(pipe), before)


def test_bundles_and_families_without_modulation_refuse_control(diffusers_pipe):
    pipe = MotionRAGPipeline(diffusers_pipe, bundle(diffusers_pipe, modulation=False))
    with pytest.raises(ValueError, match=r"no feature_modulation.*only SVD's UNet"):
        plain(pipe, trajectories=[WAY])
    pipe.injection.detach()
    other = motion_pipeline("LTX")
    with pytest.raises(ValueError, match="no feature_modulation"):
        other(picture(), num_references=0, camera="pan left", height=64, width=64, num_frames=9)


def test_a_modulation_of_another_model_leaves_no_hook_behind(diffusers_pipe):
    made = bundle(diffusers_pipe)
    made.feature_modulation._levels = {"down_blocks.7.resnets.0.spatial_res_block.conv1": 0}
    hooks = sum(len(module._forward_pre_hooks) for module in diffusers_pipe.unet.modules())
    with pytest.raises(ValueError, match=r"no layer at 'down_blocks\.7"):
        MotionRAGPipeline(diffusers_pipe, made)
    assert sum(len(module._forward_pre_hooks) for module in diffusers_pipe.unet.modules()) == hooks
    assert not made.motion_injection.is_attached


def test_info_counts_the_modulation(pipe):
    facts = pipe.info()
    assert facts["modulation_parameters"] == sum(weight.numel() for weight in pipe.modulation.parameters())
    assert facts["injection_paths"] == {"one position": facts["injection_sites"]}


def test_trajectories_are_suggested_by_the_file_of_a_reference(pipe, tmp_path):
    make_video(tmp_path / "clip.mp4", 17, (64, 48), seed=1)
    reference = Reference(
        id="1",
        clip=Clip(str(Path(tmp_path, "clip.mp4"))),
        rank=1,
        score=1.0,
        scores={"text": 1.0},
        weight=1.0,
        motion_tokens=tokens()[0],
        context_tokens=tokens()[0],
    )
    found = pipe.suggest_trajectories(picture(), reference, count=2)
    assert found.motion_mask.shape == SIZE
    assert len(found.trajectories) <= 2
    assert plain(pipe, trajectories=found.trajectories, motion_mask=found.motion_mask).shape == (1, FRAMES, 3, *SIZE)


# On the command line


@pytest.fixture(scope="module")
def saved(diffusers_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    diffusers_pipe.save_pretrained(folder / "pipeline")
    bundle(diffusers_pipe).save_pretrained(folder / "bundle")
    picture().save(folder / "image.png")
    write_tracks(folder / "ways.json", Tracks([WAY], height=64, width=64))
    return folder


def generate(folder, name, *options):
    video = folder / f"{name}.mp4"
    sizes = ("--height", 64, "--width", 64, "--frames", 3, "--steps", 1, "--references", 0)
    models = ("--backbone", folder / "pipeline", "--bundle", folder / "bundle", "--out", video)
    return run_command("generate", folder / "image.png", *models, *sizes, *options), video


def test_generate_with_drawn_control(saved):
    plain_call, plain_video = generate(saved, "plain")
    drawn_call, drawn_video = generate(saved, "drawn", "--trajectories", saved / "ways.json", "--camera", "pan left")
    assert plain_call.returncode == drawn_call.returncode == 0, drawn_call.stderr
    assert plain_video.read_bytes() != drawn_video.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--canvas", "big"), "HEIGHTxWIDTH"),
        (("--trajectories", "nowhere.json"), "nowhere.json is no file"),
        (("--camera", "sideways"), "pan left"),
    ],
)
def test_generate_names_what_is_wrong_with_the_control(saved, options, message):
    done, video = generate(saved, "wrong", *options)
    assert done.returncode != 0
    assert message in done.stderr
    assert not video.exists()


def test_generate_says_what_the_control_was_and_records_it(saved):
    drawn = ("--trajectories", saved / "ways.json", "--motion-mask", saved / "image.png")
    done, video = generate(saved, "said", *drawn, "--control-guidance", "2", "--motion-guidance", "3")
    assert "Control: trajectories, motion_mask, strength 1, guidance 2." in done.stdout
    assert "Injected effect" not in done.stdout
    report = json.loads(video.with_suffix(".json").read_text())
    assert (report["control_guidance_scale"], report["motion_guidance_scale"]) == (2, 3)
    assert report["control"] == {
        "trajectories": [[[20, 20], [40, 30]]],
        "motion_mask": str(saved / "image.png"),
    }


def test_offloading_needs_an_accelerator_and_a_canvas_needs_ways(saved):
    done, _ = generate(saved, "offload", "--offload", "group")
    assert done.returncode == 2
    assert "--offload group moves parts to an accelerator" in done.stderr
    done, _ = generate(saved, "canvas", "--canvas", "64x64")
    assert "--canvas belongs to --trajectories" in done.stderr


def test_a_bundle_without_injection_has_no_use_for_a_database(diffusers_pipe, tmp_path):
    with pytest.raises(ValueError, match="no use for a database"):
        MotionRAGPipeline(diffusers_pipe, bundle(diffusers_pipe, injection=False), database=tmp_path)
