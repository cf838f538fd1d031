"""Subjects, streams, buckets, headers and keys of the bus, and the ids and trace contexts in them. No I/O, no
clock."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from itertools import islice
from urllib.parse import unquote_to_bytes

from adapter.errors import Refused

LAYOUT_KEY = "layout"
"""Key beside the bindings with what the streams are expected to be (jetstream/topology.py). No bot has this name."""

UNROUTED = "_"
"""The sandbox in receipts of commands without a readable one, and in an erase for all sandboxes. No sandbox has this
name."""

SANDBOX_PATTERN = r"([a-z0-9-]|[a-z0-9_-]{2,64})"
"""Of the whole name."""
SANDBOX_RULE = "A sandbox's name is 1 to 64 characters of a-z, 0-9, - and _, and is not _"
_SANDBOX = re.compile(SANDBOX_PATTERN)

# Header names
H_SCHEMA = "Wechat-Schema"
H_MSG_ID = "Nats-Msg-Id"
H_REPLY_TO = "Reply-To"
H_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
"""Compare-and-set: the stream refuses a message if the subject's last sequence is another (0: no message)."""
H_TRACEPARENT = "traceparent"
H_COMMAND = "Wechat-Command"
"""Id of a command, for operators: on the router's copy, on a receipt that became a dead letter."""
H_REASON = "Wechat-Reason"
H_DETAIL = "Wechat-Detail"
H_SUBJECT = "Wechat-Subject"
H_TIME_MS = "Wechat-Time-Ms"
H_SANDBOX = "Wechat-Sandbox"
H_USER = "Wechat-User"
H_BODY = "Wechat-Body"
"""On inbound dead letters: `sealed`, or `sealed, cut` where the bus takes only the beginning of the message."""
H_POSITION = "Wechat-Position"
"""On live messages: the message's place in the inbox (`position`)."""
H_ORIGINAL = "Wechat-Original"
"""On the router's copies: sequence and stored time of the command on plain `wechat.out`; on an erase in one sandbox
those of the one for all sandboxes."""
H_NEXT = "Wechat-Next"
"""On pieces of an object: value of `after` for the next request; absent on the last piece."""
H_SIZE = "Wechat-Size"
"""On pieces of an object: size of the whole in bytes."""
H_SHA256 = "Wechat-Sha256"
"""On pieces of an object: hash of the whole as lower-case hex."""
H_MIME = "Wechat-Mime"
"""On the first piece of an object, as the following ones: what its content shows."""
H_WIDTH = "Wechat-Width"
H_HEIGHT = "Wechat-Height"
H_DURATION_MS = "Wechat-Duration-Ms"
H_UPLOAD = "Wechat-Upload"
H_OFFSET = "Wechat-Offset"
H_LAST = "Wechat-Last"
H_NAME = "Wechat-Name"
H_ERROR = "Nats-Service-Error"
H_ERROR_CODE = "Nats-Service-Error-Code"


def in_words(exc: Exception) -> str:
    """What msgspec says of foreign bytes, without a regular expression."""
    said, _, path = str(exc)[:200].partition(" matching regex ")
    if not path:
        return said
    rule = f"{SANDBOX_RULE}: " if SANDBOX_PATTERN in path else ""
    return f"{rule}another form is expected - at {path.rpartition(' - at ')[2]}"


def is_sandbox(name: str) -> bool:
    """Whether it is a valid sandbox name, and so a token of subjects."""
    return _SANDBOX.fullmatch(name) is not None


def check_sandbox(name: str) -> str:
    """`name` if it is a valid sandbox name. Raises Refused("invalid"); an invalid name is never changed."""
    if _SANDBOX.fullmatch(name) is None:  # called for each command
        raise Refused("invalid", f"{SANDBOX_RULE}.")
    return name


@functools.lru_cache(maxsize=32_768)  # called for each poll and message
def _partition_of(sandbox: str, partitions: int) -> int:
    """32-bit FNV-1a modulo the number of partitions, as nats-server's `partition()` computes it."""
    h = 2166136261
    for byte in sandbox.encode():
        h = ((h ^ byte) * 16777619) & 0xFFFFFFFF
    return h % partitions


_INBOX = re.compile(r"_INBOX[^\s.*>\x00]*(\.[^\s.*>\x00]+)+")
MAX_INBOX = 256
MAX_SEQ = 2**63 - 1
"""Largest sequence of a stream."""


