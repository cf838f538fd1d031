"""Identifies media (type, picture size, duration) and converts WeChat's voice format to WAV. No I/O."""

from __future__ import annotations

import codecs
import io
import re
import struct
import unicodedata
import wave
from collections.abc import Iterator
from itertools import islice
from pathlib import PurePosixPath
from typing import NamedTuple

import filetype
import imagesize

try:
    import pysilk
except ImportError:  # the extra `voice` is not installed
    pysilk = None
HAS_VOICE = pysilk is not None
"""Whether SILK is converted to WAV."""

HEAD = 64 * 1024
"""First bytes of a file, which are enough for `identify`."""
SILK_MAX_BYTES = 5_000_000
SILK_RATE = 24_000
SILK_MARK = b"#!SILK_V3"
SILK_FRAME_MS = 20
SILK_FRAME_MAX = SILK_RATE // 1000 * 2 * SILK_FRAME_MS
"""Above the size of any frame of WeChat's, and above what the decoder accepts."""
SILK_MAX_FRAMES = 10 * 60 * 1000 // SILK_FRAME_MS
"""Ten minutes, where WeChat records one. Tiny frames must not become gigabytes."""

OCTETS = "application/octet-stream"
_USUAL = {"audio/x-wav": "audio/wav"}
"""Common names of types for which filetype returns an older one."""
_OFFICE = "application/vnd.openxmlformats-officedocument"
_BY_NAME = {
    "text/plain": {
        ".csv": "text/csv",
        ".html": "text/html",
        ".json": "application/json",
        ".md": "text/markdown",
        ".xml": "application/xml",
    },
    "application/zip": {
        ".apk": "application/vnd.android.package-archive",
        ".docx": f"{_OFFICE}.wordprocessingml.document",
        ".epub": "application/epub+zip",
        ".pptx": f"{_OFFICE}.presentationml.presentation",
        ".xlsx": f"{_OFFICE}.spreadsheetml.sheet",
    },
}
"""Types that only a file name distinguishes. The name counts only if the content does not contradict it."""

_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories that are removed from file names."""
NO_NAMES = (".", "..")
"""File names that are folders for whoever stores the file."""


class Kind(NamedTuple):
    """The type of a file."""

    mime: str
    width: int | None
    height: int | None
    """Pixels as shown; None: unknown from the head."""
    suffix: str
    """With its dot; "" for an unknown type."""


def identify(head: bytes, name: str = "") -> Kind:
    """The type of a file that starts with `head` (HEAD bytes, or all of it). `name`: from the sender."""
    head = head[:HEAD]
    mime, suffix = _mime_by_content(head)
    width, height = _pixel_size(head) if mime.startswith("image/") else (None, None)
    ending = PurePosixPath(name).suffix.lower()
    if known := _BY_NAME.get(mime, {}).get(ending):
        return Kind(known, width, height, ending)
    return Kind(mime, width, height, suffix)


def file_name(kind: str, suffix: str) -> str:
    """A name for media without one: `image.jpg`, `voice.silk`. `kind`: an item's kind, or the first word of a type. A
    kind that means little to people (`application`) becomes `file`."""
    return f"{kind if kind in ('image', 'video', 'voice', 'audio') else 'file'}{suffix}"


def clean_file_name(name: str, most: int) -> str:
    """A file name of at most `most` characters, without folders, control and invisible characters. A name that is
    too long keeps its ending."""
    name = "".join(c for c in re.split(r"[/\\]", name)[-1] if unicodedata.category(c) not in _UNSEEN).strip(" .")
    if len(name) <= most:
        return name
    stem, dot, ending = name.rpartition(".")
    return f"{stem[: most - len(ending) - 1]}.{ending}" if dot and len(ending) < 16 else name[:most]


def is_silk(head: bytes) -> bool:
    """WeChat puts a byte 2 before the format's mark (docs/reference/ilink-protocol.md, "Voice")."""
    return head.removeprefix(b"\x02").startswith(SILK_MARK)


def silk_duration_ms(data: bytes) -> int | None:
    """Duration of a complete SILK recording; None: it is none, or longer than SILK_MAX_FRAMES."""
    count = sum(1 for _ in islice(_silk_frames(data), SILK_MAX_FRAMES + 1)) if is_silk(data) else None
    return None if count is None or count > SILK_MAX_FRAMES else count * SILK_FRAME_MS


def wav_duration_ms(data: bytes) -> int | None:
    """Duration of a WAV recording, from its header; None: it is none."""
    try:
        with wave.open(io.BytesIO(data)) as recording:
            frames, rate = recording.getnframes(), recording.getframerate()
    except (wave.Error, EOFError, struct.error, RuntimeError):  # RuntimeError: a chunk exceeds the file
        return None
    return int(frames * 1000 / rate) if rate else None


def silk_to_wav(data: bytes) -> bytes | None:
    """Converts SILK to WAV: 24 kHz, 16 bits, one channel. Takes up to seconds, so it runs in a thread.

    None: the extra `voice` is not installed, or the recording is broken, too large or too long.
    """
    if pysilk is None or len(data) > SILK_MAX_BYTES or not is_silk(data):
        return None
    frames = list(_silk_frames(data))
    if not 0 < len(frames) <= SILK_MAX_FRAMES:
        return None
    # the decoder is C code without checks, so it gets only complete frames of a valid size
    source = io.BytesIO(SILK_MARK + b"".join(struct.pack("<h", len(frame)) + frame for frame in frames))
    sound = io.BytesIO()
    try:
        pysilk.decode(source, sound, SILK_RATE)
    except pysilk.SilkError:
        return None
    out = io.BytesIO()
    with wave.open(out, "wb") as recording:
        recording.setnchannels(1)
        recording.setsampwidth(2)
        recording.setframerate(SILK_RATE)
        recording.writeframes(sound.getvalue())
    return out.getvalue()


def _silk_frames(data: bytes) -> Iterator[bytes]:
    """The frames of a SILK recording, up to its end, a negative length or a broken frame."""
    at = len(SILK_MARK) + data.startswith(b"\x02")
    while at + 2 <= len(data):
        (size,) = struct.unpack_from("<h", data, at)
        at += 2
        if not 0 < size <= SILK_FRAME_MAX or at + size > len(data):
            return
        yield data[at : at + size]
        at += size


def _mime_by_content(head: bytes) -> tuple[str, str]:
    if is_silk(head):
        return "audio/silk", ".silk"
    if found := filetype.guess(head):
        return _USUAL.get(found.mime, str(found.mime)), f".{found.extension}"
    if _is_text(head):
        return "text/plain", ".txt"
    return OCTETS, ""


def _is_text(head: bytes) -> bool:
    """Whether it is UTF-8 without control characters. The head may end within a character."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(text) and not any(unicodedata.category(c) == "Cc" and c not in "\t\n\r\f" for c in text)


def _pixel_size(head: bytes) -> tuple[int | None, int | None]:
    width, height = imagesize.get(io.BytesIO(head))
    return (int(width), int(height)) if width > 0 and height > 0 else (None, None)
