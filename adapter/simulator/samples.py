"""Small media files made in code. The bytes are the same on every machine: no compression library or floats are used.

Each file is complete enough for programs that read its kind. Another `seed` makes other bytes. `blob` makes files of
any size.
"""

import base64
import hashlib
import struct
import zlib
from collections.abc import Callable, Iterable

PALETTE = bytes.fromhex("1aad19 ffffff 2e86de f39c12")
"""Colours of pictures, each as red, green and blue."""
SILK_HEAD = b"\x02#!SILK_V3"
SILK_TENTH = base64.b64decode(
    "JwCY5A42qwLvYl2vVboGlg/P9F3yOHXLLa/wanKx4IeRum/aMFqdBQ85AI5LlhcwAFxTOXYzT32XUPcMJLKTO9WMKKZ/jM+s9KrZ"
    "LSBA4FRwiTCOgVVBdGHSvMRWz8knHSkkfzIAjFwDoaUQv2brfRpbdVuS3QiaktdNDbxhODbhu4oj2wJmyZyy3M9d6lodlAMlLCl5"
    "o38tAIxcA6GlD1K7WH0VlzFEN6OPcVWAOU3ibIWEw+ZKh9dcHOOF8OGqx+cyF5T/fywAjFwDoaUPUrtYfRbCpO0A4RDrrvMpuB9a"
    "kWDe/RSqOgeuznbswyq7genLZj8="
)
"""A tenth of a second of a 440 Hz tone: five SILK frames, each after its length."""


def blob(size: int, seed: int = 0) -> bytes:
    """`size` bytes in no known file format. 100 MB take 0.3 s."""
    return hashlib.shake_128(b"blob %d" % seed).digest(size)


