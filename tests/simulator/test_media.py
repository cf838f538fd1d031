"""S17 to S20, F24 and F25: uploads, the CDN, and media on the phone."""

import base64
import hashlib
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7
from hypothesis import given
from hypothesis import strategies as st

from adapter.simulator import FaultRule
from adapter.simulator.aes import decrypt, encrypt, round_keys
from adapter.simulator.media import encrypted_size
from tests.simulator.client import Client
from tests.simulator.conftest import MakeClient

Json = dict[str, Any]
KEY = bytes.fromhex("00112233445566778899aabbccddeeff")
OCTETS = {"Content-Type": "application/octet-stream"}
HELLO = b"Hello, iLink!\n"


@pytest.fixture
async def talking(client: Client) -> Client:
    client.sim.say(client.bot.user, "hello")
    await client.follow()
    return client


@pytest.mark.parametrize(
    ("plain", "cipher"),
    [
        (HELLO, "2885903dc8e9b6789c026204471849a2"),
        (b"", "00657ea140655a44782747705d422fad"),
        (b"0123456789abcdef", "aebdd39b144089d5e31cacd35b7a113a00657ea140655a44782747705d422fad"),
        ("你好，微信".encode(), "cca2d43e89ec974f3d24abf2c42b994c"),
    ],
)
def test_the_vectors_of_9_3(plain: bytes, cipher: str) -> None:
    assert encrypt(plain, KEY).hex() == cipher
    assert decrypt(bytes.fromhex(cipher), KEY) == plain
    assert encrypted_size(len(plain)) == len(cipher) // 2


def test_the_example_of_the_standard() -> None:
    """FIPS 197, appendices A.1 and C.1; the padding is a block of its own."""
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    assert round_keys(key)[10].hex() == "d014f9a8c9ee2589e13f0cc8b6630ca6"
    plain = bytes.fromhex("00112233445566778899aabbccddeeff")
    assert encrypt(plain, bytes(range(16)))[:16].hex() == "69c4e0d86a7b0430d8cdb78070b4c55a"


@given(st.binary(max_size=100), st.binary(min_size=16, max_size=16))
def test_aes_agrees_with_a_library_and_with_itself(plain: bytes, key: bytes) -> None:
    padder = PKCS7(128).padder()
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    expected = encryptor.update(padder.update(plain) + padder.finalize()) + encryptor.finalize()

    assert encrypt(plain, key) == expected
    assert decrypt(expected, key) == plain


@pytest.mark.parametrize("data", [b"", b"x", bytes(16)])
def test_what_cannot_be_decrypted(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"16|padding"):
        decrypt(data, KEY)


def upload(client: Client, content: bytes = HELLO, **changes: Any) -> Json:
    return {
        "filekey": "0f1e2d3c4b5a69788796a5b4c3d2e1f0",
        "media_type": 3,
        "to_user_id": client.bot.user,
        "rawsize": len(content),
        "rawfilemd5": hashlib.md5(content).hexdigest(),
        "filesize": encrypted_size(len(content)),
        "no_need_thumb": True,
        "aeskey": KEY.hex(),
    } | changes


async def put(client: Client, content: bytes = HELLO, key: bytes = KEY) -> str:
    """The reference of a finished upload."""
    url = (await client.call("getuploadurl", upload(client, content)))["upload_full_url"]
    response = await client.http.post(url, content=encrypt(content, key), headers=OCTETS)
    assert response.status_code == 200
    return str(response.headers["x-encrypted-param"])


def file_item(reference: str, key: str) -> Json:
    media = {"encrypt_query_param": reference, "aes_key": key, "encrypt_type": 1}
    return {"type": 4, "file_item": {"media": media, "file_name": "hello.txt", "len": "14"}}


LONG_KEY = base64.b64encode(KEY.hex().encode()).decode()
SHORT_KEY = base64.b64encode(KEY).decode()


@pytest.mark.parametrize(
    ("changes", "ret"),
    [
        ({"filesize": 14}, -2),
        ({"filesize": "16"}, -2),
        ({"rawsize": None}, -2),
        ({"filekey": "short"}, -2),
        ({"aeskey": SHORT_KEY}, -2),
        ({"rawfilemd5": ""}, -2),
        ({"media_type": 9}, -2),
        ({"to_user_id": "o9cq80nobody@im.wechat"}, -1),
    ],
)
async def test_s17_a_wrong_request_gets_no_url(talking: Client, changes: Json, ret: int) -> None:
    assert await talking.call("getuploadurl", upload(talking, **changes)) == {"ret": ret}


