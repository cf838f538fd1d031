"""Uploads, the CDN, and media on the phone."""

import base64
import hashlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from adapter.simulator import FaultRule, samples
from adapter.simulator.aes import decrypt, encrypt
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
        ({"filekey": "short"}, -2),
        ({"aeskey": SHORT_KEY}, -2),
        ({"rawfilemd5": ""}, -2),
        ({"media_type": 9}, -2),
        ({"to_user_id": "o9cq80nobody@im.wechat"}, -1),
        ({"to_user_id": []}, -1),
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


async def test_s18_a_parameter_that_is_not_quoted_is_noted_and_served(make: MakeClient) -> None:
    client = await make(upload_url="param")
    client.sim.say_media(client.bot.user, "file", HELLO)
    (message,) = await client.follow()
    reference = message["item_list"][0]["file_item"]["media"]["encrypt_query_param"]
    offer = await client.call("getuploadurl", upload(client))
    cdn, filekey = client.sim.cdn_url, upload(client)["filekey"]

    got = await client.http.get(f"{cdn}/download?encrypted_query_param={reference}")
    url = f"{cdn}/upload?encrypted_query_param={offer['upload_param']}&filekey={filekey}"
    sent = await client.http.post(url, content=encrypt(HELLO, KEY), headers=OCTETS)

    assert (got.status_code, sent.status_code, bool(sent.headers["x-encrypted-param"])) == (200, 200, True)
    assert [v.kind for v in client.sim.violations()] == ["unquoted_param", "unquoted_param"]


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


async def test_f24_and_f25_strike_the_media_of_one_user(talking: Client) -> None:
    await talking.follow()
    other = Client(talking.sim, talking.sim.add_bot(), talking.http)
    talking.sim.say(other.bot.user, "hello")
    await other.follow()
    for fault in ("F24", "F25"):
        talking.sim.set_fault(FaultRule(fault=fault, user=talking.bot.user, params={"status": 503}))

    statuses = []
    for client in (talking, other):
        url = (await client.call("getuploadurl", upload(client)))["upload_full_url"]
        statuses.append((await client.http.post(url, content=encrypt(HELLO, KEY), headers=OCTETS)).status_code)
        statuses.append((await download(client)).status_code)

    assert statuses == [503, 503, 200, 200]


async def test_f4_to_f6_strike_downloads_too(client: Client) -> None:
    client.sim.set_fault(FaultRule(fault="F4", endpoint="cdn/download", count=1, params={"chunk": 5, "pause_ms": 1}))
    assert len((await download(client)).content) == 16

    client.sim.set_fault(FaultRule(fault="F5", endpoint="cdn/download", count=1, params={"hang_ms": 20}))
    assert len((await download(client)).content) == 16

    client.sim.set_fault(FaultRule(fault="F6", endpoint="cdn/download", count=1))
    with pytest.raises(httpx.TransportError):
        await download(client)
    assert [rule.struck for rule in client.sim.faults()] == [1, 1, 1]


async def test_f5_and_f6_strike_uploads_too(talking: Client) -> None:
    """After a reset `before` nothing is stored, `after` the reference is merely not told."""
    talking.sim.set_fault(FaultRule(fault="F5", endpoint="cdn/upload", count=1, params={"hang_ms": 20}))
    assert await put(talking)
    stored = len(talking.sim.media.blobs)

    for when, more in (("before", 0), ("after", 1)):
        talking.sim.set_fault(FaultRule(fault="F6", endpoint="cdn/upload", count=1, params={"when": when}))
        with pytest.raises(httpx.TransportError):
            await put(talking)
        assert len(talking.sim.media.blobs) == stored + more
    assert [rule.struck for rule in talking.sim.faults()] == [1, 1, 1]


async def download(client: Client) -> httpx.Response:
    client.sim.say_media(client.bot.user, "file", HELLO)
    (message,) = await client.follow()
    return await client.http.get(message["item_list"][0]["file_item"]["media"]["full_url"])


async def test_s17_bad_manners_that_change_nothing(talking: Client) -> None:
    shouting: Json = {"aeskey": KEY.hex().upper().replace("0", "A"), "no_need_thumb": None}

    assert "upload_full_url" in await talking.call("getuploadurl", upload(talking, **shouting))

    assert talking.sim.stats().violations == {"thumb_wanted": 1, "upper_case_hex": 1}


