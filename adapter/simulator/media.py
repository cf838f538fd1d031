"""Media as the CDN and the phone see them: blobs, keys and references."""

import base64
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import quote

from msgspec import Struct

from adapter.simulator import ids, samples
from adapter.simulator.aes import BLOCK, decrypt, encrypt
from adapter.simulator.records import Json, MediaView, SimulatorError
from adapter.simulator.world import Bot, World

LARGEST_MEDIUM = 200 * 2**20
HEX_32 = re.compile("[0-9a-fA-F]{32}")
ITEMS = {"image": (2, "image_item"), "voice": (3, "voice_item"), "file": (4, "file_item"), "video": (5, "video_item")}
MEDIA_TYPES = {"image": 1, "video": 2, "file": 3, "voice": 4}
"""`media_type` of an upload. Item types have other numbers."""
SENT_FIELDS = {"image": {"mid_size"}, "voice": set(), "file": {"file_name", "len"}, "video": {"video_size"}}
"""Fields beside `media` in the payload of sent media."""
KEY_FORMS = ("usual", "hex", "raw_base64", "hex_base64", "none")
"""Place of an inbound key: the usual one of the kind; `image_item.aeskey`; `media.aes_key` with 24 or with 44
characters; or no key, with a blob in plain text."""


class UploadRequest(Struct, kw_only=True):
    """The fields of a `getuploadurl` request."""

    bot: str
    user: str
    filekey: str
    media_type: int
    size: int
    md5: str
    encrypted_size: int
    key: bytes


class Blob(Struct, kw_only=True):
    """Bytes on the CDN. `key` is None for plain bytes. `media_type` is 0 for media of users, the only ones that can
    be downloaded. `plain` is the size and MD5 of the content, or None if `key` does not decrypt it."""

    bot: str
    data: bytes
    key: bytes | None
    media_type: int = 0
    plain: tuple[int, str] | None

    @property
    def downloadable(self) -> bool:
        return not self.media_type


class SealedMedia(NamedTuple):
    """Encrypted content of a user, ready for the CDN."""

    name: str
    size: int
    md5: str
    playtime_ms: int
    key_form: str
    key: bytes | None
    data: bytes


