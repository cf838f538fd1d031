"""The interfaces between the core and its edges (iLink, NATS), each with the errors that it may raise. No code."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import msgspec

from adapter.contract.messages import InboundItem, Quote
from adapter.contract.quotes import Reference
from adapter.contract.repeats import MessageKeys

# iLink ----------------------------------------------------------------------------------------------


class Account(NamedTuple):
    """A bot's account at iLink. `token` is the opened secret; a `base_url` of "" means the default of the service."""

    bot: str
    token: str
    base_url: str

    def __repr__(self) -> str:
        return f"Account({self.bot!r})"


HOLD_MS = 35_000
"""Assumed hold of a poll until iLink gives a hint. The client waits a margin longer."""


class Polled(msgspec.Struct, frozen=True):
    """A readable answer to a poll: raw messages in order, the new cursor (None: keep the old one), and the next
    hold."""

    messages: list[bytes]
    cursor: str | None
    hold_ms: int
    overlong: int = 0
    """Length of a new cursor that is too long to keep; 0: none."""


class Accepted(msgspec.Struct, frozen=True):
    """A send that iLink accepted. `message_id` is None if iLink gave none."""

    message_id: str | None
    ret: int | None
    errcode: int | None
    errmsg: str


class MediaRef(NamedTuple):
    """Media of one inbound item on iLink's CDN (docs/reference/ilink-protocol.md, "Download")."""

    item: int
    """Index of the item in the message's `items`."""
    url: str
    """Complete URL, or "" if iLink gave none."""
    reference: str
    """`encrypt_query_param`, for making a URL, or "" if iLink gave none."""
    key: bytes | None
    """Key of 16 bytes; None: the bytes are not encrypted."""
    name: str
    """File name from the sender, or "" if iLink gave none."""
    size: int = 0
    """Plain bytes of a file; for a video those of the CDN, which are up to 16 more. 0 if iLink gave none."""

    def __repr__(self) -> str:
        return f"MediaRef(item={self.item})"  # keeps keys and links out of logs and tracebacks


MediaKind: TypeAlias = Literal["image", "video", "file"]
"""Kinds of media that can be sent."""


class Uploaded(NamedTuple):
    """Media on iLink's CDN, ready for a message (docs/reference/ilink-protocol.md, "Outbound items")."""

    kind: MediaKind
    name: str
    size: int
    """Size of the plain content in bytes."""
    cipher_size: int
    reference: str
    """Value of the answer header `x-encrypted-param`."""
    key: bytes

    def __repr__(self) -> str:
        return f"Uploaded({self.kind!r}, size={self.size})"


Content: TypeAlias = str | Uploaded
"""Content of one message to a user: a text, or media."""

Pieces: TypeAlias = AsyncGenerator[bytes, None]
"""Bytes in pieces. A consumer that stops early closes the generator (`contextlib.aclosing`)."""
Read: TypeAlias = Callable[[], Pieces]
"""Begins to read them, from their first byte."""


class InboundMessage(msgspec.Struct, frozen=True, gc=False):
    """An inbound message, translated to the terms of the bus."""

    keys: MessageKeys
    user: str
    sent_at_ms: int
    """0 if iLink gave none."""
    context_token: str
    text: str
    items: list[InboundItem]
    quote: Quote | None
    echo: bool
    """Whether the message is the bot's own, which is not published."""
    raw: bytes
    broken: str
    """Reason why the message could not be read completely, or "". If set, `raw` also goes to the dead letters."""
    kind: str
    """Metrics label: text, image, voice, file, video or unsupported."""
    fetches: tuple[MediaRef, ...] = ()
    """Media of `items`, in their order."""
    reference: Reference | None = None
    """Reference for resolving `quote`."""
    group: bool = False
    """Whether the message comes from a group."""


class QrCode(NamedTuple):
    """A new QR code. Code and handle are secrets until the code is used, since the handle fetches the token."""

    handle: str
    url: str
    """Text to encode."""

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
"""Status of a QR code, in iLink's words (docs/reference/ilink-protocol.md, "Login")."""


class Scan(NamedTuple):
    """An answer about a QR code. Missing fields are ""."""

    status: ScanStatus
    redirect_host: str = ""
    bot: str = ""
    user: str = ""
    token: str = ""
    base_url: str = ""

    def __repr__(self) -> str:
        return f"Scan({self.status!r})"


