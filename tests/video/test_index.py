# SPDX-License-Identifier: Apache-2.0
"""Which frames are taken of files whose headers or packets say other than what a decoder gives."""

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image
from video_files import decode_all, hidden_copy, pictures, write_file

from transformers_vamba import VambaVideoProcessor, forecast_memory
from transformers_vamba.video.index import NO_TIME, Packets, Probe, TimedMetadata, build_index, can_trust
from transformers_vamba.video.sources import FileView


@pytest.fixture
def unresized():
    """Takes frames as they are, so that they can be compared with those of a plain decoder."""
    return VambaVideoProcessor(size={"shortest_edge": 28, "longest_edge": 84})


def assert_sampled(video_processor, path, indices=None, **sampling):
    """The frames of a file by number and by time are those of a plain decoder, also a segment at a time."""
    frames, times = decode_all(path)
    read, metadata = video_processor.fetch_videos(str(path))
    assert metadata.total_num_frames == len(frames)
    assert np.array_equal(read, np.stack(frames))
    outputs = video_processor(path, return_metadata=True, **sampling)
    chosen = outputs["video_metadata"][0].frames_indices
    if indices is not None:
        assert chosen.tolist() == list(indices)
    expected = video_processor(np.stack(frames)[chosen], do_sample_frames=False, input_data_format="channels_last")
    assert torch.equal(outputs["pixel_values_videos"], expected["pixel_values_videos"])
    np.testing.assert_allclose(outputs["video_metadata"][0].timestamps, np.array(times)[chosen], atol=0.002)
    return chosen


def insert_hidden(bit, every_pts):
    def change(packets):
        changed = []
        for packet in packets:
            changed.append(packet)
            if packet.is_keyframe:
                changed.append(hidden_copy(packet, bit, packet.pts + every_pts))
        return changed

    return change


@pytest.mark.parametrize(("codec", "bit"), [("libvpx", 4), ("libvpx-vp9", 1)])
@pytest.mark.parametrize("later", [0, 1])
def test_hidden_frames_are_not_counted(unresized, tmp_path, codec, bit, later):
    options = {"auto-alt-ref": "0", "lag-in-frames": "0", "g": "10", "keyint_min": "10", "deadline": "realtime"}
    path = write_file(
        tmp_path / "hidden.webm", pictures(40), codec, 10, options=options, change=insert_hidden(bit, later)
    )
    with av.open(path) as container:
        num_packets = sum(packet.size > 0 for packet in container.demux(video=0))
    assert num_packets > 40 or codec == "libvpx-vp9"  # the muxer joins those of VP9 with the next one
    assert_sampled(unresized, path, [4, 14, 24, 34], num_frames=4)
    assert_sampled(unresized, path, [5, 15, 25, 35], fps=1.0)