async def test_s17_a_thumbnail_may_go_along(talking: Client) -> None:
    thumb: Json = {
        "media_type": 1,
        "no_need_thumb": False,
        "thumb_rawsize": 14,
        "thumb_rawfilemd5": hashlib.md5(HELLO).hexdigest(),
        "thumb_filesize": 16,
    }
    body = upload(talking, **thumb)
    param = (await talking.call("getuploadurl", body))["thumb_upload_param"]
    params = {"encrypted_query_param": param, "filekey": body["filekey"]}

    url = f"{talking.sim.cdn_url}/upload"
    response = await talking.http.post(url, params=params, content=encrypt(HELLO, KEY), headers=OCTETS)

    assert response.headers["x-encrypted-param"]
    assert "thumb_upload_param" not in await talking.call(
        "getuploadurl", upload(talking, **thumb | {"media_type": 3})
    )


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda item: None, []),
        (lambda item: item.update(msg_id=None), []),
        (lambda item: item["file_item"].update(md5=hashlib.md5(HELLO).hexdigest()), []),
        (lambda item: item["file_item"].update(len=14), ["media_wrong_size"]),
        (lambda item: item["file_item"].pop("file_name"), ["media_fields"]),
        (lambda item: item["file_item"]["media"].update(encrypt_type=0), ["media_fields"]),
        (lambda item: item.update(create_time_ms=1), ["media_fields"]),
    ],
)
async def test_s19_fields_that_the_official_shape_does_not_have_are_noted(
    talking: Client, change: Callable[[Json], None], kinds: list[str]
) -> None:
    item = file_item(await put(talking), LONG_KEY)
    change(item)

    assert (await talking.send(item_list=[item]))["ret"] == 0

    assert [violation.kind for violation in talking.sim.violations()] == kinds
    assert talking.sim.phone(talking.bot.user)[0].media[0].viewable


async def test_s19_an_upload_of_another_type_and_size_is_noted(talking: Client) -> None:
    media = file_item(await put(talking), LONG_KEY)["file_item"]["media"]

    await talking.send(item_list=[{"type": 5, "video_item": {"media": media, "video_size": 14}}])

    assert set(talking.sim.stats().violations) == {"media_wrong_type", "media_wrong_size"}


@pytest.mark.parametrize(("kind", "sample"), samples.OF_KIND.items())
async def test_s20_media_without_content_are_samples(client: Client, kind: str, sample: str) -> None:
    name, make_sample = samples.SAMPLES[sample]
    client.sim.say_kind(client.bot.user, kind)
    (message,) = await client.follow()
    payload = message["item_list"][0][f"{kind}_item"]

    assert await opened(client, payload) == make_sample()
    if kind == "file":
        assert (payload["file_name"], payload["len"]) == (name, str(len(make_sample())))
    if kind == "voice":
        assert payload["playtime"] == 1000
    if kind in ("image", "video"):
        thumb = await client.http.get(payload["thumb_media"]["full_url"])
        assert len(thumb.content) == payload["thumb_size"]
        key = base64.b64decode(payload["thumb_media"]["aes_key"])
        assert decrypt(thumb.content, key) == samples.jpeg(payload["thumb_width"], payload["thumb_height"])


async def opened(client: Client, payload: Json) -> bytes:
    """As a client of WeChat opens what it gets."""
    key = payload.get("aeskey") or base64.b64decode(payload["media"]["aes_key"]).decode()
    return decrypt((await client.http.get(payload["media"]["full_url"])).content, bytes.fromhex(key))


@pytest.mark.parametrize("size", [0, 2000])
async def test_s20_a_sample_is_made_as_long_as_wanted(client: Client, size: int) -> None:
    client.sim.say_media(client.bot.user, "file", sample="zip", size=size)
    (message,) = await client.follow()
    content = await opened(client, message["item_list"][0]["file_item"])

    assert len(content) == size
    assert content[:100] == samples.archive()[:size][:100]


async def test_media_over_http(client: Client) -> None:
    content = base64.b64encode(HELLO).decode()
    admin = client.sim.admin_url
    arguments = {"to": client.bot.user, "kind": "file", "content": content, "fields": {"file_name": "a"}}
    assert (await client.http.post(f"{admin}/say_media", json=arguments)).status_code == 200
    (message,) = await client.follow()
    reference = message["item_list"][0]["file_item"]["media"]["encrypt_query_param"]

    answer = await client.http.get(f"{admin}/media", params={"reference": reference})

    assert answer.json() == {"content": content}