class Chat(Protocol):
    """The calls of iLink for a bot."""

    async def poll(self, account: Account, cursor: str, hold_ms: int) -> Polled | None:
        """Waits for messages after `cursor`; None: no answer in time.

        Raises Temporary, SessionExpired, Refused("url") (the base URL is not allowed).
        """

    def is_connecting(self, bot: str) -> bool:
        """Whether a poll of the bot has not left yet, so that no answer to it can be missed."""

    def has_answer(self, bot: str) -> bool:
        """Whether a poll of the bot has its answer, and ends once that is read. It must not be cut: iLink may count
        the answer as delivered."""

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
        """Sends one message. Media must have been uploaded for this user.

        `check` is called right before the request is written, because connecting takes time. If it raises, nothing is
        sent.

        Raises SessionExpired, Throttled, Refused, Temporary (iLink did not accept it), Uncertain (it may have:
        "timeout", "http_5xx", "network" for a connection that was lost, "unreadable").
        """

    async def typing_ticket(self, account: Account, user: str, context_token: str) -> str:
        """The ticket that `show_typing` needs (docs/reference/ilink-protocol.md, "Typing").

        Raises SessionExpired, Temporary, Refused (no ticket is available for this user).
        """

    async def show_typing(self, account: Account, user: str, ticket: str, *, on: bool) -> None:
        """Shows or hides the typing indicator.

        Raises SessionExpired, Temporary, Refused (the ticket may be too old).
        """

    async def notify(self, account: Account, *, start: bool) -> None:
        """Tells iLink that polling starts or has stopped. Raises Temporary, SessionExpired, Refused."""

    def check_base_url(self, url: str) -> str:
        """Raises Refused("url") for a base URL that is not allowed."""

    def host_of(self, base_url: str) -> str:
        """The host of a base URL ("": the default)."""


class Logins(Protocol):
    """iLink's QR logins."""

    async def notify(self, account: Account, *, start: bool) -> None:
        """As that of Chat."""

    async def fetch_code(self, tokens: Sequence[str]) -> QrCode:
        """Fetches a new code. A user who scans keeps a bot whose token is in `tokens`. Raises Temporary."""

    async def read_code(self, handle: str, base_url: str, verify_code: str) -> Scan | None:
        """Waits for a change of a code at `base_url` ("": the default); None: no usable answer, ask again.

        Raises Refused("url").
        """

    def redirect_base_url(self, host: str, base_url: str) -> str:
        """The base URL at `host` to which a code at `base_url` was redirected. Raises Refused("url")."""

    def check_base_url(self, url: str) -> str:
        """Raises Refused("url") for a base URL that is not allowed."""

    def host_of(self, base_url: str) -> str:
        """The host of a base URL ("": the default)."""


class Cdn(Protocol):
    """iLink's media store. Callers handle plain bytes; the implementation encrypts and decrypts."""

    def download(self, fetch: MediaRef) -> Pieces:
        """The plain bytes. They are verified at the end, so use none of them before the end.

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
        read: Read,
    ) -> Uploaded:
        """Uploads `size` plain bytes to the CDN. `read` starts at their beginning, and is called for each attempt.

        Raises Refused("media"), SessionExpired, Temporary (iLink is unreachable), and what `read` raises.
        """


# The bus: streams -----------------------------------------------------------------------------------


class BusMessage(msgspec.Struct, frozen=True):
    """A message to store in a stream. `stream` is its metrics label: in, event, dead, out …"""

    stream: str
    subject: str
    payload: bytes
    headers: dict[str, str]
    ensure_owner: Callable[[], None] | None = None
    """Called before each attempt to write. Raises LeaseLost if this replica may no longer write the message."""


class PubAck(msgspec.Struct):
    """The stream has stored the message. `seq` is its sequence; `duplicate`: the stream had stored it before."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False


class Bus(Protocol):
    """Stores in streams. Waits while the bus or the stream is away."""

    async def store(self, message: BusMessage) -> PubAck:
        """Returns once the stream has the message, which is a compare-and-set or has an id: it is written again where
        no acknowledgement comes. Raises Conflict, BusRefused, and what `ensure_owner` of the message raises."""


class Delivery(Protocol):
    """A message that a consumer delivered."""

    subject: str
    data: bytes
    headers: dict[str, str]
    seq: int
    time_ms: int
    """Time at which the stream stored it."""
    redelivered: bool
    """Whether it was delivered before."""

    @property
    def is_old(self) -> bool:
        """Whether it was stored before this process read the stream, or delivered before: its outcome may be on the
        bus, or somebody may have worked on it."""

    async def ack(self) -> None:
        """Acknowledges it. If the acknowledgement is lost, it is delivered again."""


