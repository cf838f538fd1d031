"""The interfaces between the loops and the edges (iLink, NATS), each with the errors it may raise. No code."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import msgspec

from adapter.content.dedup import MessageKeys
from adapter.content.quotes import Reference
from adapter.contract.messages import InboundItem, Quote
from adapter.errors import BusRefused

# iLink ----------------------------------------------------------------------------------------------


class Account(NamedTuple):
    """How one bot is called. `token` is the secret, opened; `base_url` "" means the service's default."""

    bot: str
    token: str
    base_url: str

    def __repr__(self) -> str:
        return f"Account({self.bot!r})"


class Share(Protocol):
    """What an answer takes of the memory that all answers share."""

    def shrink(self, size: int) -> None:
        """Gives back what is more than `size` bytes."""

    def release(self) -> None:
        """Gives it back; otherwise it comes back once nothing refers to it any more."""


class Polled(NamedTuple):
    """A readable answer to a poll: raw messages in order, the new cursor (None: keep the old one), the next hold."""

    messages: list[bytes]
    cursor: str | None
    hold_ms: int
    overlong: int = 0
    """Characters of a new cursor that is too long to be kept, 0: there was none like that."""
    pages: Iterator[list[bytes]] | None = None
    """The messages after these, a page at a time."""
    share: Share | None = None
    """To be released once all messages are stored."""


class Accepted(NamedTuple):
    """A send that iLink accepted; `message_id` is "" where it gave none."""

    message_id: str
    ret: int | None
    errcode: int | None
    errmsg: str


class MediaRef(NamedTuple):
    """Media of one inbound item, still on iLink's CDN (docs/reference/ilink-protocol.md, "Download")."""

    item: int
    """Index of its item in the message's `items`."""
    url: str
    """Ready-made, "" where iLink gave none."""
    reference: str
    """`encrypt_query_param`, to build a URL with; "" where iLink gave none."""
    key: bytes | None
    """16 bytes; None: the bytes are not encrypted."""
    name: str
    """As the sender calls it; "" where iLink says nothing."""

    def __repr__(self) -> str:
        return f"MediaRef(item={self.item})"  # neither a key nor a link to the bytes gets into a log or traceback


MediaKind: TypeAlias = Literal["image", "video", "file"]
"""What media can be sent as."""


class Uploaded(NamedTuple):
    """Media on iLink's CDN, ready to be named in a message (docs/reference/ilink-protocol.md, "Outbound items")."""

    kind: MediaKind
    name: str
    size: int
    """Plain bytes."""
    cipher_size: int
    reference: str
    """The answer header `x-encrypted-param`."""
    key: bytes

    def __repr__(self) -> str:
        return f"Uploaded({self.kind!r}, size={self.size})"


Content: TypeAlias = str | Uploaded
"""What one message to a user holds: a text, or media."""

Pieces: TypeAlias = AsyncGenerator[bytes, None]
"""Bytes as they come. Who stops early closes them (`contextlib.aclosing`)."""


class InboundMessage(msgspec.Struct, frozen=True, gc=False):
    """One inbound message, translated into the words of the bus."""

    keys: MessageKeys
    user: str
    sent_at_ms: int
    """0 where iLink gave none."""
    context_token: str
    text: str
    items: list[InboundItem]
    quote: Quote | None
    echo: bool
    """It is the bot's own message, not the user's: not for the bus."""
    raw: bytes
    broken: str
    """Why it could not be read whole, "" if it could; then `raw` belongs into the dead letters too."""
    kind: str
    """text, image, voice, file, video or unsupported: for the metrics."""
    fetches: tuple[MediaRef, ...] = ()
    """Media that belong to `items`, in their order."""
    reference: Reference | None = None
    """Where to look for the rest of `quote`."""
    item_ids: tuple[str, ...] = ()
    """iLink's ids of the items, in their order; "" for none of their own."""
    group: bool = False
    """It was written in a group, or comes from one."""


class QrCode(NamedTuple):
    """A fresh QR code. Both are secrets until it is used up: the handle fetches the token."""

    handle: str
    url: str
    """The text to encode."""

    def __repr__(self) -> str:
        return "QrCode()"