def fields(num_frames, step=3600):
    """Packets of pairs of fields, and what the decoder gives of the first: a frame for two packets."""
    pts = np.arange(2 * num_frames) * (step // 2)
    flags = np.ones(len(pts), dtype=bool)
    return Packets(pts, flags, flags, ~flags), [int(time) for time in pts[::2][:24]]


def test_a_packet_for_each_field_is_noticed():
    packets, given = fields(50)
    assert not can_trust(packets, Probe(given, (48, 64), True, False))
    frames = Packets(*(values[::2] for values in vars(packets).values()))
    assert can_trust(frames, Probe(given, (48, 64), True, False))
    # frames at the beginning, pairs of fields later on
    later = np.sort(np.concatenate([frames.pts, frames.pts[40:] + 1800]))
    flags = np.ones(len(later), dtype=bool)
    assert not can_trust(Packets(later, flags, flags, ~flags), Probe(given, (48, 64), True, False))
    for change in ({"is_key": ~flags}, {"is_corrupt": flags}, {"pts": np.full(len(later), NO_TIME)}):
        changed = Packets(**{**vars(Packets(later, flags, flags, ~flags)), **change})
        assert not can_trust(changed, Probe(given, (48, 64), False, False))


def test_recording_that_begins_between_keyframes(unresized, tmp_path):
    path = write_file(
        tmp_path / "cut.ts",
        pictures(60),
        options={"x264-params": "keyint=20:scenecut=0:bframes=2"},
        change=lambda packets: packets[7:],
    )
    frames, _ = decode_all(path)
    assert 20 < len(frames) < 53
    assert_sampled(unresized, path, num_frames=8)
    assert_sampled(unresized, path, fps=10.0)


@pytest.mark.parametrize("name", ["stated.mkv", "stated.flv"])
def test_stated_rate_is_not_believed(unresized, tmp_path, name):
    times = [round(i * 1000 / 30) for i in range(90)]
    codec = {"codec": "libx264", "rate": 1000, "times": times, "options": {"bf": "0"}}
    path = write_file(tmp_path / name, pictures(90), **codec)
    with av.open(path) as container:
        assert container.streams.video[0].average_rate > 500
    chosen = assert_sampled(unresized, path, fps=1.0)
    assert chosen.tolist() == [15, 45]  # of three, the last one fills no temporal patch


def irregular(num_frames, seed=0):
    """Times in milliseconds as screen recordings have them: bursts, and pauses of up to four seconds."""
    steps = np.random.default_rng(seed).choice([5, 17, 33, 400, 900], num_frames, p=[0.3, 0.3, 0.2, 0.1, 0.1])
    steps[num_frames // 2] = 4000
    return [0, *np.cumsum(steps[1:]).tolist()]


@pytest.mark.parametrize("name", ["varying.mkv", "varying.mp4", "varying.ts"])
def test_variable_rate_is_sampled_by_time(unresized, tmp_path, name):
    times = irregular(120)
    path = write_file(tmp_path / name, pictures(120), times=times, options={"g": "20"})
    seconds = np.array(times) / 1000
    chosen = assert_sampled(unresized, path, fps=1.0)
    for index in chosen:  # each is the nearest to the middle of its second, or of one of them in a pause
        middles = np.arange(0.5, seconds[-1] + 0.5)
        nearest = np.abs(seconds[:, None] - middles).argmin(axis=0)
        assert index in nearest
    assert len(chosen) >= len(np.unique(nearest)) - 1
    middles = (np.arange(8) + 0.5) * seconds[-1] / 8
    chosen = assert_sampled(unresized, path, num_frames=8)
    assert len(np.unique(chosen)) == 8
    assert np.abs(seconds[chosen] - middles).max() <= np.diff(seconds).max()
    assert len(assert_sampled(unresized, path, num_frames=120)) == 120


def test_all_sources_give_the_same_frames(processor, tmp_path):
    path = Path(write_file(tmp_path / "varying.mkv", pictures(120), times=irregular(120), options={"g": "20"}))
    for sampling in ({"fps": 1.0}, {"num_frames": 10}, {"fps": 3.0, "max_frames": 6}):
        expected = processor(videos=[str(path)], return_tensors="pt", **sampling)["pixel_values_videos"]
        for source in (path.read_bytes(), open(path, "rb"), path.as_uri(), {"bytes": None, "path": str(path)}):
            outputs = processor(videos=[source], return_tensors="pt", **sampling)
            assert torch.equal(outputs["pixel_values_videos"], expected)
            segments = processor.iter_video_segments(source, segment_frames=4, **sampling)
            assert torch.equal(torch.cat([segment["pixel_values_videos"] for segment in segments]), expected)
        if sampling == {"fps": 1.0}:
            live = processor.iter_video_segments(open(path, "rb"), live=True, **sampling)
            assert torch.equal(torch.cat([segment["pixel_values_videos"] for segment in live]), expected)


def test_times_without_a_rate(unresized, tmp_path):
    path = write_file(tmp_path / "no rate.ts", pictures(25), "mpeg4", 25, options={"g": "10"})
    assert_sampled(unresized, path, [4, 12], fps=3.0, max_frames=3)
    assert_sampled(unresized, path, range(24), num_frames=25)


def test_stated_count_is_not_believed(unresized, tmp_path):
    path = Path(write_file(tmp_path / "count.avi", pictures(40), "mpeg4", 10))
    content = bytearray(path.read_bytes())
    header, stream = content.index(b"avih") + 24, content.index(b"strh") + 40
    for at in (header, stream):
        content[at : at + 4] = (55).to_bytes(4, "little")
    path.write_bytes(content)
    assert_sampled(unresized, path, [4, 14, 24, 34], num_frames=4)


def test_avi_with_gaps(unresized, tmp_path):
    def drop(packets):
        return [packet for i, packet in enumerate(packets) if i not in (1, 2, 20)]

    path = write_file(tmp_path / "gaps.avi", pictures(40), "mpeg4", 10, options={"g": "5"}, change=drop)
    assert_sampled(unresized, path, fps=1.0)


def test_rate_of_a_file_can_be_given(video_processor, tmp_path):
    path = tmp_path / "still.gif"
    Image.fromarray(pictures(1, 56, 84)[0]).save(path)
    with pytest.raises(ValueError, match="pass `video_metadata` with its `fps`"):
        video_processor(path, fps=1.0)
    for metadata in ([{"total_num_frames": 1, "fps": 10.0}], [{"total_num_frames": None, "fps": 10}]):
        outputs = video_processor(path, fps=1.0, video_metadata=metadata, return_metadata=True)
        assert outputs["video_metadata"][0].fps == 10.0
    path = write_file(tmp_path / "slow.mp4", pictures(40), rate=10)
    outputs = video_processor(
        path, fps=1.0, video_metadata=[{"total_num_frames": 40, "fps": 20}], return_metadata=True
    )
    assert outputs["video_metadata"][0].frames_indices.tolist() == [10, 30]


def two_tracks(path, small_disposition=None):
    """A preview of two small frames before the film."""
    with av.open(str(path), "w") as container:
        streams = []
        for codec, size in (("mjpeg", 32), ("libx264", 96)):
            stream = container.add_stream(codec, rate=10)
            stream.height = stream.width = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            streams.append(stream)
        if small_disposition is not None:
            streams[0].disposition = small_disposition
        for stream, count in zip(streams, (1, 20), strict=True):
            for array in pictures(count, stream.height, stream.width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(stream.encode(None))
    return str(path)


@pytest.mark.parametrize("disposition", [None, Disposition.attached_pic])
def test_best_stream_is_the_video(video_processor, tmp_path, disposition):
    outputs = video_processor(two_tracks(tmp_path / "two.mp4", disposition), return_metadata=True)
    metadata = outputs["video_metadata"][0]
    assert (metadata.total_num_frames, metadata.height, metadata.width) == (20, 96, 96)


def test_sound_with_a_cover_is_no_video(video_processor, tmp_path):
    sound = tmp_path / "sound.wav"
    with wave.open(str(sound), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    path = tmp_path / "cover.m4a"
    with av.open(str(sound)) as source, av.open(str(path), "w", format="mp4") as container:
        picture = container.add_stream("mjpeg", rate=1)
        picture.height = picture.width = 32
        picture.pix_fmt, picture.disposition = "yuvj420p", Disposition.attached_pic
        audio = container.add_stream("aac", rate=8000)
        container.mux(picture.encode(av.VideoFrame.from_ndarray(pictures(1, 32, 32)[0], format="rgb24")))
        container.mux(picture.encode(None))
        for frame in source.decode(audio=0):
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    with pytest.raises(ValueError, match="cover.m4a' as a video: it has no video stream, only a cover picture"):
        video_processor(path)


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("flips", [{}, {"hflip": True}, {"vflip": True}])
def test_pictures_are_turned_and_mirrored(video_processor, tmp_path, turn, flips):
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:24, :32], upright[:24, 32:], upright[24:, :32] = 240, 160, 80  # each quarter of its own grey
    path = write_file(
        tmp_path / "turned.mp4",
        [upright] * 4,
        options={"crf": "5"},
        prepare=lambda stream: stream.set_display_rotation(turn, **flips),
    )
    expected = np.rot90(upright, turn // 90)
    expected = expected[:, ::-1] if "hflip" in flips else expected[::-1] if "vflip" in flips else expected
    frames, metadata = video_processor.fetch_videos(path)
    assert frames.shape[1:] == expected.shape == (metadata.height, metadata.width, 3)
    assert np.abs(frames[1].astype(int) - expected).mean() < 4


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(2), 128), (Fraction(1, 2), 32), (Fraction(16, 15), 68)])
def test_pixels_become_square(video_processor, tmp_path, aspect, width):
    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = aspect

    path = write_file(tmp_path / "wide.mkv", pictures(4), prepare=prepare)
    frames, metadata = video_processor.fetch_videos(path)
    assert frames.shape == (4, 48, width, 3) and (metadata.height, metadata.width) == (48, width)


def test_animated_avif(video_processor, tmp_path):
    path = write_file(
        tmp_path / "animated.avif",
        pictures(12, 64, 64),
        "libsvtav1",
        container_format="avif",
        options={"preset": "12"},
    )
    assert video_processor(path, return_metadata=True)["video_metadata"][0].total_num_frames == 12


@pytest.mark.parametrize(("height", "width"), [(3, 1000), (1, 1000), (1000, 3), (4, 300)])
def test_thin_videos(tmp_path, height, width):
    video_processor = VambaVideoProcessor(size={"shortest_edge": 28, "longest_edge": 1000})
    frames = pictures(4, height, width)
    path = write_file(tmp_path / "thin.mkv", frames, "ffv1", pix_fmt="bgr0")
    assert np.array_equal(video_processor.fetch_videos(path)[0], np.stack(frames))
    expected = video_processor(path, do_sample_frames=False)
    images = [Image.fromarray(frame) for frame in frames]
    assert torch.equal(video_processor(images)["pixel_values_videos"], expected["pixel_values_videos"])
    array = video_processor(np.stack(frames), input_data_format="channels_last")
    assert torch.equal(array["pixel_values_videos"], expected["pixel_values_videos"])


def damage_unit(path, number, length=40):
    """Overwrites the beginning of one packet of a file."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
    content = bytearray(Path(path).read_bytes())
    at = content.index(bytes(packet))
    content[at : at + length] = b"\xff" * length
    Path(path).write_bytes(content)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_one_damaged_unit(processor, tmp_path, caplog, codec):
    whole = write_file(tmp_path / "damaged.mp4", pictures(50), codec, 10, options={"g": "10", "bf": "0"})
    before = np.stack(decode_all(whole)[0])
    damage_unit(whole, 33)
    for read in (lambda **kwargs: processor(videos=[whole], **kwargs), processor.iter_video_segments):
        with pytest.raises(ValueError, match=r"damaged.mp4' as a video: it is damaged near 3\.\d s.*on_damage='skip'"):
            args = () if read != processor.iter_video_segments else (whole,)
            list(read(*args, num_frames=50))
    outputs = processor(videos=[whole], num_frames=100, on_damage="skip", return_metadata=True, return_tensors="pt")
    assert outputs["video_metadata"][0].total_num_frames == 49
    assert any("damaged near 3." in message for message in caplog.messages)
    segments = processor.iter_video_segments(whole, num_frames=100, on_damage="skip")
    assert torch.equal(torch.cat([s["pixel_values_videos"] for s in segments]), outputs["pixel_values_videos"])
    frames, _ = VambaVideoProcessor(on_damage="skip").fetch_videos(whole)
    assert np.array_equal(frames[:30], before[:30])


def test_skipping_what_a_truncated_file_lacks(video_processor, write_video, tmp_path, caplog):
    content = Path(write_video("whole.mp4", options={"movflags": "faststart"})).read_bytes()
    path = tmp_path / "truncated.mp4"
    path.write_bytes(content[:-1])
    outputs = video_processor(path, on_damage="skip", num_frames=100, return_metadata=True)
    assert outputs["video_metadata"][0].total_num_frames == 23
    assert any("only 23 of its 24 frames are there" in message for message in caplog.messages)
    with pytest.raises(ValueError, match="`on_damage` must be 'raise' or 'skip', got 'ignore'"):
        video_processor(path, on_damage="ignore")


@pytest.mark.parametrize("name", ["cut.mkv", "cut.avi"])
def test_cut_off_recordings_are_not_shortened_without_a_word(video_processor, tmp_path, caplog, name):
    path = Path(write_file(tmp_path / name, pictures(60), "mpeg4", options={"g": "10"}))
    video_processor(path)
    assert not caplog.messages
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    try:
        video_processor(path)
    except ValueError:
        return
    (message,) = caplog.messages
    assert f"{name}': the file is truncated, " in message and "bytes are missing at its end" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><html><body>Not found</body></html>", "this is an HTML page"),
        (b"<html>" + bytes(5000), "this is an HTML page"),
        (b"\0\1\2\3" * 1000, "it is no video, or its beginning is damaged or missing: Invalid data"),
    ],
)
def test_messages_name_the_kind(processor, tmp_path, content, message):
    path = tmp_path / "what.mp4"
    path.write_bytes(content)
    for read in (lambda: processor(videos=[str(path)]), lambda: list(processor.iter_video_segments(path))):
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert "Errno" not in str(error.value)


def test_animated_webp_is_an_error_that_names_it(processor, tmp_path):
    images = [Image.fromarray(frame) for frame in pictures(3)]
    path = tmp_path / "animated.webp"
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    from transformers_vamba import VambaConfig

    for read in (lambda: forecast_memory(VambaConfig(), processor, path), lambda: processor(videos=[str(path)])):
        with pytest.raises(ValueError, match="animated.webp' as a video: "):
            read()


def test_metadata_tells_times():
    metadata = TimedMetadata(total_num_frames=3, fps=1.0, frame_times=np.array([0.0, 0.2, 2.0]), frames_indices=[0, 2])
    assert metadata.timestamps == [0.0, 2.0]
    metadata = TimedMetadata(total_num_frames=3, fps=2.0, frames_indices=[0, 2])
    assert metadata.timestamps == [0.0, 1.0]


def test_clock_that_is_set_back(tmp_path):
    """As where recordings are put one after another: time goes on."""
    path = tmp_path / "both.ts"
    first = write_file(tmp_path / "a.ts", pictures(30), rate=10)
    second = write_file(tmp_path / "b.ts", pictures(30, seed=1), rate=10)
    path.write_bytes(Path(first).read_bytes() + Path(second).read_bytes())
    with open(path, "rb") as file:
        metadata = build_index(FileView(file)).metadata
    assert metadata.total_num_frames == 60
    assert metadata.duration == pytest.approx(6.0, abs=0.5)