def is_inbox(subject: str) -> bool:
    """Whether a foreign client's request may be answered there, since it must not make the adapter write anywhere."""
    return len(subject) <= MAX_INBOX and subject.isascii() and bool(_INBOX.fullmatch(subject))


_ESCAPED = re.compile(r"[^A-Za-z0-9_-]+")


def escape_token(text: str) -> str:
    """`text` as a subject token and bucket key: letters, digits, `-` and `_` stay, other bytes become =XX (hex)."""
    return _ESCAPED.sub(lambda found: "".join(f"={byte:02X}" for byte in found[0].encode()), text)


@functools.lru_cache(maxsize=32_768)
def to_subject_token(text: str) -> str:
    """As `escape_token`, cached: for bots and users, not for unique values such as message ids."""
    return escape_token(text)


def from_subject_token(token: str) -> str:
    """The inverse of `escape_token`. Raises ValueError for any other text."""
    text = unquote_to_bytes(token.replace("=", "%")).decode()
    if to_subject_token(text) != token:
        raise ValueError("not a name that was escaped")
    return text


COMMAND_TOKEN = 64
"""Longest token of a command's id, as long as a sandbox's name: an id of 128 characters takes up to 1,536 when it is
escaped, and the server keeps the subject of each receipt in memory."""


def command_token(command: str) -> str:
    """A command's id as a token: escaped, or `==` and its digest if that is too long. No escaped id begins so."""
    token = escape_token(command)
    return token if len(token) <= COMMAND_TOKEN else f"=={hashlib.sha256(command.encode()).hexdigest()[:32]}"


def digest(data: bytes) -> str:
    """A short stable identifier of bytes."""
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def media_prefix(sandbox: str, user: str) -> str:
    """How the objects begin that hold what a person sent: whose they are can be told after the message is gone."""
    return f"{sandbox}/in/{digest(user.encode())}-"


def media_object(sandbox: str, user: str, message: str, item: int) -> str:
    """Name of the object with the media of one item of an inbound message. `message`: its id."""
    return f"{media_prefix(sandbox, user)}{digest(message.encode())}-{item}"


def person_token(sandbox: str, name: str) -> str:
    """A person as a subject token that names nobody: a digest of sandbox and user, or bot where a bind names no
    user. A new login of the same user keeps it."""
    return hashlib.blake2b(f"{sandbox} {name}".encode(), digest_size=8).hexdigest()


def position(sequence: int, number: int) -> str:
    """A message's place in the inbox: the entry, and which of its messages from 0. Opaque for agents, since a number
    above 2^53 would be changed by some of their languages."""
    return f"{sequence}.{number}"


_POSITION = re.compile(r"(\d{1,19})\.(\d{1,6})")


def read_position(text: str) -> tuple[int, int]:
    """The inverse of `position`. Raises Refused("invalid")."""
    found = _POSITION.fullmatch(text)
    if found is None or int(found[1]) > MAX_SEQ:
        raise Refused("invalid", "A position is a text that `next`, `replay` or the header Wechat-Position gave.")
    return int(found[1]), int(found[2])


_STREAM_OF_KIND = {"inbox": "in", "part": "out", "bind": "out", "unbind": "out", "erase": "out"}
"""By second token of a stored subject, where the stream is named otherwise."""


def stream_of(subject: str) -> str:
    """The stream that stores a subject, including those of buckets and of the object store."""
    first, _, rest = subject.partition(".")
    second = rest.partition(".")[0]
    if first in ("$KV", "$O"):
        return f"{'KV' if first == '$KV' else 'OBJ'}_{second}"
    return f"{first}_{_STREAM_OF_KIND.get(second, second)}".upper()


_HEADER = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SERVERS = ("nats-", "kv-", "status", "description")
"""Prefixes of the server's own headers."""
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C Trace Context, version 00: neither id is all zeros."""
HEADERS_KEPT = 32
HEADER_CHARS = 1024


def forwardable_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a command that its copy keeps, above all `traceparent`.

    A sandbox may set any header. A name that no client can write again would stop the commands behind it, and a
    server's name (Nats-…, Status) would be taken for the server's.
    """
    kept = {
        name: value
        for name, value in headers.items()
        if _HEADER.fullmatch(name) and not name.lower().startswith(_SERVERS) and len(value) <= HEADER_CHARS
    }
    return dict(islice(kept.items(), HEADERS_KEPT))


