"""The sample media: the same bytes everywhere, and good enough for those who read them."""

import hashlib
import io
import zipfile
from collections.abc import Callable

import imagesize
import pytest

from adapter.simulator import samples

PICTURES = [samples.png, samples.jpeg, samples.gif]
DIGESTS = [
    ("png", 929, "20d83b4e91af2508"),
    ("jpeg", 177, "38fef7aedb311a21"),
    ("gif", 3532, "401a8c3fa26c5f1e"),
    ("wav", 48044, "cd2fe1743f632f5d"),
    ("silk", 2460, "88986a19e9c3931d"),
    ("mp4", 1148, "3e8de7b4c1bce184"),
    ("pdf", 579, "7ab47ec1dc26f758"),
    ("zip", 130, "0ba22f8339a64688"),
    ("text", 28, "a0b94e6c4b8fbeb2"),
    ("blob", 1000, "95c60cb137f64775"),
    ("empty", 0, "e3b0c44298fc1c14"),
]


@pytest.mark.parametrize(("name", "size", "digest"), DIGESTS)
def test_a_sample_has_the_same_bytes_on_every_machine(name: str, size: int, digest: str) -> None:
    _, make = samples.SAMPLES[name]
    content = make()
    assert (len(content), hashlib.sha256(content).hexdigest()[:16]) == (size, digest)


def test_every_sample_is_compared() -> None:
    assert [name for name, _, _ in DIGESTS] == list(samples.SAMPLES)
    assert set(samples.OF_KIND.values()) <= set(samples.SAMPLES)


@pytest.mark.parametrize("make", PICTURES)
@pytest.mark.parametrize("size", [(1, 1), (65, 17)])
def test_a_picture_has_the_size_that_was_asked_for(make: Callable[[int, int], bytes], size: tuple[int, int]) -> None:
    assert imagesize.get(io.BytesIO(make(*size))) == size


@pytest.mark.parametrize("make", [*PICTURES, lambda seed: samples.blob(1000, seed)])
def test_another_seed_makes_other_bytes(make: Callable[..., bytes]) -> None:
    assert len({make(seed=seed) for seed in range(20)}) == 20


def test_the_archive_opens() -> None:
    with zipfile.ZipFile(io.BytesIO(samples.archive("你好.txt", b"content"))) as archive:
        assert archive.read("你好.txt") == b"content"


def test_the_paper_knows_where_its_parts_are() -> None:
    paper = samples.pdf("Hello")
    table = paper.index(b"xref\n0 6")
    assert paper.endswith(b"startxref\n%d\n%%%%EOF\n" % table)
    for number in range(1, 6):
        place = int(paper[table:].split(b"\n")[2 + number][:10])
        assert paper[place:].startswith(b"%d 0 obj" % number)


def test_the_text_has_characters_of_every_length() -> None:
    words = samples.text(1000).decode()
    assert {len(character.encode()) for character in words} == {1, 2, 3, 4}
    assert len(words.encode()) >= 1000
