"""What bytes are, and SILK as WAV."""

from __future__ import annotations

import io
import struct
import wave

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter.simulator import samples
from adapter.tools import media_types
from adapter.tools.media_types import Kind, identify, silk_duration_ms, silk_to_wav, wav_duration_ms

SILK = samples.silk(1.0)
RIFF = samples.wav(2.0)


@pytest.mark.parametrize(
    ("head", "name", "expected"),
    [
        pytest.param(samples.png(640, 480), "", Kind("image/png", 640, 480, ".png"), id="png"),
        pytest.param(samples.jpeg(64, 48), "a.png", Kind("image/jpeg", 64, 48, ".jpg"), id="jpeg_named_png"),
        pytest.param(samples.gif(30, 20), "", Kind("image/gif", 30, 20, ".gif"), id="gif"),
        pytest.param(samples.png()[:20], "", Kind("image/png", None, None, ".png"), id="png_cut_off"),
        pytest.param(samples.mp4(), "", Kind("video/mp4", None, None, ".mp4"), id="mp4"),
        pytest.param(samples.pdf(), "", Kind("application/pdf", None, None, ".pdf"), id="pdf"),
        pytest.param(samples.archive(), "", Kind("application/zip", None, None, ".zip"), id="zip"),
        pytest.param(
            samples.archive(),
            "B.DOCX",
            Kind("application/vnd.openxmlformats-officedocument.wordprocessingml.document", None, None, ".docx"),
            id="docx",
        ),
        pytest.param(samples.archive(), "a.png", Kind("application/zip", None, None, ".zip"), id="zip_named_png"),
        pytest.param(RIFF, "", Kind("audio/wav", None, None, ".wav"), id="wav"),
        pytest.param(SILK, "", Kind("audio/silk", None, None, ".silk"), id="silk"),
        pytest.param(SILK[1:], "a.mp3", Kind("audio/silk", None, None, ".silk"), id="silk_without_the_byte"),
        pytest.param(b"\x02#!SILK", "", Kind("application/octet-stream", None, None, ""), id="no_silk"),
        pytest.param("a\tb\r\n你好".encode(), "", Kind("text/plain", None, None, ".txt"), id="text"),
        pytest.param("你好".encode()[:-1], "", Kind("text/plain", None, None, ".txt"), id="text_cut_in_a_character"),
        pytest.param(b'{"a": 1}', "x.json", Kind("application/json", None, None, ".json"), id="json"),
        pytest.param(b"\x00\x01{}", "x.json", Kind("application/octet-stream", None, None, ""), id="no_json"),
        pytest.param(b"a\x00b", "", Kind("application/octet-stream", None, None, ""), id="control"),
        pytest.param(b"a\x9fb", "", Kind("application/octet-stream", None, None, ""), id="latin"),
        pytest.param("a\x9fb".encode(), "", Kind("application/octet-stream", None, None, ""), id="control_c1"),
        pytest.param(b"", "a.txt", Kind("application/octet-stream", None, None, ""), id="empty"),
    ],
)
def test_content_says_what_a_file_is(head: bytes, name: str, expected: Kind) -> None:
    assert identify(head, name) == expected


@given(st.binary(max_size=300), st.text(max_size=20))
def test_anything_is_something(head: bytes, name: str) -> None:
    for prefix in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"\0\0\0\x18ftypheic", b"RIFF\0\0\0\0WEBP"):
        kind = identify(prefix + head, name)
        assert "/" in kind.mime
        assert (kind.width is None) == (kind.height is None)


# recordings ----------------------------------------------------------------------------------------------


def test_silk_becomes_wav_of_the_same_length() -> None:
    made = silk_to_wav(SILK)
    assert made is not None
    with wave.open(io.BytesIO(made)) as recording:
        assert (recording.getframerate(), recording.getnchannels(), recording.getsampwidth()) == (24_000, 1, 2)
        assert recording.getnframes() == 24_000
        sound = recording.readframes(24_000)
    assert len(set(sound)) > 50, "it is not silence"
    assert wav_duration_ms(made) == silk_duration_ms(SILK) == 1000
    assert identify(made).mime == "audio/wav"


def test_silk_without_wechats_byte_and_with_the_usual_end_is_read_too() -> None:
    assert silk_to_wav(SILK[1:]) == silk_to_wav(SILK) == silk_to_wav(SILK + b"\xff\xff")


def test_a_broken_end_costs_the_end() -> None:
    made = silk_to_wav(SILK[:-5])
    assert made is not None
    assert wav_duration_ms(made) == 980


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no silk",
        b"\x02#!SILK_V3",
        b"\x02#!SILK_V3\xff",
        b"\x02#!SILK_V3\xff\xff",
        b"\x02#!SILK_V3\x10\x00short",
        b"\x02#!SILK_V3\xff\x7f" + bytes(40_000),
        b"\x02#!SILK_V3" + (struct.pack("<h", 900) + b"\xff" * 900) * 5,
        SILK + bytes(media_types.SILK_MAX_BYTES),
        SILK[:10] + b"\x01\x00\x00" * (media_types.SILK_MAX_FRAMES + 1),
    ],
)
def test_what_is_no_recording_becomes_none(data: bytes) -> None:
    assert silk_to_wav(data) is None


@given(st.binary(max_size=200), st.integers(10, len(SILK)))
def test_no_bytes_break_the_decoder(noise: bytes, at: int) -> None:
    silk_to_wav(SILK[:at] + noise + SILK[at:])


def test_without_the_library_there_is_no_wav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_types, "pysilk", None)
    assert silk_to_wav(SILK) is None
    assert silk_duration_ms(SILK) == 1000


def test_a_recording_ends_where_a_frame_is_longer_than_the_decoder_takes() -> None:
    frames = [bytes(size) for size in (media_types.SILK_FRAME_MAX, media_types.SILK_FRAME_MAX + 1, 10)]
    data = b"\x02#!SILK_V3" + b"".join(struct.pack("<h", len(frame)) + frame for frame in frames)
    assert silk_duration_ms(data) == media_types.SILK_FRAME_MS


def test_a_recording_that_is_longer_than_any_has_no_length() -> None:
    """Frames of a byte would take seconds to be counted."""
    frame = b"\x01\x00x"
    longest = SILK[:10] + frame * media_types.SILK_MAX_FRAMES
    assert silk_duration_ms(longest) == 600_000
    assert silk_duration_ms(longest + frame) is None


BEYOND = b"RIFF$\0\0\0WAVEfmt_\xff\xff\xff\xffdata"
"""A part that is longer than the whole."""


@pytest.mark.parametrize("data", [b"", b"RIFF", RIFF[:30], SILK, b"RIFF\0\0\0\0WAVE", BEYOND])
def test_no_wav_has_no_length(data: bytes) -> None:
    assert wav_duration_ms(data) is None


def test_a_wav_says_its_length_at_its_head() -> None:
    assert wav_duration_ms(RIFF) == wav_duration_ms(RIFF[:100]) == 2000
    assert silk_duration_ms(RIFF) is None