def derive_traceparent(trace: str, span: str = "") -> str:
    """A W3C traceparent that follows from two ids: a write that is repeated has the same bytes.

    It says "sampled": tracers that follow their parent would record nothing of an agent's work otherwise.
    """
    trace_id = hashlib.blake2b(trace.encode(), digest_size=16).hexdigest()
    span_id = hashlib.blake2b(span.encode(), digest_size=8).hexdigest() if span else trace_id[:16]
    return f"00-{trace_id}-{span_id}-01"


def author_traceparent(headers: Mapping[str, str]) -> str:
    """The traceparent of whoever wrote a message; "" where there is none, or none that a tracer would take."""
    found = headers.get(H_TRACEPARENT, "")
    return found if found and _TRACEPARENT.fullmatch(found) else ""


def command_traceparent(author: str, sandbox: str, sequence: int, stored_ms: int, reply_to: str) -> str:
    """The traceparent of a command's receipts: the author's, else one in the trace of the message that it answers."""
    span = f"command:{sandbox}:{sequence}:{stored_ms}"
    return author or derive_traceparent(reply_to or span, span)


class Names:
    """All subjects, streams and buckets under one prefix (setting WECHAT_NATS_PREFIX)."""

    def __init__(self, prefix: str = "wechat", partitions: int = 32) -> None:
        """`partitions`: their number in the layout, which only an adapter needs to know."""
        self.prefix = prefix
        self.partitions = partitions
        upper = prefix.upper()
        self.stream_in = f"{upper}_IN"
        self.stream_out = f"{upper}_OUT"
        self.stream_event = f"{upper}_EVENT"
        self.stream_dead = f"{upper}_DEAD"
        self.bindings = f"{prefix}_bindings"
        self.persons = f"{prefix}_persons"
        self.readers = f"{prefix}_readers"
        self.leases = f"{prefix}_leases"
        self.logins = f"{prefix}_logins"
        self.media = f"{prefix}_media"
        self.out_plain = f"{prefix}.out"

    def inbox(self, sandbox: str, person: str = "*") -> str:
        """Subject of the stored entries of one person (`person_token`), or of all persons of a sandbox."""
        return f"{self.prefix}.inbox.{sandbox}.{person}"

    def live(self, sandbox: str) -> str:
        """Subject that a sandbox subscribes to."""
        return f"{self.prefix}.in.{sandbox}"

    def out(self, sandbox: str) -> str:
        """Subject to which a sandbox publishes its commands."""
        return self.said("out", sandbox)

    def said(self, verb: str, sandbox: str) -> str:
        """Subject of what is said to a sandbox: `out`, `bind`, `unbind` or `erase`."""
        return f"{self.prefix}.{verb}.{sandbox}"

    def partition_of(self, sandbox: str) -> int:
        """The partition that the server stores the commands of a sandbox in."""
        return _partition_of(sandbox, self.partitions)

    def of_partition(self, number: int) -> str:
        """Filter for what is stored of one partition (after the stream's subject transform)."""
        return f"{self.prefix}.part.{number}.>"

    def out_of_sandbox(self, sandbox: str) -> str:
        """Filter for the stored commands of one sandbox, which may be `*`; plain ones are not among them."""
        return f"{self.prefix}.part.*.out.{sandbox}"

    def event(self, sandbox: str, kind: str) -> str:
        return f"{self.prefix}.event.{sandbox}.{kind}"

    def receipt(self, sandbox: str, command: str, sequence: int | None = None, verb: str = "receipt") -> str:
        """Subject of the receipts of one command; without its sequence, of all commands with this id, which may be
        any text, even `*`. `verb`: that of a bind, unbind or erase, whose receipts no command can name."""
        number = "*" if sequence is None else sequence
        return f"{self.prefix}.event.{sandbox}.{verb}.{command_token(command)}.{number}"

    def receipts(self, sandbox: str) -> str:
        """Subject of the receipts of all commands of a sandbox, which may be `*`."""
        return f"{self.prefix}.event.{sandbox}.receipt.>"

    def dead_letters(self, stream: str) -> str:
        return f"{self.prefix}.dead.{stream}"

    def here(self) -> str:
        """Subject on which replicas say that they are here; sandboxes have no access."""
        return f"{self.prefix}.adapter.here"

    def polls_of(self, replica: str) -> str:
        """Subject of requests to one replica about its polls; sandboxes have no access."""
        return f"{self.prefix}.adapter.polls.{replica}"

    def polled(self) -> str:
        """Subject on which replicas say whose poll or send has ended; sandboxes have no access."""
        return f"{self.prefix}.adapter.polled"

    def svc(self, verb: str) -> str:
        return f"{self.prefix}.svc.{verb}"