@pytest.mark.parametrize(
    ("style", "keys"),
    [
        ("full_url", {"upload_full_url"}),
        ("param", {"upload_param"}),
        ("both", {"upload_full_url", "upload_param"}),
    ],
)
async def test_s17_the_url_comes_in_three_ways(make: MakeClient, style: str, keys: set[str]) -> None:
    client = await make(upload_url=style)

    answer = await client.call("getuploadurl", upload(client))

    assert set(answer) == keys
    url = answer.get("upload_full_url") or httpx.URL(
        f"{client.sim.cdn_url}/upload",
        params={"encrypted_query_param": answer["upload_param"], "filekey": upload(client)["filekey"]},
    )
    assert (await client.http.post(url, content=encrypt(HELLO, KEY), headers=OCTETS)).status_code == 200


async def test_s18_only_post_and_only_the_announced_length(talking: Client) -> None:
    url = (await talking.call("getuploadurl", upload(talking)))["upload_full_url"]

    assert (await talking.http.put(url, content=encrypt(HELLO, KEY))).status_code == 404
    short = await talking.http.post(url, content=b"short", headers=OCTETS)
    assert (short.status_code, bool(short.headers["x-error-message"])) == (400, True)
    unknown = await talking.http.post(f"{talking.sim.cdn_url}/upload?encrypted_query_param=x&filekey=y")
    assert unknown.status_code == 400


async def test_s18_wrong_encryption_is_noted(talking: Client) -> None:
    await put(talking)
    assert talking.sim.violations() == []

    await put(talking, key=bytes(16))
    assert [violation.kind for violation in talking.sim.violations()] == ["wrong_ciphertext"]


async def test_s18_a_token_is_not_for_the_cdn(talking: Client) -> None:
    url = (await talking.call("getuploadurl", upload(talking)))["upload_full_url"]
    headers = OCTETS | {"Authorization": f"Bearer {talking.bot.token}"}
    await talking.http.post(url, content=encrypt(HELLO, KEY), headers=headers)

    assert [violation.kind for violation in talking.sim.violations()] == ["token_on_cdn"]


async def test_s19_the_phone_opens_what_was_uploaded(talking: Client) -> None:
    reference = await put(talking)

    await talking.send(item_list=[file_item(reference, LONG_KEY)])

    (view,) = talking.sim.phone(talking.bot.user)[0].media
    assert (view.kind, view.file_name, view.size, view.viewable) == ("file", "hello.txt", 14, True)
    assert view.md5 == hashlib.md5(HELLO).hexdigest()
    assert talking.sim.media_content(view.reference) == HELLO
    assert talking.sim.violations() == []


@pytest.mark.parametrize(
    ("reference", "key", "why"),
    [
        ("", SHORT_KEY, "short_key"),
        ("upload_param or anything else", LONG_KEY, "unknown_reference"),
        ("", base64.b64encode(bytes(16).hex().encode()).decode(), "wrong_key"),
    ],
)
async def test_s19_what_is_accepted_and_cannot_be_viewed(talking: Client, reference: str, key: str, why: str) -> None:
    reference = reference or await put(talking)

    assert (await talking.send(item_list=[file_item(reference, key)]))["ret"] == 0

    (view,) = talking.sim.phone(talking.bot.user)[0].media
    assert (view.viewable, view.why) == (False, why)
    assert [violation.kind for violation in talking.sim.violations()] == [f"media_{why}"]


async def test_s19_a_bot_cannot_download_its_own_upload(talking: Client) -> None:
    params = {"encrypted_query_param": await put(talking)}
    response = await talking.http.get(f"{talking.sim.cdn_url}/download", params=params)

    assert (response.status_code, response.text) == (400, "invalid encrypted_param")


@pytest.mark.parametrize("kind", ["image", "voice", "file", "video"])
@pytest.mark.parametrize("key_form", ["usual", "hex", "raw_base64", "hex_base64", "none"])
async def test_s20_inbound_media_with_every_form_of_key(client: Client, kind: str, key_form: str) -> None:
    client.sim.say_media(client.bot.user, kind, HELLO, key_form=key_form)
    (message,) = await client.follow()
    payload = message["item_list"][0][f"{kind}_item"]

    by_url = await client.http.get(payload["media"]["full_url"])
    params = {"encrypted_query_param": payload["media"]["encrypt_query_param"]}
    by_param = await client.http.get(f"{client.sim.cdn_url}/download", params=params)

    assert by_url.content == by_param.content
    keys = []
    if "aeskey" in payload:
        keys.append(bytes.fromhex(payload["aeskey"]))
    if "aes_key" in payload["media"]:
        raw = base64.b64decode(payload["media"]["aes_key"])
        keys.append(raw if len(raw) == 16 else bytes.fromhex(raw.decode()))
    assert bool(keys) == (key_form != "none")
    for key in keys:
        assert decrypt(by_url.content, key) == HELLO
    assert keys or by_url.content == HELLO