def text(size: int = 0) -> bytes:
    """At least `size` bytes of UTF-8, with characters of one to four bytes."""
    line = "Hello, 你好, héllo, 😀\n".encode()
    return line * max(1, -(-size // len(line)))


def png(width: int = 64, height: int = 48, seed: int = 0) -> bytes:
    """Stripes in four colours. A pixel takes two bits, so 4000 by 3000 pixels take 3 MB."""
    row_bytes = -(-width // 4)
    rows = [bytes([byte]) * row_bytes for byte in (0b00011011, 0b01101100, 0b10110001, 0b11000110)]
    raw = b"".join(b"\0" + rows[(y // 8 + seed) % 4] for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 2, 3, 0, 0, 0)
    comment = b"Comment\0" + str(seed).encode()
    chunks = [(b"IHDR", head), (b"PLTE", PALETTE), (b"tEXt", comment), (b"IDAT", zlib_stored(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def zlib_stored(data: bytes) -> bytes:
    """A zlib stream without compression, which is the same in every version of zlib."""
    starts = range(0, max(len(data), 1), 65_535)
    blocks = (
        struct.pack("<BHH", start + 65_535 >= len(data), len(part), len(part) ^ 0xFFFF) + part
        for start in starts
        for part in [data[start : start + 65_535]]
    )
    return b"\x78\x01" + b"".join(blocks) + struct.pack(">I", zlib.adler32(data))


def jpeg(width: int = 64, height: int = 48, seed: int = 0) -> bytes:
    """One shade of grey, chosen by `seed`. Each block of 8 by 8 pixels takes two bits."""
    blocks = -(-width // 8) * -(-height // 8)
    # First block: the code of a 7-bit difference, the shade, no waves. Other blocks: no difference, no waves.
    bits = "10" + f"{64 + seed % 64:07b}" + "0" + "00" * (blocks - 1)
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\x00")
    return b"".join(
        [
            b"\xff\xd8",
            segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"),
            segment(0xFE, str(seed).encode()),
            segment(0xDB, b"\0" + b"\x08" * 64),
            segment(0xC0, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"),
            segment(0xC4, b"\x00" + bytes([1, 1]) + bytes(14) + bytes([0, 7])),  # codes 0 and 10
            segment(0xC4, b"\x10" + bytes([1]) + bytes(15) + bytes([0])),  # code 0: end of block
            segment(0xDA, b"\1\1\0\0\x3f\0"),
            scan,
            b"\xff\xd9",
        ]
    )


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def gif(width: int = 64, height: int = 48, seed: int = 0) -> bytes:
    """Stripes in four colours, with one byte per pixel."""
    pixels = bytes((x // 8 + seed) % 4 for x in range(width)) * height
    # One code of eight bits per pixel: code 0x80 resets the dictionary before codes grow to nine bits.
    codes = b"".join(b"\x80" + pixels[start : start + 100] for start in range(0, len(pixels), 100)) + b"\x81"
    comment = str(seed).encode()
    parts = (codes[start : start + 255] for start in range(0, len(codes), 255))
    colours = PALETTE + bytes(3 * 124)
    return b"".join(
        [
            b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF6, 0, 0) + colours,
            b"!\xfe" + bytes([len(comment)]) + comment + b"\0",
            b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\7",
            *(bytes([len(part)]) + part for part in parts),
            b"\0;",
        ]
    )


def wav(seconds: float = 1.0, rate: int = 24_000) -> bytes:
    """A triangle wave of about 440 Hz with 16 bits in one channel."""
    period = rate // 440
    wave = [abs(4 * n * 8000 // period - 16_000) - 8000 for n in range(period)]
    samples = round(seconds * rate)
    sound = (struct.pack(f"<{period}h", *wave) * (samples // period + 1))[: 2 * samples]
    form = struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16)
    return riff(b"WAVE", [(b"fmt ", form), (b"data", sound)])


def riff(kind: bytes, chunks: Iterable[tuple[bytes, bytes]]) -> bytes:
    body = kind + b"".join(name + struct.pack("<I", len(data)) + data for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def silk(seconds: float = 1.0) -> bytes:
    """WeChat's voice format: a 440 Hz tone in steps of 0.1 s, for decoders at 24 kHz."""
    return SILK_HEAD + SILK_TENTH * max(1, round(seconds * 10))


def silk_ms(content: bytes) -> int:
    """Length of a voice, at 20 ms a frame; 0 for content that is not SILK."""
    place, frames = len(SILK_HEAD), 0
    while content.startswith(SILK_HEAD) and place + 2 <= len(content):
        place += 2 + int.from_bytes(content[place : place + 2], "little")
        frames += place <= len(content)
    return 20 * frames


def mp4(size: int = 1000, seconds: float = 1.5) -> bytes:
    """A long but empty film: it has no tracks, and `size` bytes that no track uses."""
    duration_ms = round(seconds * 1000)
    matrix = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    header = struct.pack(">IIIIIIH10x", 0, 0, 0, 1000, duration_ms, 0x10000, 0x100) + matrix + bytes(24)
    movie = box(b"mvhd", header + struct.pack(">I", 1))
    return box(b"ftyp", b"isom\0\0\2\0isommp42") + box(b"moov", movie) + box(b"mdat", blob(size))


def box(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data) + 8) + name + data


def pdf(words: str = "Hello") -> bytes:
    """One page that shows `words` (ASCII without brackets)."""
    drawing = f"BT /F1 24 Tf 20 50 Td ({words}) Tj ET".encode("ascii")
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 100] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawing), drawing),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    document, places = b"%PDF-1.4\n", b""
    for number, content in enumerate(objects, 1):
        places += b"%010d 00000 n \n" % len(document)
        document += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, places)
    trailer = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(document))
    return document + table + trailer


def archive(name: str = "hello.txt", content: bytes = b"Hello, iLink!\n") -> bytes:
    """A ZIP file with one uncompressed file, dated 1 January 1980."""
    raw_name = name.encode()
    facts = struct.pack(
        "<HHHHHIIIHH", 20, 0x800, 0, 0, 0x21, zlib.crc32(content), len(content), len(content), len(raw_name), 0
    )
    local = b"PK\3\4" + facts + raw_name + content
    central = b"PK\1\2" + struct.pack("<H", 20) + facts + struct.pack("<HHHII", 0, 0, 0, 0, 0) + raw_name
    return local + central + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)


SAMPLES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "png": ("picture.png", png),
    "jpeg": ("picture.jpg", jpeg),
    "gif": ("picture.gif", gif),
    "wav": ("sound.wav", wav),
    "silk": ("voice.silk", silk),
    "mp4": ("film.mp4", mp4),
    "pdf": ("paper.pdf", pdf),
    "zip": ("archive.zip", archive),
    "text": ("hello.txt", text),
    "blob": ("blob.bin", lambda: blob(1000)),
    "empty": ("empty.bin", lambda: b""),
}
"""The file name of each sample, and the function that makes its content."""
OF_KIND = {"image": "png", "voice": "silk", "file": "pdf", "video": "mp4"}
"""The sample of each kind of media item."""
