"""Permissions on the bus: the subjects of the roles that adapters and `doctor` know, and what a user may. No I/O.

`tools/accounts.py` makes a server's accounts of it, with the other roles.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from adapter.contract.names import LAYOUT_KEY, Names

Role: TypeAlias = Literal["adapter", "operator", "platform", "service", "agents", "sandbox", "untrusted"]
TAG = "{{tag(sandbox)}}"
"""The sandbox in the template of a signing key; a user's JWT has the tag `sandbox:<name>`."""
USER_INFO = "$SYS.REQ.USER.INFO"
"""Subject on which the server reports a user's permissions."""


class Grants(NamedTuple):
    """Subjects that a role may publish and subscribe; all others are denied."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def inbox(role: Role, sandbox: str = "") -> str:
    """The inbox prefix of a role, or of one sandbox (setting NATS_INBOX_PREFIX)."""
    return f"_INBOX_{sandbox or role}"


def grants(names: Names, role: Literal["adapter", "operator", "sandbox", "untrusted"], sandbox: str = TAG) -> Grants:
    """The permissions of a role. `sandbox` matters only for the last two. Who is `untrusted` has commands stored by
    the adapter, since one header of a publish may stop a stream (SECURITY.md)."""
    match role:
        case "adapter":
            return Grants(_adapter_publishes(names), _adapter_subscribes(names))
        case "operator":
            heard = (names.live("*"), names.event("*", ">"), names.out_plain, names.out("*"))
            return Grants(_operator_publishes(names), (*heard, _inbox_subjects("operator")))
        case "sandbox" | "untrusted":
            verbs = ("media.get", "media.put", "next", "receipt", "replay", "window")
            stores = names.out(sandbox) if role == "sandbox" else names.svc(f"send.{sandbox}")
            publish = (stores, *(names.svc(f"{verb}.{sandbox}") for verb in verbs))
            return Grants(publish, (names.live(sandbox), names.event(sandbox, ">"), f"{inbox(role, sandbox)}.>"))


def streams(names: Names) -> tuple[str, ...]:
    """All streams, including those of buckets and objects."""
    return (*_purged_streams(names), *(f"KV_{bucket}" for bucket in buckets(names)))


def buckets(names: Names) -> tuple[str, ...]:
    """All key-value buckets."""
    return names.bindings, names.persons, names.readers, names.logins, names.leases


def _inbox_subjects(role: Role) -> str:
    return f"{inbox(role)}.>"


def _api_subjects(*verbs: str) -> tuple[str, ...]:
    return tuple(f"$JS.API.{verb}" for verb in verbs)


def _purged_streams(names: Names) -> tuple[str, ...]:
    """Streams of which the adapter deletes single messages: a person's, above all."""
    kept = (names.stream_event, names.stream_dead, f"OBJ_{names.media}")
    return (names.stream_in, names.stream_out, *kept)


def _adapter_publishes(names: Names) -> tuple[str, ...]:
    media = f"OBJ_{names.media}"
    return (
        *(names.inbox("*"), names.live("*"), *_said(names), names.event("*", ">")),
        *(f"{names.prefix}.adapter.>", names.out_plain),  # the console asks, and retries dead commands
        names.dead_letters("*"),
        *(f"$KV.{bucket}.>" for bucket in buckets(names)),
        f"$O.{names.media}.>",
        *_api_subjects("INFO", "STREAM.INFO.*", "STREAM.MSG.GET.*", "DIRECT.GET.>"),
        *_api_subjects("CONSUMER.INFO.*.*"),
        *_api_subjects(*(f"STREAM.{verb}.{stream}" for verb in ("CREATE", "UPDATE") for stream in streams(names))),
        *_api_subjects(*(f"STREAM.MSG.DELETE.{stream}" for stream in _purged_streams(names))),
        *_api_subjects(*(f"STREAM.PURGE.{stream}" for stream in (media, names.stream_event, names.stream_in))),
        *_api_subjects(*(f"CONSUMER.{verb}.{names.stream_out}.*" for verb in ("CREATE", "RESET", "MSG.NEXT"))),
        *_both_layouts("ACK", (names.stream_out,)),
        *(_inbox_subjects("operator"), _inbox_subjects("platform"), "_R_.>"),
        # requests of `doctor` under this user
        *(USER_INFO, "$SRV.PING.>", names.svc("bindings.list"), _inbox_subjects("adapter")),
        *_api_subjects("STREAM.LIST"),
    )


def _both_layouts(verb: Literal["ACK", "FC"], of: Iterable[str]) -> tuple[str, ...]:
    """Subjects of acknowledgements and flow control, also with domain and account before the stream: the default of
    nats-server 2.16, and in 2.14 and 2.15 its option `js_ack_fc_v2`."""
    return tuple(f"$JS.{verb}.{before}{stream}.>" for stream in of for before in ("", "*.*."))


def _said(names: Names) -> tuple[str, ...]:
    """All that may be said to a sandbox."""
    return tuple(names.said(verb, "*") for verb in ("out", "bind", "unbind", "erase"))