class StoredMessage(NamedTuple):
    """A message read from a stream."""

    subject: str
    seq: int
    headers: dict[str, str]
    data: bytes
    time_ms: int = 0
    """Time at which the stream stored it, in Unix milliseconds; 0 if not requested."""


class Heads(NamedTuple):
    """Newest messages of subjects, by sequence."""

    messages: list[StoredMessage]
    up_to: int
    """The last sequence of the stream when they were read; 0: no subject has a message."""
    is_cut: bool
    """There are more behind the last one."""


class History(Protocol):
    """Reads streams."""

    def read(
        self,
        stream: str,
        subject: str,
        *,
        after: int = 0,
        since_ms: int | None = None,
        limit: int | None = None,
        page: int = 200,
    ) -> AsyncIterator[StoredMessage]:
        """The first `limit` messages of `subject` after a sequence or since a time, oldest first. `page`: most that
        are requested at once. Raises Temporary."""

    async def read_last(self, stream: str, subject: str) -> StoredMessage | None:
        """The newest message of a subject. Raises Temporary."""

    async def read_last_of_each(self, stream: str, subjects: Sequence[str]) -> list[StoredMessage]:
        """The newest message of each subject, read from the stream's leader. Raises Temporary."""

    async def read_heads(self, stream: str, subject: str, *, start: int) -> Heads | None:
        """Of all subjects under a wildcard whose newest message is at or behind a sequence: this message, as new as
        the stream's leader. None: more than a server looks through, 1,024 subjects. Raises Temporary."""

    async def get(self, stream: str, seq: int) -> StoredMessage | None:
        """A message, read from the stream's leader, or None if there is none. Raises Temporary."""

    async def last_sequence(self, stream: str) -> int:
        """The newest sequence that the stream's leader has given, even if that message is gone. Raises Temporary."""

    async def first_and_last(self, stream: str) -> tuple[int, int]:
        """The sequence of the stream's first message, one more than the last if there is none, and `last_sequence`.
        Raises Temporary."""

    async def count(self, stream: str) -> int:
        """Number of messages of a stream. Raises Temporary."""

    async def delete(self, stream: str, seq: int, *, erase: bool = False) -> None:
        """Deletes a message. With `erase` the server also overwrites it on its disk. A missing message is no error.
        Raises Temporary."""

    async def purge(self, stream: str, subject: str, *, keep: int = 0, up_to: int = 0) -> None:
        """Deletes the messages under a wildcard, except the newest `keep`, or those up to a sequence. Raises
        Temporary, BusRefused."""

    async def read_newest(
        self, stream: str, subject: str, *, count: int, before: int | None = None
    ) -> list[StoredMessage]:
        """At most `count` messages, newest first, older than the sequence `before` if given. Raises Temporary."""


# The bus: buckets -----------------------------------------------------------------------------------


class BucketEntry(NamedTuple):
    """The last value of a key. `value` is None if the key was deleted; its revision still counts."""

    key: str
    value: bytes | None
    revision: int


class Bucket(Protocol):
    """A key-value bucket. Writes wait while the bus is away."""

    async def get(self, key: str) -> BucketEntry | None:
        """The entry of a key, or None if the key never existed. Raises Temporary."""

    async def get_all(self, keys: Sequence[str]) -> list[BucketEntry]:
        """The entries of the keys that ever existed. Raises Temporary."""

    async def update(
        self, key: str, value: bytes, revision: int, *, ensure_owner: Callable[[], None] | None = None
    ) -> int:
        """Writes the value if the key's revision is `revision` (0: the key never existed), and returns the new
        revision. A retry recognises its own earlier write whose answer was lost. `ensure_owner`: as in BusMessage.

        Raises Conflict, BusRefused, Temporary (the bucket is full), and what `ensure_owner` raises.
        """

    async def delete(self, key: str, revision: int | None = None, *, ttl_s: int = 0) -> int:
        """Deletes the key if its revision is `revision`, or in any case for None. Returns the new revision. With
        `ttl_s` the delete marker expires after so many seconds.

        Raises Conflict, Temporary (the bucket is full).
        """

    async def read_since(self, revision: int) -> list[BucketEntry]:
        """The entries that are newer than a revision, and deletions whose markers are there, as the bucket's leader
        has them. Raises Temporary."""

    async def watch(
        self,
        on_entry: Callable[[BucketEntry], None],
        *,
        on_loaded: Callable[[], None] | None = None,
    ) -> None:
        """Calls `on_entry` for all entries and every change, including deletions, until cancelled. Calls `on_loaded`
        after each complete read. A key that vanished without a deletion is not reported."""