@pytest.mark.parametrize(("url", "keys"), [("full", {"full_url"}), ("param", {"encrypt_query_param"})])
async def test_s20_inbound_media_with_one_address_only(client: Client, url: str, keys: set[str]) -> None:
    client.sim.say_media(client.bot.user, "file", HELLO, url=url, file_name="a.txt")

    (message,) = await client.follow()

    payload = message["item_list"][0]["file_item"]
    assert set(payload["media"]) - {"encrypt_type", "aes_key"} == keys
    assert (payload["file_name"], payload["len"]) == ("a.txt", "14")


@pytest.mark.parametrize(
    ("params", "statuses"),
    [
        ({"kind": "rejected"}, [400, 400]),
        ({"kind": "error", "status": 503}, [503, 503]),
        ({"kind": "no_header"}, [200, 200]),
    ],
)
async def test_f24_uploads_fail(talking: Client, params: Json, statuses: list[int]) -> None:
    talking.sim.set_fault(FaultRule(fault="F24", count=2, params=params))
    url = (await talking.call("getuploadurl", upload(talking)))["upload_full_url"]
    responses = [await talking.http.post(url, content=encrypt(HELLO, KEY), headers=OCTETS) for _ in range(3)]

    assert [response.status_code for response in responses] == [*statuses, 200]
    assert ["x-encrypted-param" in response.headers for response in responses] == [False, False, True]
    assert ("x-error-message" in responses[0].headers) == (params["kind"] == "rejected")


async def test_f24_the_host_is_down(talking: Client) -> None:
    talking.sim.set_fault(FaultRule(fault="F24", params={"kind": "down"}))
    url = (await talking.call("getuploadurl", upload(talking)))["upload_full_url"]

    with pytest.raises(httpx.TransportError):
        await talking.http.post(url, content=encrypt(HELLO, KEY), headers=OCTETS)


@pytest.mark.parametrize("status", [403, 404, 500])
async def test_f25_downloads_fail(client: Client, status: int) -> None:
    client.sim.set_fault(FaultRule(fault="F25", params={"status": status}))

    assert (await download(client)).status_code == status


@pytest.mark.parametrize("kind", ["wrong_key", "odd_length"])
async def test_f25_downloads_that_cannot_be_decrypted(client: Client, kind: str) -> None:
    client.sim.set_fault(FaultRule(fault="F25", params={"kind": kind}))

    response = await download(client)

    assert response.status_code == 200
    assert (len(response.content) % 16 != 0) == (kind == "odd_length")


async def test_f4_to_f6_strike_downloads_too(client: Client) -> None:
    client.sim.set_fault(FaultRule(fault="F4", endpoint="cdn/download", count=1, params={"chunk": 5, "pause_ms": 1}))
    assert len((await download(client)).content) == 16

    client.sim.set_fault(FaultRule(fault="F5", endpoint="cdn/download", count=1, params={"hang_ms": 20}))
    assert len((await download(client)).content) == 16

    client.sim.set_fault(FaultRule(fault="F6", endpoint="cdn/download", count=1))
    with pytest.raises(httpx.TransportError):
        await download(client)
    assert [rule.struck for rule in client.sim.faults()] == [1, 1, 1]


async def download(client: Client) -> httpx.Response:
    client.sim.say_media(client.bot.user, "file", HELLO)
    (message,) = await client.follow()
    return await client.http.get(message["item_list"][0]["file_item"]["media"]["full_url"])


async def test_media_over_http(client: Client) -> None:
    content = base64.b64encode(HELLO).decode()
    admin = client.sim.admin_url
    arguments = {"to": client.bot.user, "kind": "file", "content": content, "fields": {"file_name": "a"}}
    assert (await client.http.post(f"{admin}/say_media", json=arguments)).status_code == 200
    (message,) = await client.follow()
    reference = message["item_list"][0]["file_item"]["media"]["encrypt_query_param"]

    answer = await client.http.get(f"{admin}/media", params={"reference": reference})

    assert answer.json() == {"content": content}
