"""Media as the CDN and the phone see them: blobs, keys and references (section 9, S17 to S20)."""

import base64
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from msgspec import Struct

from adapter.simulator import ids
from adapter.simulator.aes import BLOCK, decrypt, encrypt
from adapter.simulator.records import Json, MediaView, SimulatorError
from adapter.simulator.world import Bot, World

BYTES_KEPT = 256 * 2**20
HEX_32 = re.compile("[0-9a-fA-F]{32}")
ITEMS = {"image": (2, "image_item"), "voice": (3, "voice_item"), "file": (4, "file_item"), "video": (5, "video_item")}
KEY_FORMS = ("usual", "hex", "raw_base64", "hex_base64", "none")
"""Where an inbound key stands: as usual for its kind; `image_item.aeskey`; `media.aes_key` of 24 or of 44
characters; or nowhere, with a blob in plain text."""


class Upload(Struct, kw_only=True):
    """What `getuploadurl` was told; `reference` is set once the bytes have come."""

    bot: str
    filekey: str
    media_type: int
    size: int
    md5: str
    encrypted_size: int
    key: bytes
    reference: str = ""


class Blob(Struct, kw_only=True):
    """Bytes on the CDN. `key` None: plain. A bot's own uploads cannot be downloaded by it (9.1)."""

    bot: str
    data: bytes
    key: bytes | None
    downloadable: bool


