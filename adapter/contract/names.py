"""Subjects, streams, buckets, headers and keys of the bus, and what ids may be part of them. No I/O, no clock."""

from __future__ import annotations

import functools
import hashlib
import re
from urllib.parse import unquote_to_bytes

from adapter.errors import Refused

SHARDS = 128
"""Sandboxes are spread over so many shards by the server's `partition()`; fixed, since it is in stored subjects."""

UNROUTED = "UNROUTED"
"""Stands for the sandbox in receipts of commands that name none. No sandbox may have upper-case letters."""

SANDBOX_PATTERN = r"^[a-z0-9_-]{1,64}$"
_SANDBOX = re.compile(SANDBOX_PATTERN)

# Header names
H_SCHEMA = "Wechat-Schema"
H_MSG_ID = "Nats-Msg-Id"
H_REPLY_TO = "Reply-To"
H_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
"""Compare-and-set: the stream refuses a message if its subject's last one has another sequence (0: there is none)."""
H_TRACEPARENT = "traceparent"
H_COMMAND = "Wechat-Command"
"""Set by the router on its copy: the id of the command on plain `wechat.out`."""
H_SINCE_MS = "Wechat-Since-Ms"
"""Set by the router on its copy: when the command was stored on plain `wechat.out`."""
H_COPIED_AGAIN = "Wechat-Copied-Again"
"""Set by the router on a copy before which there may have been another of the same command."""
H_REASON = "Wechat-Reason"
H_DETAIL = "Wechat-Detail"
H_SUBJECT = "Wechat-Subject"
H_SEQUENCE = "Wechat-Sequence"
H_TIME_MS = "Wechat-Time-Ms"
H_SANDBOX = "Wechat-Sandbox"
H_JOURNAL = "Wechat-Journal"
"""On inbound messages: which record of the adapter's journal they are of, and where they stand in it. Readers ignore
it."""
H_IDS = "Wechat-Ids"
"""On inbound messages: iLink's ids of its items, for later quotes. Readers ignore it."""
H_NEXT = "Wechat-Next"
"""On pieces of an object: ask again with `after` set to this; absent on the last one."""
H_SIZE = "Wechat-Size"
"""On pieces of an object: bytes of the whole."""
H_SHA256 = "Wechat-Sha256"
"""On pieces of an object: lower-case hex of the whole."""
H_UPLOAD = "Wechat-Upload"
H_OFFSET = "Wechat-Offset"
H_LAST = "Wechat-Last"
H_NAME = "Wechat-Name"
H_ERROR = "Nats-Service-Error"
H_ERROR_CODE = "Nats-Service-Error-Code"


def is_sandbox(name: str) -> bool:
    """Whether it is a legal sandbox id, and thus a token of subjects."""
    return _SANDBOX.fullmatch(name) is not None  # to match() with its $, a line end behind it would be none


def check_sandbox(name: str) -> str:
    """`name`, if it is a legal sandbox id. Raises Refused("invalid"): a wrong id is never rewritten."""
    if _SANDBOX.fullmatch(name) is None:  # each command passes here
        raise Refused("invalid", f"A sandbox id matches {SANDBOX_PATTERN}; lower case, no dots.")
    return name


@functools.lru_cache(maxsize=32_768)  # at each poll and message; a byte takes its time
def shard_of(sandbox: str) -> int:
    """The shard of a sandbox: 32-bit FNV-1a modulo SHARDS, as nats-server's `partition(128,1)` computes it."""
    h = 2166136261
    for byte in sandbox.encode():
        h = ((h ^ byte) * 16777619) & 0xFFFFFFFF
    return h % SHARDS


_INBOX = re.compile(r"_INBOX[^\s.*>\x00]*(\.[^\s.*>\x00]+)+")
MAX_INBOX = 256
MAX_SEQ = 2**63 - 1
"""No stream has more messages."""


def is_inbox(subject: str) -> bool:
    """Whether an answer may be sent there on behalf of a stranger, who else could make the adapter write anywhere."""
    return len(subject) <= MAX_INBOX and subject.isascii() and bool(_INBOX.fullmatch(subject))


_ESCAPED = re.compile(r"[^A-Za-z0-9_-]+")


def escape_token(text: str) -> str:
    """`text` as one subject token and bucket key: letters, digits, `-` and `_` stay, the rest becomes =XX (hex)."""
    return _ESCAPED.sub(lambda found: "".join(f"={byte:02X}" for byte in found[0].encode()), text)