ScanStatus = Literal[
    "wait",
    "scaned",
    "need_verifycode",
    "verify_code_blocked",
    "scaned_but_redirect",
    "expired",
    "binded_redirect",
    "confirmed",
]
"""How a QR code stands, in iLink's words (docs/reference/ilink-protocol.md, "Login")."""


class Scan(NamedTuple):
    """An answer about a QR code; what iLink left out is ""."""

    status: ScanStatus
    redirect_host: str = ""
    bot: str = ""
    user: str = ""
    token: str = ""
    base_url: str = ""

    def __repr__(self) -> str:
        return f"Scan({self.status!r})"


class Chat(Protocol):
    """iLink."""

    async def poll(self, account: Account, cursor: str, hold_ms: int) -> Polled | None:
        """Waits for news after `cursor`; None: nobody answered in time.

        Raises Temporary, SessionExpired, Refused("url") (the base URL may not be called).
        """

    async def send(
        self,
        account: Account,
        *,
        user: str,
        client_id: str,
        context_token: str,
        content: Content,
        check: Callable[[], None] | None = None,
    ) -> Accepted:
        """One message. Media were uploaded for this user.

        `check` is called when the request is about to leave, since connecting takes its time; what it raises is
        raised, and nothing has left.

        Raises SessionExpired, Throttled, Refused, Temporary (nothing was taken), Uncertain (perhaps it was).
        """

    async def typing_ticket(self, account: Account, user: str, context_token: str) -> str:
        """What showing the user that the bot types needs (docs/reference/ilink-protocol.md, "Typing").

        Raises SessionExpired, Temporary, Refused("typing") (there is none for this user now).
        """

    async def show_typing(self, account: Account, user: str, ticket: str, *, on: bool) -> None:
        """Shows or hides that the bot types.

        Raises SessionExpired, Temporary, Refused("typing") (perhaps the ticket is too old).
        """

    async def notify(self, account: Account, *, start: bool) -> None:
        """Tells iLink that polling starts or has stopped. Raises Temporary, SessionExpired, Refused."""

    async def recycle(self, bot: str) -> None:
        """Drops the bot's connections; the next call connects anew."""

    def check_base_url(self, url: str) -> str:
        """Raises Refused("url") for a base URL that may not be called."""


class Logins(Protocol):
    """iLink's QR logins."""

    async def fetch_code(self, tokens: Sequence[str]) -> QrCode:
        """A new code. `tokens`: the bots of which a user who scans keeps the one they have. Raises Temporary."""

    async def read_code(self, handle: str, base_url: str, verify_code: str) -> Scan | None:
        """Waits for news of a code at `base_url` ("": the default); None: no usable answer came, ask again.

        Raises Refused("url").
        """

    def redirect_base_url(self, host: str, base_url: str) -> str:
        """The base URL at `host`, which a code at `base_url` was redirected to. Raises Refused("url")."""

    def check_base_url(self, url: str) -> str:
        """Raises Refused("url") for a base URL that may not be called."""


class Cdn(Protocol):
    """iLink's store of media. What passes here is plain; it is encrypted and decrypted on the way."""

    def download(self, fetch: MediaRef) -> Pieces:
        """The plain bytes. Only the end tells that they are right: use nothing before it.

        Raises Refused with a reason of contract.MediaReason (reference, unavailable, corrupt, too_large), Temporary.
        """

    async def upload(
        self,
        account: Account,
        *,
        user: str,
        kind: MediaKind,
        name: str,
        size: int,
        md5: str,
        read: Callable[[], Pieces],
    ) -> Uploaded:
        """Brings `size` plain bytes to the CDN; `read` starts from their beginning, and again for each attempt.

        Raises Refused("media"), SessionExpired, Temporary (iLink could not be reached at all), what `read` raises.
        """


# The bus: streams -----------------------------------------------------------------------------------


class Message(msgspec.Struct, frozen=True):
    """Something to store in a stream. `stream` is its label in the metrics: in, journal, event, dead, out …"""

    stream: str
    subject: str
    payload: bytes
    headers: dict[str, str]
    ensure_owner: Callable[[], None] | None = None
    """Asked before each attempt to write it. Raises LeaseLost where this replica may not write it any more."""
    ensure_owner_if_delayed: Callable[[], None] | None = None
    """As `ensure_owner`, for an attempt after the stream may have forgotten what another replica stored under its
    id."""