def _adapter_subscribes(names: Names) -> tuple[str, ...]:
    return names.svc(">"), f"{names.prefix}.kv.>", f"{names.prefix}.adapter.>", "$SRV.>", _inbox_subjects("adapter")


def _operator_publishes(names: Names) -> tuple[str, ...]:
    media = f"OBJ_{names.media}"
    readable = (names.stream_in, names.stream_event, names.stream_dead, media)
    return (
        *(*_said(names), names.out_plain, names.svc(">"), "$SRV.>"),
        *_api_subjects("INFO", "STREAM.NAMES", "STREAM.LIST", "STREAM.INFO.*"),
        *_api_subjects("CONSUMER.NAMES.*", "CONSUMER.LIST.*", "CONSUMER.INFO.*.*"),
        *_api_subjects(*(f"CONSUMER.CREATE.{stream}{rest}" for stream in readable for rest in ("", ".>"))),
        *_api_subjects(*(f"DIRECT.GET.{stream}{rest}" for stream in readable for rest in ("", ".>"))),
        *_api_subjects(*(f"STREAM.MSG.GET.{stream}" for stream in readable)),
        *_api_subjects(f"DIRECT.GET.{names.stream_out}"),  # a work queue allows no other consumer
        # `doctor` reads the layout key, and who owns the partitions
        *_api_subjects(f"DIRECT.GET.KV_{names.bindings}.$KV.{names.bindings}.{LAYOUT_KEY}"),
        *_api_subjects(f"DIRECT.GET.KV_{names.leases}"),
        *_api_subjects(*(f"STREAM.MSG.DELETE.{stream}" for stream in (names.stream_dead, names.stream_out))),
        *_api_subjects(f"STREAM.PURGE.{media}"),
        *_both_layouts("FC", readable),
        f"$O.{names.media}.>",
        USER_INFO,
    )


# What a user's permissions mean ------------------------------------------------------------------------


def covers(pattern: str, subject: str) -> bool:
    """Whether `pattern` matches everything that `subject` (may have wildcards) matches."""
    pattern_tokens, tokens = pattern.split("."), subject.split(".")
    for number, token in enumerate(pattern_tokens):
        if token == ">":
            return len(tokens) > number
        if len(tokens) <= number or tokens[number] == ">" or (token != "*" and token != tokens[number]):
            return False
    return len(pattern_tokens) == len(tokens)


def overlaps(pattern: str, subject: str) -> bool:
    """Whether some subject matches both."""
    pattern_tokens, tokens = pattern.split("."), subject.split(".")
    for one, other in zip(pattern_tokens, tokens, strict=False):
        if ">" in (one, other):
            return True
        if one != other and "*" not in (one, other):
            return False
    return len(pattern_tokens) == len(tokens)


class Allowed(msgspec.Struct, frozen=True):
    """What a user may publish or subscribe. Without `allow`, everything that is not denied."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()

    def allows_all_of(self, subject: str) -> bool:
        """Whether all of `subject` is allowed."""
        allowed = not self.allow or any(covers(pattern, subject) for pattern in self.allow)
        return allowed and not any(overlaps(pattern, subject) for pattern in self.deny)

    def allows_some_of(self, subject: str) -> bool:
        """Whether some of `subject` is allowed."""
        allowed = not self.allow or any(overlaps(pattern, subject) for pattern in self.allow)
        return allowed and not any(covers(pattern, subject) for pattern in self.deny)


class Permissions(msgspec.Struct, frozen=True):
    """A user's permissions as the server reports them."""

    publish: Allowed = Allowed()
    subscribe: Allowed = Allowed()

    def missing(self, wanted: Grants) -> list[str]:
        """The parts of `wanted` that this user lacks, as `publish <subject>` and `subscribe <subject>`."""
        lacks = [f"publish {subject}" for subject in wanted.publish if not self.publish.allows_all_of(subject)]
        return lacks + [
            f"subscribe {subject}" for subject in wanted.subscribe if not self.subscribe.allows_all_of(subject)
        ]


class User(msgspec.Struct, frozen=True):
    """The user of a connection as the server reports it."""

    account: str = ""
    permissions: Permissions = Permissions()


class _Info(msgspec.Struct, frozen=True):
    data: User = User()


def user_of(answer: bytes) -> User:
    """Decodes the answer to USER_INFO. Raises errors.UNDECODABLE."""
    return msgspec.json.decode(answer, type=_Info).data


def required(names: Names, inbox_prefix: str) -> Grants:
    """The rights that every adapter needs, with any inbox prefix."""
    of_adapter = grants(names, "adapter")
    asked_here = {USER_INFO, "$SRV.PING.>", names.svc("bindings.list"), "_R_.>"}
    publish = [s for s in of_adapter.publish if not s.startswith("_INBOX") and s not in asked_here]
    subscribe = [s for s in of_adapter.subscribe if not s.startswith("_INBOX")]
    return Grants(tuple(publish), (*subscribe, f"{inbox_prefix}.>"))