def encrypted_size(size: int) -> int:
    return (size // BLOCK + 1) * BLOCK


def look_inside(data: bytes, key: bytes | None) -> tuple[int, str] | None:
    """Size and MD5 of the content, or None if the key does not fit. Slow for large media."""
    try:
        plain = data if key is None else decrypt(data, key)
    except ValueError:
        return None
    return len(plain), hashlib.md5(plain).hexdigest()


class MediaStore:
    """All blobs, oldest first. `cdn_url` returns the base URL of the CDN."""

    def __init__(self, world: World, cdn_url: Callable[[], str]) -> None:
        self._world = world
        self._cdn_url = cdn_url
        self.uploads: OrderedDict[str, UploadRequest] = OrderedDict()
        self.blobs: OrderedDict[str, Blob] = OrderedDict()
        self._bytes = 0

    def offer(self, bot: Bot, body: Json) -> Json:
        """The answer of `getuploadurl`."""
        settings = self._world.settings_of(bot)
        peer = body.get("to_user_id")
        known = isinstance(peer, str) and (peer == bot.user or peer in bot.windows)
        if not known and (settings.stranger_upload == "refused" or not isinstance(peer, str)):
            return {"ret": -1}
        upload = read_upload(bot, body)
        if upload is None:
            self._world.violate("wrong_upload", "getuploadurl", bot)
            return {"ret": -2}
        self._note_careless(bot, body)
        if settings.upload_ret:
            return {"ret": settings.upload_ret}
        if upload.media_type == MEDIA_TYPES["voice"] and settings.voice_sends == "refused":
            return {"ret": 2}
        answer = self._addresses(upload, settings.upload_url)
        if body.get("no_need_thumb") is not True and (thumb := read_thumb(upload, body)):
            answer["thumb_upload_param"] = self._expect(thumb)
        return answer

    def receive(self, upload: UploadRequest, data: bytes, plain: tuple[int, str] | None) -> str:
        """Stores an upload whose content under the registered key is `plain`. Returns its reference."""
        bot = self._world.bots[upload.bot]
        if plain != (upload.size, upload.md5.lower()):
            self._world.violate("wrong_ciphertext", "cdn/upload", bot)
        blob = Blob(bot=bot.id, data=data, key=upload.key, media_type=upload.media_type, plain=plain)
        return self._store(blob)

    def view(self, bot: Bot, item: Json) -> MediaView | None:
        """What the phone makes of a media item from a bot, or None if the item has no media."""
        kind = next((kind for kind, (number, _) in ITEMS.items() if number == item.get("type")), None)
        if kind is None:
            return None
        payload = item[ITEMS[kind][1]]
        media = payload.get("media")
        media = media if isinstance(media, dict) else {}
        reference = str(media.get("encrypt_query_param") or "")
        blob = self.blobs.get(reference)
        plain, why = open_blob(blob, media.get("aes_key"))
        faults = {
            f"media_{why}": bool(why),
            "media_fields": not has_shape(kind, item, payload, media),
            "media_wrong_type": blob is not None and blob.media_type not in (0, MEDIA_TYPES[kind]),
            "media_wrong_size": blob is not None and not sizes_agree(kind, payload, blob),
        }
        for fault in (fault for fault, found in faults.items() if found):
            self._world.violate(fault, "sendmessage", bot)
        size, md5 = plain or (0, "")
        name = str(payload.get("file_name") or "")
        return MediaView(
            kind=kind, reference=reference, file_name=name, size=size, md5=md5, viewable=not why, why=why
        )

    def plain(self, reference: str) -> bytes:
        """The decrypted bytes behind a reference."""
        blob = self.blobs.get(reference)
        if blob is None:
            raise SimulatorError("no such media, or no longer remembered")
        return blob.data if blob.key is None else decrypt(blob.data, blob.key)

    def seal(
        self,
        kind: str,
        content: bytes | None = None,
        *,
        sample: str | None = None,
        size: int | None = None,
        key_form: str = "usual",
    ) -> SealedMedia:
        """Encrypts what a user sends: `content` or a sample, cut or filled up to `size` bytes. Any thread may call
        it."""
        if kind not in ITEMS or key_form not in KEY_FORMS:
            raise SimulatorError(f"kinds: {', '.join(ITEMS)}; key forms: {', '.join(KEY_FORMS)}")
        name = "file.bin"
        if content is None:
            name, content = take_sample(sample or samples.OF_KIND[kind])
        if size is not None:
            if not 0 <= size <= LARGEST_MEDIUM:
                raise SimulatorError(f"media have up to {LARGEST_MEDIUM} bytes")
            content = content[:size] + samples.blob(max(size - len(content), 0))
        key = None if key_form == "none" else self._world.rng.randbytes(16)
        data = content if key is None else encrypt(content, key)
        md5, playtime_ms = hashlib.md5(content).hexdigest(), samples.silk_ms(content)
        return SealedMedia(name, len(content), md5, playtime_ms or 1500, key_form, key, data)

    def item(self, bot: Bot, kind: str, sealed: SealedMedia, url: str = "both", fields: Json | None = None) -> Json:
        """An inbound media item. `url`: `full`, `param` or `both`; `fields` are added to the payload."""
        if url not in ("full", "param", "both"):
            raise SimulatorError("url: full, param or both")
        number, name = ITEMS[kind]
        payload = {"media": self._inbound_media(bot, sealed.data, sealed.key, url), **media_fields(kind, sealed)}
        if kind in ("image", "video"):
            payload |= self._thumbnail(bot, sealed.key, url)
        write_key(payload, kind, sealed)
        return {"type": number, "is_completed": True, name: payload | (fields or {})}

    def _thumbnail(self, bot: Bot, key: bytes | None, url: str) -> Json:
        small = samples.jpeg(90, 60)
        data = small if key is None else encrypt(small, key)
        media = self._inbound_media(bot, data, key, url)
        if key is not None:
            media["aes_key"] = base64.b64encode(key).decode()
        return {"thumb_media": media, "thumb_size": len(data), "thumb_width": 90, "thumb_height": 60}

    def _inbound_media(self, bot: Bot, data: bytes, key: bytes | None, url: str) -> Json:
        reference = self._store(Blob(bot=bot.id, data=data, key=key, plain=None))
        quoted = quote(reference, safe="")
        taskid = f"{self._world.rng.getrandbits(64):x}"
        media: Json = {"encrypt_type": 1}
        if url != "full":
            media["encrypt_query_param"] = reference
        if url != "param":
            media["full_url"] = f"{self._cdn_url()}/download?encrypted_query_param={quoted}&taskid={taskid}"
        return media

    def _addresses(self, upload: UploadRequest, style: str) -> Json:
        """Addresses for the upload: a whole URL, a parameter for a URL that the client makes, or both."""
        param = self._expect(upload)
        full = (
            f"{self._cdn_url()}/upload?encrypted_query_param={quote(param, safe='')}"
            f"&filekey={upload.filekey}&taskid={self._world.rng.getrandbits(64):x}"
        )
        answer = {"upload_full_url": full, "upload_param": param}
        return answer if style == "both" else {f"upload_{style}": answer[f"upload_{style}"]}

    def _expect(self, upload: UploadRequest) -> str:
        param = self._reference()
        self.uploads[param] = upload
        while len(self.uploads) > 10_000:
            self.uploads.popitem(last=False)
        return param

    def _note_careless(self, bot: Bot, body: Json) -> None:
        """Records violations in a request that is otherwise valid."""
        if body.get("no_need_thumb") is not True:
            self._world.violate("thumb_wanted", "getuploadurl", bot)
        if any(str(body[name]) != str(body[name]).lower() for name in ("filekey", "rawfilemd5", "aeskey")):
            self._world.violate("upper_case_hex", "getuploadurl", bot)

    def _reference(self) -> str:
        """Always contains `+`, `/` and `=`: a client that does not quote it in a URL is noted (`unquoted_param`)."""
        return f"{ids.chars(self._world.rng, ids.BASE64, 60)}+/=="

    def _store(self, blob: Blob) -> str:
        reference = self._reference()
        self.blobs[reference] = blob
        self._bytes += len(blob.data)
        while self._bytes > self._world.settings.media_bytes_kept and len(self.blobs) > 1:
            _, oldest = self.blobs.popitem(last=False)
            self._bytes -= len(oldest.data)
        return reference


def read_upload(bot: Bot, body: Json) -> UploadRequest | None:
    """The upload that the request describes, or None if it breaks a rule of the protocol file, "getuploadurl"."""
    texts = [body.get(name) for name in ("filekey", "rawfilemd5", "aeskey")]
    sizes = [body.get(name) for name in ("rawsize", "filesize", "media_type")]
    if not all(isinstance(text, str) and HEX_32.fullmatch(text) for text in texts):
        return None
    if not all(type(size) is int and size >= 0 for size in sizes):
        return None
    size, padded, media_type = (int(number or 0) for number in sizes)
    if padded != encrypted_size(size) or not 1 <= media_type <= 4:
        return None
    filekey, md5, key = (str(text) for text in texts)
    return UploadRequest(
        bot=bot.id,
        user=str(body["to_user_id"]),
        filekey=filekey,
        media_type=media_type,
        size=size,
        md5=md5,
        encrypted_size=padded,
        key=bytes.fromhex(key),
    )


def read_thumb(upload: UploadRequest, body: Json) -> UploadRequest | None:
    """The upload of the thumbnail of an image or a video, or None if the request has no valid one."""
    if upload.media_type not in (MEDIA_TYPES["image"], MEDIA_TYPES["video"]):
        return None
    size, md5, padded = (body.get(f"thumb_{name}") for name in ("rawsize", "rawfilemd5", "filesize"))
    if type(size) is not int or size < 0 or not isinstance(md5, str) or padded != encrypted_size(size):
        return None
    return UploadRequest(
        bot=upload.bot,
        user=upload.user,
        filekey=upload.filekey,
        media_type=upload.media_type,
        size=size,
        md5=md5,
        encrypted_size=encrypted_size(size),
        key=upload.key,
    )


def open_blob(blob: Blob | None, key_text: Any) -> tuple[tuple[int, str] | None, str]:
    """Size and MD5 of the content under this key, or None with the reason why the phone cannot show it."""
    if blob is None or blob.key is None:
        return None, "unknown_reference"
    if not isinstance(key_text, str) or len(key_text) != 44:
        return None, "short_key"
    try:
        key = bytes.fromhex(base64.b64decode(key_text, validate=True).decode())
    except ValueError:
        return None, "wrong_key"
    plain = blob.plain if key == blob.key and blob.plain else look_inside(blob.data, key)
    return plain, "" if plain else "wrong_key"


def has_shape(kind: str, item: Json, payload: Json, media: Json) -> bool:
    """Whether a sent item has exactly the fields of the protocol file, "Outbound items".

    A file may also have an MD5 (T #10).
    """
    allowed = SENT_FIELDS[kind] | {"media"}
    optional = {"md5"} if kind == "file" else set()
    return (
        set(item) == {"type", ITEMS[kind][1]}
        and set(media) == {"encrypt_query_param", "aes_key", "encrypt_type"}
        and media["encrypt_type"] == 1
        and (kind == "voice" or set(payload) - optional == allowed)
    )


def sizes_agree(kind: str, payload: Json, blob: Blob) -> bool:
    """Whether the sizes are right: ciphertext bytes for images and videos, plaintext bytes as text for files."""
    match kind:
        case "image":
            return payload.get("mid_size") == len(blob.data)
        case "video":
            return payload.get("video_size") == len(blob.data)
        case "file":
            return blob.plain is None or payload.get("len") == str(blob.plain[0])
    return True


def take_sample(sample: str) -> tuple[str, bytes]:
    """File name and content of a sample."""
    if sample not in samples.SAMPLES:
        raise SimulatorError(f"unknown sample {sample}, there are {', '.join(samples.SAMPLES)}")
    name, make = samples.SAMPLES[sample]
    return name, make()


def media_fields(kind: str, sealed: SealedMedia) -> Json:
    """The fields beside `media` in an inbound payload."""
    fields: dict[str, Json] = {
        "image": {"mid_size": len(sealed.data)},
        "voice": {"encode_type": 6, "bits_per_sample": 16, "sample_rate": 24000, "playtime": sealed.playtime_ms},
        "file": {"file_name": sealed.name, "md5": sealed.md5, "len": str(sealed.size)},
        "video": {"video_size": len(sealed.data), "play_length": 1500, "video_md5": sealed.md5},
    }
    return fields[kind]


def write_key(payload: Json, kind: str, sealed: SealedMedia) -> None:
    """Writes the key where its kind has it: beside `media` in hex and in it raw for images, as hex text otherwise."""
    if sealed.key is None:
        return
    form, usual = sealed.key_form, sealed.key_form == "usual"
    if form == "hex" or (usual and kind == "image"):
        payload["aeskey"] = sealed.key.hex()
    if form == "raw_base64" or (usual and kind == "image"):
        payload["media"]["aes_key"] = base64.b64encode(sealed.key).decode()
    if form == "hex_base64" or (usual and kind != "image"):
        payload["media"]["aes_key"] = base64.b64encode(sealed.key.hex().encode()).decode()