class PubAck(msgspec.Struct):
    """The stream has it. `seq` is its sequence; `duplicate`: it had it before."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False


class Bus(Protocol):
    """Publishing to streams, to each in the order of the calls. Waits as long as the bus is away, or the stream."""

    async def publish(self, message: Message) -> PubAck:
        """Raises Conflict, BusRefused, and what the message's fence raises."""

    async def publish_all(self, messages: Sequence[Message]) -> list[PubAck | BusRefused]:
        """Stores all, those of a stream in this order, pipelined; a refusal stands in the place of its ack.

        Raises what a message's fence raises: any part of the others is stored then.
        """


class Delivery(Protocol):
    """A message that a consumer delivered."""

    subject: str
    data: bytes
    headers: dict[str, str]
    seq: int
    time_ms: int
    """When the stream stored it."""
    redelivered: bool
    """It was delivered before, so that its outcome may be on the bus already."""

    async def ack(self) -> None:
        """Acknowledges it; if the ack is lost, it is delivered again."""


class Stored(NamedTuple):
    """A message read back from a stream."""

    subject: str
    seq: int
    headers: dict[str, str]
    data: bytes
    time_ms: int = 0
    """When the stream stored it, Unix milliseconds; 0 where that was not asked for."""


class History(Protocol):
    """Reading streams back."""

    def read(
        self, stream: str, subject: str, *, after: int = 0, since_ms: int | None = None, limit: int | None = None
    ) -> AsyncIterator[Stored]:
        """Messages of `subject`, oldest first, after a sequence or since a time; the first `limit` of them.

        Raises Temporary.
        """

    async def read_last(self, stream: str, subject: str) -> Stored | None:
        """The newest message of one subject. Raises Temporary."""

    async def read_last_of_each(self, stream: str, subjects: Sequence[str]) -> list[Stored]:
        """The newest message of each subject that has one, as new as the stream's leader has it. Raises Temporary."""

    async def get(self, stream: str, seq: int) -> Stored | None:
        """One message, as new as the stream's leader has it; None where there is none. Raises Temporary."""

    async def count_by_subject(self, stream: str, subject: str) -> dict[str, int]:
        """Messages per subject under a wildcard. Raises Temporary, BusRefused where there is no such stream."""

    async def delete(self, stream: str, seq: int, *, erase: bool = False) -> None:
        """Deletes one message, with `erase` so that the disk does not hold it any more; one that is gone already is
        no error. Raises Temporary."""

    async def purge(self, stream: str, subject: str, *, keep: int = 0, up_to: int = 0) -> None:
        """Deletes all but the newest `keep` messages under a wildcard, or those up to a sequence. Raises Temporary,
        BusRefused."""


class Archive(History, Protocol):
    """The same, with paging from the newest on."""

    async def read_newest(self, stream: str, subject: str, *, count: int, before: int | None = None) -> list[Stored]:
        """At most `count` messages, newest first; `before`: older than this sequence. Raises Temporary."""


# The bus: buckets -----------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A key's last value. `value` is None where the key was deleted (its revision still counts)."""

    key: str
    value: bytes | None
    revision: int


class Bucket(Protocol):
    """A key-value bucket. Writing waits as long as the bus is away."""

    async def get(self, key: str) -> Entry | None:
        """None if the key never was. Raises Temporary."""

    async def get_all(self, keys: Sequence[str]) -> list[Entry]:
        """As `get`, of many, without those that never were. Raises Temporary."""

    async def update(self, key: str, value: bytes, revision: int, *, ttl_s: int = 0) -> int:
        """Writes if the revision still is `revision` (0: the key never was); the new one. A write whose answer got
        lost is known again where its own repeat meets it. With `ttl_s` the key is gone after so many seconds, unless
        it is written again.

        Raises Conflict, Temporary (the bucket is full).
        """

    async def delete(self, key: str, revision: int | None = None, *, ttl_s: int = 0) -> int:
        """Deletes, if the revision still is `revision` where one is given; the new one. With `ttl_s` the mark of the
        deletion is gone after so many seconds.

        Raises Conflict, Temporary (the bucket is full).
        """

    async def list_prefix(self, first: str) -> list[Entry]:
        """All that is there whose key begins with the token `first` and a dot. Raises Temporary."""

    async def watch(
        self,
        on_entry: Callable[[Entry], None],
        *,
        on_loaded: Callable[[], None] | None = None,
    ) -> None:
        """Calls `on_entry` for all that is there and every change (deleted keys too), until cancelled; `on_loaded`
        after each complete reading. Of a key that is there no more, and was not deleted, nothing is told."""