class LeaderBucket(Protocol):
    """A bucket for leases. It reads from the stream's leader, and waits for at most about a second."""

    async def get(self, key: str) -> BucketEntry | None:
        """Raises Temporary."""

    async def get_all(self, keys: Sequence[str]) -> list[BucketEntry]:
        """The entries of the keys that ever existed. Raises Temporary."""

    async def write(self, key: str, value: bytes | None, revision: int | None, *, ttl_s: int = 0) -> int:
        """Writes the value, or deletes for None, at this revision (None: at any). With `ttl_s` the key expires after
        so many seconds unless it is written again. Raises Conflict, Temporary (ambiguous)."""


# The bus: objects -----------------------------------------------------------------------------------


class StoredObject(NamedTuple):
    """An object of the object store."""

    name: str
    ident: str
    """Name of its chunks."""
    size: int
    sha256: str
    """SHA-256 in lower-case hex."""
    title: str = ""
    """File name, or "" if none was given."""


class Objects(Protocol):
    """The object store `wechat_media`, readable by every NATS client."""

    async def get_info(self, name: str) -> StoredObject | None:
        """None if the object does not exist. Raises Temporary."""

    def read(self, stored: StoredObject) -> Pieces:
        """The bytes of an object. Raises Temporary, Unreadable (pieces are missing or changed), at the latest after
        the last piece."""

    async def read_piece(self, stored: StoredObject, after: int) -> tuple[bytes, int]:
        """The piece after a sequence (0: the first), and its own sequence, which is 0 for the last piece.

        Raises Temporary, Unreadable (the piece does not exist).
        """

    async def put(
        self,
        name: str,
        pieces: Pieces,
        *,
        describe: Callable[[bytes], tuple[str, str]] = lambda head: ("", ""),
        ensure_owner: Callable[[], None] | None = None,
    ) -> StoredObject:
        """Stores bytes as they come. An object of this name that is there by then stays, and is returned. If `pieces`
        fails, nothing is stored.

        `describe` gets the first bytes, and returns type and file name. `ensure_owner` is called right before each
        attempt to make the bytes an object; raises LeaseLost if they must not become one.

        Waits while the bus is away, and closes `pieces` at the end. Raises BusRefused, LeaseLost, and what `pieces`
        raises.
        """

    async def append(self, name: str, offset: int, piece: bytes) -> int:
        """Adds a piece of an upload, and returns the number of bytes so far. The pieces may come to different
        replicas. A repeated piece changes nothing.

        Raises Refused("invalid") (a gap, or the object is complete), Temporary, BusRefused.
        """

    async def complete_upload(
        self, name: str, size: int, *, sha256: str, title: str, mime_of: Callable[[bytes], str]
    ) -> tuple[StoredObject, bytes]:
        """Makes an object of the uploaded pieces. Returns it with its first bytes.

        May be repeated: a complete object is returned as it is stored, and not read again. An empty `sha256` is not
        checked; `mime_of` gets the first bytes. Raises Refused("invalid") (wrong digest), Temporary, BusRefused.
        """


# The bus: requests ---------------------------------------------------------------------------------


class SandboxRequest(NamedTuple):
    """A request on a subject of one sandbox. A client that may publish there may act for the sandbox."""

    sandbox: str
    """The name in the subject, which is not checked yet."""
    headers: dict[str, str]
    data: bytes


class SandboxResponse(NamedTuple):
    """The answer to a SandboxRequest."""

    data: bytes
    headers: dict[str, str]


class CoreBus(Protocol):
    """Core NATS without storage."""

    async def publish(self, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        """Publishes at most once. Raises Temporary."""

    def subscribe(self, subject: str, on_message: Callable[[bytes], None]) -> None:
        """Subscribes on every connection. Messages that arrive while there is none are lost."""

    def respond(self, subject: str, make: Callable[[bytes], bytes | None]) -> None:
        """Answers requests on every connection, if the reply subject is an inbox; None: no answer."""

    async def ask(self, subject: str, payload: bytes, *, within_s: float) -> bytes | None:
        """Asks a replica, perhaps this one; None: there is no answer in time. Raises Temporary."""
