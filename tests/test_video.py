"""Reading and writing video: sampling, spans, readers, damage, odd files."""

import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

from motionrag.pocket.world import named_domain, sample_clip
from motionrag.video import Clip, VideoError, VideoInfo, probe, read_clip, sample_indices, write_video
from motionrag.video.file import MAX_SIDE, read_timeline
from tests.video_files import make_audio, make_video, moving_frames, set_rotation


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """24 frames at 8 frames per second, 64 x 48, B-frames, a keyframe every 6."""
    return make_video(tmp_path_factory.mktemp("video") / "a.mp4", options={"g": "6"})


def all_frames(path):
    """Every frame of a file, by the plainest use of PyAV."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


# Clip


def test_clip_keeps_paths_as_strings_and_hashes_without_metadata(tmp_path):
    clip = Clip(tmp_path / "a.mp4", 1, 2, metadata={"tags": ["unhashable"]})
    assert clip.uri == str(tmp_path / "a.mp4")
    assert clip == Clip(str(tmp_path / "a.mp4"), 1.0, 2.0)
    assert len({clip, Clip(tmp_path / "a.mp4", 1.0, 2.0)}) == 1


@pytest.mark.parametrize("span", [(-1.0, None), (float("nan"), None), (float("inf"), None)])
def test_clip_refuses_a_start(span):
    with pytest.raises(ValueError, match=r"start_s of a\.mp4 is .* must be zero or more"):
        Clip("a.mp4", *span)


@pytest.mark.parametrize("span", [(1.0, 1.0), (2.0, 1.0), (0.0, float("nan")), (0.0, float("inf"))])
def test_clip_refuses_an_end(span):
    with pytest.raises(ValueError, match=r"end_s of a\.mp4 is .* must be greater than start_s"):
        Clip("a.mp4", *span)


# Sampling


@pytest.mark.parametrize("count", [1, 2, 7, 16, 17, 49])
def test_sample_indices_are_the_published_ones(count):
    for num_frames in range(1, 300):
        published = torch.linspace(0, num_frames - 1, count).round().long().numpy()
        np.testing.assert_array_equal(sample_indices(num_frames, count), published)


def test_sample_indices_refuse_nothing_to_sample():
    with pytest.raises(ValueError, match="Cannot sample 16 of 0 frames"):
        sample_indices(0)


def test_frames_are_the_sampled_ones(video):
    clip = read_clip(Clip(video))
    np.testing.assert_array_equal(clip.frames, all_frames(video)[sample_indices(24)])
    assert (clip.num_frames, clip.fps, clip.width, clip.height, clip.short) == (24, 8.0, 64, 48, False)
    assert (clip.start_s, clip.end_s, clip.still_share) == (0.0, 3.0, 0.0)
    assert clip.reader == f"pyav {av.__version__}"


def test_short_clip_repeats_frames(video):
    clip = read_clip(Clip(video, 0.5, 1.0))
    np.testing.assert_array_equal(clip.frames, all_frames(video)[4:8][sample_indices(4)])
    assert clip.short
    assert clip.still_share == 0.0  # repeated by us, not still


def test_still_frames_are_counted(tmp_path):
    moving = moving_frames(10)
    # Lossless, so that equal frames come back equal.
    path = make_video(tmp_path / "a.mkv", frames=moving[[0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3]], codec="ffv1")
    assert read_clip(Clip(path), num_frames=11).still_share == pytest.approx(0.7)
    frozen = make_video(tmp_path / "b.mkv", frames=moving[[0] * 16], codec="ffv1")
    assert read_clip(Clip(frozen)).still_share == 1.0


def test_long_video_decodes_only_groups_with_wanted_frames(tmp_path):
    path = make_video(tmp_path / "a.mp4", num_frames=200, options={"g": "5"})
    np.testing.assert_array_equal(read_clip(Clip(path), num_frames=6).frames, all_frames(path)[sample_indices(200, 6)])


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"x264-params": "open-gop=1:keyint=10:bframes=3:b-pyramid=2:scenecut=0"}),
        ("libx265", {"x265-params": "open-gop=1:keyint=10:bframes=3:log-level=none"}),
    ],
)
def test_open_groups_of_pictures(tmp_path, codec, options):
    path = make_video(tmp_path / "a.mp4", num_frames=80, codec=codec, options=options)
    frames = all_frames(path)
    np.testing.assert_array_equal(read_clip(Clip(path), num_frames=5).frames, frames[sample_indices(80, 5)])
    later = read_clip(Clip(path, 5.0, 7.0), num_frames=5)
    np.testing.assert_array_equal(later.frames, frames[40:56][sample_indices(16, 5)])


def test_hidden_frames_of_vp8_are_not_counted(tmp_path):
    source, path = make_video(tmp_path / "a.webm", codec="libvpx"), tmp_path / "hidden.webm"
    with av.open(str(source)) as container, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(container.streams.video[0])
        for index, packet in enumerate(container.demux(video=0)):
            if packet.size:
                content = bytearray(bytes(packet))
                if index == 5:
                    content[0] &= 0b11101111  # show_frame
                copy = av.Packet(bytes(content))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                output.mux(copy)
    clip = read_clip(Clip(path), num_frames=23, reader="pyav")
    assert clip.num_frames == 23
    # The rate varies where the frame is missing, so sampling is by time: compare the ends and the count only.
    shown = all_frames(path)
    assert len(shown) == 23
    np.testing.assert_array_equal(clip.frames[[0, -1]], shown[[0, -1]])


# Spans


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "libx264"), ("mkv", "libx264"), ("ts", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")],
)
@pytest.mark.parametrize(("span", "first", "last"), [((1.0, 2.0), 8, 15), ((1.3, 2.9), 11, 23), ((2.0, None), 16, 23)])
def test_span(tmp_path, suffix, codec, span, first, last):
    path = make_video(tmp_path / f"a.{suffix}", codec=codec, options={"g": "6"})
    clip = read_clip(Clip(path, *span))
    np.testing.assert_array_equal(clip.frames, all_frames(path)[first : last + 1][sample_indices(last + 1 - first)])
    assert clip.num_frames == last + 1 - first
    assert clip.start_s == pytest.approx(first / 8, abs=0.002)
    assert clip.end_s == pytest.approx((last + 1) / 8, abs=0.002)


def test_times_rounded_to_milliseconds_hit_the_same_frames(tmp_path):
    path = make_video(tmp_path / "a.mp4", num_frames=12, fps=3)
    for start, end in ((0.333, 1.667), (0.334, 1.666)):
        assert read_timeline(str(path), start, end).times_s == pytest.approx(np.arange(1, 5) / 3)


def test_span_past_the_end_ends_with_the_file(video):
    clip = read_clip(Clip(video, 2.0, 99.0))
    assert (clip.num_frames, clip.end_s) == (8, 3.0)


def test_span_behind_the_end_is_refused(video):
    with pytest.raises(VideoError, match="shows no frame from 3 s to 4 s; at least two are needed"):
        read_clip(Clip(video, 3.0, 4.0))


def test_seconds_count_from_the_first_frame(tmp_path):
    path = make_video(tmp_path / "a.mkv", times=10 + np.arange(24) / 8)
    assert read_clip(Clip(path, 1.0, 2.0)).start_s == pytest.approx(1.0)


# Varying rate, rotation, codecs, readers


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_varying_rate_is_sampled_by_time(tmp_path, suffix):
    times = np.concatenate([np.arange(12) / 24, 0.5 + np.arange(12) / 4])
    path = make_video(tmp_path / f"a.{suffix}", times=times)
    clip = read_clip(Clip(path), num_frames=9)
    nearest = [int(np.abs(times - t).argmin()) for t in np.linspace(times[0], times[-1], 9)]
    np.testing.assert_array_equal(clip.frames, all_frames(path)[nearest])
    assert clip.fps == pytest.approx(23 / times[-1], rel=0.01)
    with pytest.raises(VideoError, match="not for decord"):
        read_clip(Clip(path), reader="decord")


@pytest.mark.parametrize(("degrees", "turns"), [(90, -1), (180, 2), (270, 1)])
def test_rotation_is_applied(tmp_path, video, degrees, turns):
    path = tmp_path / "turned.mp4"
    path.write_bytes(video.read_bytes())
    set_rotation(path, degrees)
    info = probe(path)
    assert info.rotation == degrees
    clip = read_clip(Clip(path))
    expected = np.rot90(all_frames(video), k=turns, axes=(1, 2))[sample_indices(24)]
    np.testing.assert_array_equal(clip.frames, expected)
    assert (info.height, info.width) == (clip.height, clip.width) == expected.shape[1:3]


@pytest.mark.parametrize(
    ("codec", "name", "suffix"),
    [
        ("libx264", "h264", "mp4"),
        ("libx265", "hevc", "mp4"),
        ("libsvtav1", "av1", "mp4"),
        ("libvpx", "vp8", "webm"),
        ("libvpx-vp9", "vp9", "webm"),
        ("mpeg4", "mpeg4", "mp4"),
        ("gif", "gif", "gif"),
    ],
)
def test_codec(tmp_path, codec, name, suffix):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")
    path = make_video(tmp_path / f"a.{suffix}", codec=codec)
    assert probe(path).codec == name
    clip = read_clip(Clip(path))
    assert psnr(clip.frames, moving_frames()[sample_indices(24)]) > (10 if codec == "gif" else 25)


def test_probe(video):
    info = probe(video)
    assert info == VideoInfo("mov,mp4,m4a,3gp,3g2,mj2", "h264", 64, 48, 8.0, 3.0, 24, 0)


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "mp4"), ("libx265", "mp4"), ("libvpx-vp9", "webm")])
@pytest.mark.parametrize("span", [(0.0, None), (1.0, 2.5)])
def test_decord_gives_the_same_frames(tmp_path, codec, suffix, span):
    pytest.importorskip("decord", reason="decord has no wheel for this machine")
    path = make_video(tmp_path / f"a.{suffix}", codec=codec)
    by_name = read_clip(Clip(path, *span), reader="decord")
    assert by_name.reader.startswith("decord ")
    np.testing.assert_array_equal(by_name.frames, read_clip(Clip(path, *span), reader="pyav").frames)


def test_auto_means_pyav_where_decord_fails(tmp_path):
    pytest.importorskip("decord", reason="decord has no wheel for this machine")
    # decord 0.6 fails at this width.
    path = make_video(tmp_path / "a.mp4", size=(48, 32))
    with pytest.raises(VideoError, match="cannot be decoded by decord"):
        read_clip(Clip(path), reader="decord")
    assert read_clip(Clip(path)).reader.startswith("pyav")


def test_unknown_reader(video):
    with pytest.raises(ValueError, match="no video reader 'opencv'; choose from auto, torchcodec, decord, pyav"):
        read_clip(Clip(video), reader="opencv")


# Bad input


def test_missing_directory_and_pipe(tmp_path):
    with pytest.raises(VideoError, match=r"missing\.mp4 cannot be opened: No such file"):
        read_clip(Clip(tmp_path / "missing.mp4"))
    with pytest.raises(VideoError, match="is not a regular file"):
        read_clip(Clip(tmp_path))


@pytest.mark.parametrize("uri", ["https://example.org/a.mp4", "s3://bucket/a.mp4"])
def test_addresses_are_refused(uri):
    with pytest.raises(VideoError, match="is not a local file; download it first"):
        read_clip(Clip(uri))


def test_empty_and_text_and_sound(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match=r"empty\.mp4 is empty \(zero bytes\)"):
        read_clip(Clip(tmp_path / "empty.mp4"))
    (tmp_path / "text.mp4").write_text("This is not a video, whatever its name says.\n" * 50)
    with pytest.raises(VideoError, match=r"text\.mp4 cannot be read as a video: Invalid data"):
        read_clip(Clip(tmp_path / "text.mp4"))
    with pytest.raises(VideoError, match=r"sound\.m4a has no video stream, only audio"):
        read_clip(Clip(make_audio(tmp_path / "sound.m4a")))


def test_one_frame(tmp_path):
    with pytest.raises(VideoError, match="shows one frame from 0 s to its end; at least two are needed"):
        read_clip(Clip(make_video(tmp_path / "a.mp4", num_frames=1)))


def test_absurd_size_is_refused_by_its_header(tmp_path):
    wide = make_video(tmp_path / "a.mkv", num_frames=2, size=(10_000, 10), codec="ffv1")
    with pytest.raises(VideoError, match=f"10000 x 10 pixels; the limit is {MAX_SIDE} a side"):
        read_clip(Clip(wide))
    narrow = make_video(tmp_path / "b.mkv", num_frames=2, size=(16, 400), codec="ffv1")
    with pytest.raises(VideoError, match="16 x 400 pixels; the limit is 20 times"):
        read_clip(Clip(narrow))


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9")])
def test_truncated(tmp_path, suffix, codec, keep):
    path = make_video(tmp_path / f"a.{suffix}", num_frames=48, codec=codec)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(VideoError, match=str(path)):
        read_clip(Clip(path))


def test_cut_at_a_frame_says_how_much_is_there(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_frames(48), 8)  # header in front
    with av.open(str(path)) as container:
        # With B-frames the order in the file differs from that of showing; positions in the file are wanted here.
        positions = sorted(packet.pos for packet in container.demux(video=0) if packet.size)
    path.write_bytes(path.read_bytes()[: positions[21]])
    with pytest.raises(VideoError, match="cut short: it holds 21 of 48 frames"):
        read_clip(Clip(path))
    # What comes before the cut can be had.
    assert read_clip(Clip(path, 0.0, 1.0)).num_frames == 8


def test_cut_before_the_end_of_a_span_is_noticed(tmp_path):
    path = make_video(tmp_path / "a.mkv", num_frames=96, options={"g": "6"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(VideoError, match="cut short"):
        read_clip(Clip(path, 2.0, 11.0))


def test_damage_is_refused_or_harmless(tmp_path):
    path = make_video(tmp_path / "a.mp4", num_frames=48, options={"g": "12"})
    content = path.read_bytes()
    start, stop = content.index(b"mdat") + 800, content.index(b"moov")
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        damaged = bytearray(content)
        damaged[generator.integers(start, stop)] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            assert read_clip(Clip(path)).frames.shape == (16, 48, 64, 3)
        except VideoError:
            refused += 1
    assert refused >= 15
    damaged = bytearray(content)
    damaged[start:stop] = generator.bytes(stop - start)
    path.write_bytes(damaged)
    with pytest.raises(VideoError, match=str(path)):
        read_clip(Clip(path))


def test_memory_does_not_grow_with_length(tmp_path):
    code = (
        "import resource, sys\n"
        "from motionrag.video import Clip, read_clip\n"
        "read_clip(Clip(sys.argv[1], 0.0, 2.0))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "read_clip(Clip(sys.argv[1]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    # All frames in RGB would be 138 MB.
    path = make_video(tmp_path / "a.mp4", num_frames=600, size=(320, 240), options={"preset": "ultrafast"})
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes on Linux
    assert int(result.stdout) * unit < 30e6


# Writing


@pytest.mark.parametrize("size", [(64, 48), (65, 47), (33, 128)])
@pytest.mark.parametrize(("suffix", "fps"), [(".mp4", 8), (".mp4", 23.976), (".gif", 10), (".MP4", 30)])
def test_writing_keeps_size_rate_count_and_colours(tmp_path, size, suffix, fps):
    frames = moving_frames(17, size)
    path = write_video(tmp_path / f"a{suffix}", frames, fps)
    clip = read_clip(Clip(path), num_frames=17)
    assert clip.frames.shape == frames.shape
    assert clip.num_frames == 17
    assert clip.fps == pytest.approx(fps, rel=1e-3)
    # 4:2:0 halves the resolution of colour, and the moving square has sharp edges.
    assert psnr(clip.frames, frames) > 33
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_flat_colours_come_back(tmp_path, suffix):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 64, 200]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (6, 32, 48, 3))
    clip = read_clip(Clip(write_video(tmp_path / f"a{suffix}", frames, 8)), num_frames=6)
    assert np.abs(clip.frames.astype(int) - frames).max() <= 4


def test_equal_frames_are_kept(tmp_path):
    frames = np.repeat(moving_frames(2), 5, axis=0)
    for suffix in (".mp4", ".gif"):
        assert read_clip(Clip(write_video(tmp_path / f"a{suffix}", frames, 8))).num_frames == 10


def test_floats_and_images_are_written_like_bytes(tmp_path):
    frames = moving_frames(5)
    paths = [
        write_video(tmp_path / "bytes.mp4", frames, 8),
        write_video(tmp_path / "floats.mp4", frames / np.float32(255), 8),
        write_video(tmp_path / "images.mp4", [Image.fromarray(frame) for frame in frames], 8),
    ]
    decoded = [all_frames(path) for path in paths]
    np.testing.assert_array_equal(decoded[0], decoded[1])
    np.testing.assert_array_equal(decoded[0], decoded[2])


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        (np.zeros((4, 8, 8), np.uint8), r"shape \(t, h, w, 3\); these are \(4, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "shape"),
        (np.full((4, 8, 8, 3), -0.1), r"floats in \[0, 1\]"),
        (np.full((4, 8, 8, 3), np.nan), r"floats in \[0, 1\]"),
        (np.zeros((4, 8, 8, 3), np.int64), r"floats in \[0, 1\]"),
        ([], "images of one size"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], "images of one size"),
    ],
)
def test_frames_that_cannot_be_written(tmp_path, frames, reason):
    with pytest.raises(VideoError, match=reason):
        write_video(tmp_path / "a.mp4", frames, 8)
    assert not list(tmp_path.iterdir())


def test_other_suffix_and_rate(tmp_path):
    with pytest.raises(VideoError, match=r"suffix '\.avi'; write_video knows \.mp4 and \.gif"):
        write_video(tmp_path / "a.avi", moving_frames(2), 8)
    with pytest.raises(VideoError, match="at 0 frames per second"):
        write_video(tmp_path / "a.mp4", moving_frames(2), 0)


def test_the_same_frames_give_the_same_file(tmp_path):
    """These did not always: x264's mbtree on AVX-512 gave three files in 80."""
    frames = sample_clip(named_domain("zamp"), (0, 4), truth=False).frames
    files = {write_video(tmp_path / "a.mp4", frames, 8, full_colour=True).read_bytes() for _ in range(80)}
    assert len(files) == 1


def test_failed_write_leaves_the_old_file(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_frames(4), 8)
    before = path.read_bytes()
    with pytest.raises(VideoError, match="cannot be written"):
        write_video(path, np.zeros((2, 2, 40_000, 3), np.uint8), 8)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    "tag", [b"00:00:xx.000000000", b"one minute, or two", b"03.00000000000000 ", b"00:00:nan         "]
)
def test_malformed_duration_tag_states_nothing(tmp_path, tag):
    path = make_video(tmp_path / "a.mkv")
    content = path.read_bytes()
    assert content.count(b"00:00:03.000000000") == 1
    path.write_bytes(content.replace(b"00:00:03.000000000", tag))
    assert probe(path).duration_s == pytest.approx(3)  # as the container says
    assert read_clip(Clip(path), num_frames=4).num_frames == 24