class LeaderBucket(Protocol):
    """A bucket for leases: reads from the stream's leader, and waits for about a second at most."""

    async def get(self, key: str) -> Entry | None:
        """Raises Temporary."""

    async def write(self, key: str, value: bytes | None, revision: int) -> int:
        """Writes, or deletes for None, at this revision. Raises Conflict, Temporary (ambiguous)."""

    async def list_entries(self) -> list[Entry]:
        """All that is there, marks of deletions too. Raises Temporary."""


# Texts ----------------------------------------------------------------------------------------------


class TextReader(Protocol):
    """Reads what would hold up all others, first come, first served."""

    async def render_plain(self, texts: Sequence[str]) -> list[str]:
        """Markdown as plain text (split.to_plain). Raises Refused("too_long") for what takes too long, Temporary."""

    async def close(self) -> None:
        """Ends what is being read."""


# The bus: objects -----------------------------------------------------------------------------------


class StoredObject(NamedTuple):
    """An object of the object store."""

    name: str
    ident: str
    """Names its chunks."""
    size: int
    sha256: str
    """Lower-case hex."""
    title: str = ""
    """Its file name, where one was given."""


class Objects(Protocol):
    """The object store `wechat_media`, readable by every NATS client."""

    async def get_info(self, name: str) -> StoredObject | None:
        """None where there is none. Raises Temporary."""

    def read(self, stored: StoredObject) -> Pieces:
        """Its bytes. Raises Temporary, Unreadable (pieces are gone, or not what they were), at the
        latest after the last one."""

    async def read_piece(self, stored: StoredObject, after: int) -> tuple[bytes, int]:
        """The piece after a sequence (0: the first), and its own sequence, 0 on the last.

        Raises Temporary, Unreadable (there is none).
        """

    async def put(self, name: str, pieces: Pieces, *, mime: str = "", title: str = "") -> StoredObject:
        """Stores bytes as they come; an object of this name is replaced. Nothing stays where `pieces` fails.

        Waits while the bus is away; closes `pieces` in the end. Raises BusRefused, and what `pieces` raises.
        """


class PartialObjects(Objects, Protocol):
    """Objects that come in pieces, each perhaps at another replica."""

    async def append(self, name: str, offset: int, piece: bytes) -> int:
        """Adds a piece; how many bytes there are now. One that is there already changes nothing.

        Raises Refused("invalid") (a gap, or the object is complete), Temporary, BusRefused.
        """

    async def complete_upload(
        self, name: str, size: int, *, sha256: str, title: str, mime_of: Callable[[bytes], str]
    ) -> tuple[StoredObject, bytes]:
        """Makes an object of what was added, and returns its first bytes too.

        May be repeated: the object is then described as it is stored, and not read again.
        `sha256` "" is not checked; `mime_of` gets the first bytes. Raises Refused("invalid") (it differs), Temporary,
        BusRefused.
        """


# The bus: what is not stored ------------------------------------------------------------------------


class SandboxRequest(NamedTuple):
    """A request on a subject of one sandbox: who may publish there may ask for it."""

    sandbox: str
    """As in the subject, not checked yet."""
    headers: dict[str, str]
    data: bytes


class SandboxResponse(NamedTuple):
    """The answer to it."""

    data: bytes
    headers: dict[str, str]


class AllReplicas(Protocol):
    """Asks all replicas at once, this one included."""

    async def query_replicas(self, subject: str, payload: bytes, *, count: int, within_s: float) -> list[bytes]:
        """Asks, and takes what is answered until there are `count` answers or the time is over. Raises Temporary."""


class CoreBus(Protocol):
    """Core NATS, without storage; and the durable consumers of sandboxes."""

    async def publish(self, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        """Publishes at most once. Raises Temporary."""

    async def make_durable(self, sandbox: str, after: int) -> None:
        """Creates the sandbox's durable pull consumer where it is missing, behind a sequence. Raises Temporary,
        Refused."""

    async def move_durable(self, sandbox: str, after: int) -> None:
        """Moves the sandbox's durable pull consumer, where there is one, behind a sequence. Raises Temporary."""