@functools.lru_cache(maxsize=32_768)
def to_subject_token(text: str) -> str:
    """As `escape_token`, cached: for bots and users, not for what comes once, such as the id of a message."""
    return escape_token(text)


def from_subject_token(token: str) -> str:
    """The inverse of `escape_token`. Raises ValueError for what it never made."""
    text = unquote_to_bytes(token.replace("=", "%")).decode()
    if to_subject_token(text) != token:
        raise ValueError("not a name that was escaped")
    return text


def digest(data: bytes) -> str:
    """A short name for bytes, the same wherever they are seen."""
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def conversation_key(sandbox: str, user: str) -> str:
    """Key of one sandbox and one user."""
    return f"{sandbox}.{to_subject_token(user)}"


def user_of_key(key: str) -> str:
    """The user of a `conversation_key`."""
    return from_subject_token(key.partition(".")[2])


def stream_of(subject: str) -> str:
    """The stream that stores a subject, also those of buckets and of the object store."""
    first, _, rest = subject.partition(".")
    second = rest.partition(".")[0]
    if first in ("$KV", "$O"):
        return f"{'KV' if first == '$KV' else 'OBJ'}_{second}"
    return f"{first}_{'in' if second == 'inbox' else second}".upper()


class Names:
    """Every subject, stream and bucket under one prefix (setting WECHAT_NATS_PREFIX)."""

    def __init__(self, prefix: str = "wechat") -> None:
        self.prefix = prefix
        upper = prefix.upper()
        self.stream_in = f"{upper}_IN"
        self.stream_out = f"{upper}_OUT"
        self.stream_ctl = f"{upper}_CTL"
        self.stream_event = f"{upper}_EVENT"
        self.stream_dead = f"{upper}_DEAD"
        self.stream_journal = f"{upper}_JOURNAL"
        self.bindings = f"{prefix}_bindings"
        self.conversations = f"{prefix}_conversations"
        self.members = f"{prefix}_members"
        self.claims = f"{prefix}_claims"
        self.logins = f"{prefix}_logins"
        self.media = f"{prefix}_media"
        self.bind = f"{prefix}.ctl.bind"
        self.unbind = f"{prefix}.ctl.unbind"
        self.out_plain = f"{prefix}.out"

    def inbox(self, sandbox: str) -> str:
        """Where the adapter stores inbound messages; the server republishes them to `live`."""
        return f"{self.prefix}.inbox.{sandbox}"

    def live(self, sandbox: str) -> str:
        """What a sandbox subscribes to."""
        return f"{self.prefix}.in.{sandbox}"

    def out(self, sandbox: str) -> str:
        """Where a sandbox publishes its commands."""
        return f"{self.prefix}.out.{sandbox}"

    def out_shard(self, shard: int) -> str:
        """Filter of the commands of one shard, as stored (after the stream's subject transform)."""
        return f"{self.prefix}.out.{shard}.*"

    def out_of_sandbox(self, sandbox: str) -> str:
        """The commands of one sandbox, as stored."""
        return f"{self.prefix}.out.{shard_of(sandbox)}.{sandbox}"

    def event(self, sandbox: str, kind: str) -> str:
        return f"{self.prefix}.event.{sandbox}.{kind}"

    def receipt(self, sandbox: str, command: str) -> str:
        """Where the receipts of one command are stored, whose id may be anything, also `*`."""
        return f"{self.prefix}.event.{sandbox}.receipt.{escape_token(command)}"

    def receipts(self, sandbox: str) -> str:
        """Where the receipts of all commands of a sandbox are stored, which may be `*`."""
        return f"{self.prefix}.event.{sandbox}.receipt.*"

    def journal(self, bot: str) -> str:
        """What iLink handed over for a bot, and who polls it. No shard is in it: a bot that moves keeps its fence."""
        return f"{self.prefix}.journal.{to_subject_token(bot)}"

    def dead_letters(self, stream: str) -> str:
        return f"{self.prefix}.dead.{stream}"

    def bot_released(self) -> str:
        """Where replicas tell each other that a bot was given back; below what is closed to sandboxes."""
        return f"{self.prefix}.kv.bot_released"

    def replica_status(self) -> str:
        """Where all replicas are asked who they are; closed to sandboxes, too."""
        return f"{self.prefix}.kv.replica_status"

    def svc(self, verb: str) -> str:
        return f"{self.prefix}.svc.{verb}"