def encrypted_size(size: int) -> int:
    return (size // BLOCK + 1) * BLOCK


class Media:
    """All blobs, oldest first. `base_url` tells where this server is reached."""

    def __init__(self, world: World, base_url: Callable[[], str]) -> None:
        self._world = world
        self._base_url = base_url
        self.uploads: OrderedDict[str, Upload] = OrderedDict()
        self.blobs: OrderedDict[str, Blob] = OrderedDict()
        self._bytes = 0

    def offer(self, bot: Bot, body: Json) -> Json:
        """The answer of `getuploadurl` (3.5, S17)."""
        peer = body.get("to_user_id")
        if peer != bot.user and peer not in bot.windows:
            return {"ret": -1}
        upload = read_upload(bot, body)
        if upload is None:
            self._world.violate("wrong_upload", "getuploadurl", bot)
            return {"ret": -2}
        param = self._reference()
        self.uploads[param] = upload
        while len(self.uploads) > 10_000:
            self.uploads.popitem(last=False)
        full = (
            f"{self._base_url()}/c2c/upload?encrypted_query_param={quote(param, safe='')}"
            f"&filekey={upload.filekey}&taskid={self._world.rng.getrandbits(64):x}"
        )
        style = self._world.settings_of(bot).upload_url
        answer = {"upload_full_url": full, "upload_param": param}
        return answer if style == "both" else {f"upload_{style}": answer[f"upload_{style}"]}

    def receive(self, upload: Upload, data: bytes) -> str:
        """Stores an upload, after a look at the client's encryption. Returns its reference."""
        bot = self._world.bots[upload.bot]
        try:
            plain = decrypt(data, upload.key)
            right = len(plain) == upload.size and hashlib.md5(plain).hexdigest() == upload.md5.lower()
        except ValueError:
            right = False
        if not right:
            self._world.violate("wrong_ciphertext", "cdn/upload", bot)
        upload.reference = self._reference()
        self._store(upload.reference, Blob(bot=bot.id, data=data, key=upload.key, downloadable=False))
        return upload.reference

    def view(self, bot: Bot, item: Json) -> MediaView | None:
        """How the phone fares with a media item that a bot has sent (S19); None: no media."""
        found = [(kind, item[name]) for kind, (_, name) in ITEMS.items() if isinstance(item.get(name), dict)]
        if not found:
            return None
        kind, payload = found[0]
        media = payload.get("media")
        media = media if isinstance(media, dict) else {}
        reference = str(media.get("encrypt_query_param") or "")
        plain, why = self._open(reference, str(media.get("aes_key") or ""))
        if why:
            self._world.violate(f"media_{why}", "sendmessage", bot)
        if set(media) != {"encrypt_query_param", "aes_key", "encrypt_type"}:
            self._world.violate("media_fields", "sendmessage", bot)
        return MediaView(
            kind=kind,
            reference=reference,
            file_name=str(payload.get("file_name") or ""),
            size=len(plain),
            md5=hashlib.md5(plain).hexdigest() if not why else "",
            viewable=not why,
            why=why,
        )

    def plain(self, reference: str) -> bytes:
        """The decrypted bytes behind a reference."""
        blob = self.blobs.get(reference)
        if blob is None:
            raise SimulatorError("no such media, or no longer remembered")
        return blob.data if blob.key is None else decrypt(blob.data, blob.key)

    def item(
        self, bot: Bot, kind: str, content: bytes, *, key_form: str = "usual", url: str = "both", **fields: Any
    ) -> Json:
        """An inbound media item. `url`: `full`, `param` or `both`; `fields` are added to the payload (4.3)."""
        if kind not in ITEMS or key_form not in KEY_FORMS or url not in ("full", "param", "both"):
            raise SimulatorError(f"kinds: {', '.join(ITEMS)}; key forms: {', '.join(KEY_FORMS)}")
        number, name = ITEMS[kind]
        key = None if key_form == "none" else self._world.rng.randbytes(16)
        data = content if key is None else encrypt(content, key)
        reference = self._reference()
        self._store(reference, Blob(bot=bot.id, data=data, key=key, downloadable=True))
        payload = {"media": self._inbound_media(reference, url), **about(kind, content, data), **fields}
        if key is not None:
            write_key(payload, kind, key_form, key)
        return {"type": number, "is_completed": True, name: payload}

    def _inbound_media(self, reference: str, url: str) -> Json:
        quoted = quote(reference, safe="")
        taskid = f"{self._world.rng.getrandbits(64):x}"
        full = f"{self._base_url()}/c2c/download?encrypted_query_param={quoted}&taskid={taskid}"
        media: Json = {"encrypt_type": 1}
        if url != "full":
            media["encrypt_query_param"] = reference
        if url != "param":
            media["full_url"] = full
        return media

    def _open(self, reference: str, key_text: str) -> tuple[bytes, str]:
        """The plaintext, or why the phone cannot show it."""
        blob = self.blobs.get(reference)
        if blob is None or blob.key is None:
            return b"", "unknown_reference"
        if len(key_text) != 44:
            return b"", "short_key"
        try:
            key = bytes.fromhex(base64.b64decode(key_text, validate=True).decode())
            return decrypt(blob.data, key), ""
        except ValueError:
            return b"", "wrong_key"

    def _reference(self) -> str:
        """Has `+`, `/` and `=` in it for sure: whoever does not quote it in a URL is found out."""
        return f"{ids.chars(self._world.rng, ids.BASE64, 60)}+/=="

    def _store(self, reference: str, blob: Blob) -> None:
        self.blobs[reference] = blob
        self._bytes += len(blob.data)
        while self._bytes > BYTES_KEPT and len(self.blobs) > 1:
            _, oldest = self.blobs.popitem(last=False)
            self._bytes -= len(oldest.data)


def read_upload(bot: Bot, body: Json) -> Upload | None:
    """None for a request that breaks a rule of 3.5."""
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
    return Upload(
        bot=bot.id,
        filekey=filekey,
        media_type=media_type,
        size=size,
        md5=md5,
        encrypted_size=padded,
        key=bytes.fromhex(key),
    )


def about(kind: str, content: bytes, data: bytes) -> Json:
    """The fields beside `media` that inbound payloads carry (4.3)."""
    md5 = hashlib.md5(content).hexdigest()
    fields: dict[str, Json] = {
        "image": {"mid_size": len(data), "thumb_width": 100, "thumb_height": 100},
        "voice": {"encode_type": 6, "bits_per_sample": 16, "sample_rate": 24000, "playtime": 1500},
        "file": {"file_name": "file.bin", "md5": md5, "len": str(len(content))},
        "video": {"video_size": len(data), "play_length": 1500, "video_md5": md5},
    }
    return fields[kind]


def write_key(payload: Json, kind: str, form: str, key: bytes) -> None:
    """Images usually have the key as hex beside `media` and raw in it, all else as hex text (9.2)."""
    raw = base64.b64encode(key).decode()
    text = base64.b64encode(key.hex().encode()).decode()
    if form == "hex" or (form == "usual" and kind == "image"):
        payload["aeskey"] = key.hex()
    if form == "raw_base64" or (form == "usual" and kind == "image"):
        payload["media"]["aes_key"] = raw
    if form == "hex_base64" or (form == "usual" and kind != "image"):
        payload["media"]["aes_key"] = text
