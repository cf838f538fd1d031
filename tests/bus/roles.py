"""The table of roles in `helm/nats/README.md`: what is expected of each, row by row. `test_permissions.py` proves it.

`python -m tests.bus.roles` writes the table, `--check` only says whether it is stale (exit status 1).
Written by hand and apart from `adapter/security/permissions.py`, so that a subject too many there is noticed here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple

from tests.generate import ROOT

README = ROOT / "helm" / "nats" / "README.md"
START, END = "<!-- roles -->\n", "<!-- /roles -->"

COLUMNS = ("adapter", "operator", "platform", "service", "agents", "own", "untrusted", "other")
"""own: a sandbox, untrusted: one that is not trusted, both on subjects with their name in the place of `<sandbox>`;
other: a sandbox on subjects with another's."""
HEADS = (*COLUMNS[:5], "sandbox", "untrusted", "another sandbox")

STREAMS = (
    *("WECHAT_IN", "WECHAT_OUT", "WECHAT_EVENT", "WECHAT_DEAD"),
    *("KV_wechat_bindings", "KV_wechat_persons", "KV_wechat_readers", "KV_wechat_leases"),
    *("KV_wechat_logins", "OBJ_wechat_media"),
)
BUCKETS = tuple(stream.removeprefix("KV_") for stream in STREAMS if stream.startswith("KV_"))
SANDBOX = "<sandbox>"
EVENTS = ("binding", "login", "bind.c.1", "unbind.c.1", "erase.c.1")


class Row(NamedTuple):
    """One subject, and who (of COLUMNS, separated by blanks) may do it."""

    does: Literal["publish", "subscribe"]
    subject: str
    who: str = ""

    def may(self, column: str) -> bool:
        return column in self.who.split()


def _publish(*rows: tuple[str, str]) -> list[Row]:
    return [Row("publish", subject, who) for subject, who in rows]


def _subscribe(*rows: tuple[str, str]) -> list[Row]:
    return [Row("subscribe", subject, who) for subject, who in rows]


SUBJECTS = [
    *_publish(
        ("wechat.in.<sandbox>", "adapter"),
        ("wechat.inbox.<sandbox>.p", "adapter"),
        ("wechat.out", "adapter operator service"),
        ("wechat.out.<sandbox>", "adapter operator agents own"),
        *((f"wechat.{verb}.<sandbox>", "adapter operator platform") for verb in ("bind", "unbind", "erase")),
        ("wechat.erase._", "adapter operator platform"),
        *((f"wechat.event.<sandbox>.{kind}", "adapter") for kind in ("receipt.c.1", *EVENTS)),
        ("wechat.dead.WECHAT_OUT", "adapter"),
        *((f"wechat.adapter.{rest}", "adapter") for rest in ("here", "polled", "polls.r")),
        ("wechat.kv.wechat_bindings.b", ""),
        ("wechat.svc.bindings.list", "adapter operator platform agents"),
        ("wechat.svc.bindings.get", "operator platform"),
        *((f"wechat.svc.login.{verb}", "operator platform") for verb in ("start", "status", "verify", "cancel")),
        ("wechat.svc.media.get.<sandbox>", "operator agents own untrusted"),
        ("wechat.svc.media.put.<sandbox>", "operator service agents own untrusted"),
        ("wechat.svc.next.<sandbox>", "operator agents own untrusted"),
        ("wechat.svc.receipt", "operator platform service"),
        ("wechat.svc.receipt.<sandbox>", "operator agents own untrusted"),
        ("wechat.svc.replay", "operator"),
        ("wechat.svc.replay.<sandbox>", "operator agents own untrusted"),
        ("wechat.svc.send.<sandbox>", "operator untrusted"),
        ("wechat.svc.window", "operator platform service"),
        ("wechat.svc.window.<sandbox>", "operator agents own untrusted"),
        *((f"$KV.{bucket}.k", "adapter") for bucket in BUCKETS),
        ("$O.wechat_media.C.x", "adapter operator"),
        ("$O.wechat_media.M.x", "adapter operator"),
        ("$SRV.PING.wechat-nats", "adapter operator"),
        ("$SRV.INFO.wechat-nats", "operator"),
        ("$SRV.STATS.wechat-nats", "operator"),
        ("$SRV.PING", "operator"),
        ("_INBOX.x", ""),
        ("_INBOX_adapter.x", "adapter"),
        ("_INBOX_operator.x", "adapter"),
        ("_INBOX_platform.x", "adapter"),
        ("_INBOX_service.x", ""),
        ("_INBOX_agents.x", ""),
        ("_INBOX_<sandbox>.x", ""),
        ("_R_.x", "adapter"),
        ("$SYS.REQ.USER.INFO", "adapter operator"),
        ("$SYS.REQ.SERVER.PING", ""),
        ("$SYS.REQ.CLAIMS.UPDATE", ""),
        ("$SYS.REQ.ACCOUNT.WECHAT.CONNZ", ""),
        ("anything.else", ""),
    ),
    *_subscribe(
        ("wechat.in.<sandbox>", "operator agents own untrusted"),
        ("wechat.in.*", "operator agents"),
        ("wechat.inbox.<sandbox>.*", ""),
        ("wechat.out", "operator"),
        ("wechat.out.<sandbox>", "operator"),
        *((f"wechat.{verb}.<sandbox>", "") for verb in ("bind", "unbind", "erase")),
        ("wechat.event.<sandbox>.receipt.c.1", "operator platform service agents own untrusted"),
        ("wechat.event.<sandbox>.receipt.c.*", "operator platform service agents own untrusted"),
        ("wechat.event.<sandbox>.receipt.>", "operator platform service agents own untrusted"),
        *((f"wechat.event.<sandbox>.{kind}", "operator platform agents own untrusted") for kind in EVENTS),
        ("wechat.event.*.>", "operator platform agents"),
        ("wechat.event.*.receipt.>", "operator platform service agents"),
        ("wechat.dead.>", ""),
        *((f"wechat.adapter.{rest}", "adapter") for rest in ("here", "polled", "polls.r", ">")),
        ("wechat.kv.>", "adapter"),
        ("wechat.svc.>", "adapter"),
        ("wechat.svc.media.get.<sandbox>", "adapter"),
        ("wechat.svc.replay.<sandbox>", "adapter"),
        *((f"$KV.{bucket}.>", "") for bucket in BUCKETS),
        ("$KV.>", ""),
        ("$O.wechat_media.>", ""),
        ("$SRV.>", "adapter"),
        ("$JS.API.>", ""),
        ("$JS.ACK.>", ""),
        ("$JS.EVENT.ADVISORY.>", ""),
        ("$SYS.>", ""),
        ("_INBOX.>", ""),
        ("_INBOX_adapter.>", "adapter"),
        ("_INBOX_operator.>", "operator"),
        ("_INBOX_platform.>", "platform"),
        ("_INBOX_service.>", "service"),
        ("_INBOX_agents.>", "agents"),
        ("_INBOX_<sandbox>.>", "own untrusted"),
        ("_R_.>", ""),
        ("wechat.>", ""),
        ("*.>", ""),
        (">", ""),
    ),
]

ALL, PULLED, PURGED, READ = (
    "all",
    "WECHAT_OUT",
    "WECHAT_IN WECHAT_EVENT OBJ_wechat_media",
    "WECHAT_IN WECHAT_EVENT WECHAT_DEAD OBJ_wechat_media",
)
ERASED = " ".join(stream for stream in STREAMS if not stream.startswith("KV_"))

API: list[tuple[str, dict[str, str]]] = [
    ("$JS.API.INFO", {"adapter": ALL, "operator": ALL}),
    ("$JS.API.STREAM.NAMES", {"operator": ALL}),
    ("$JS.API.STREAM.LIST", {"adapter": ALL, "operator": ALL}),
    ("$JS.API.STREAM.INFO.<stream>", {"adapter": ALL, "operator": ALL}),
    ("$JS.API.STREAM.CREATE.<stream>", {"adapter": ALL}),
    ("$JS.API.STREAM.UPDATE.<stream>", {"adapter": ALL}),
    ("$JS.API.STREAM.DELETE.<stream>", {}),
    ("$JS.API.STREAM.PURGE.<stream>", {"adapter": PURGED, "operator": "OBJ_wechat_media"}),
    ("$JS.API.STREAM.MSG.GET.<stream>", {"adapter": ALL, "operator": READ}),
    (
        "$JS.API.STREAM.MSG.DELETE.<stream>",
        {"adapter": ERASED, "operator": "WECHAT_DEAD WECHAT_OUT"},
    ),
    ("$JS.API.STREAM.SNAPSHOT.<stream>", {}),
    ("$JS.API.STREAM.RESTORE.<stream>", {}),
    ("$JS.API.STREAM.LEADER.STEPDOWN.<stream>", {}),
    ("$JS.API.STREAM.PEER.REMOVE.<stream>", {}),
    ("$JS.API.STREAM.PEER.EVACUATE.<stream>", {}),
    ("$JS.API.STREAM.CANCEL_MOVE.<stream>", {}),
    ("$JS.API.DIRECT.GET.<stream>", {"adapter": ALL, "operator": f"{READ} WECHAT_OUT KV_wechat_leases"}),
    ("$JS.API.DIRECT.GET.<stream>.wechat.x", {"adapter": ALL, "operator": READ}),
    ("$JS.API.DIRECT.GET.<stream>.$KV.wechat_bindings.b", {"adapter": ALL, "operator": READ}),
    (
        "$JS.API.DIRECT.GET.<stream>.$KV.wechat_bindings.layout",
        {"adapter": ALL, "operator": f"{READ} KV_wechat_bindings"},
    ),
    ("$JS.API.CONSUMER.NAMES.<stream>", {"operator": ALL}),
    ("$JS.API.CONSUMER.LIST.<stream>", {"operator": ALL}),
    ("$JS.API.CONSUMER.INFO.<stream>.<sandbox>", {"adapter": ALL, "operator": ALL}),
    ("$JS.API.CONSUMER.CREATE.<stream>", {"operator": READ}),
    ("$JS.API.CONSUMER.CREATE.<stream>.<sandbox>", {"adapter": PULLED, "operator": READ}),
    ("$JS.API.CONSUMER.CREATE.<stream>.<sandbox>.wechat.inbox.<sandbox>.*", {"operator": READ}),
    ("$JS.API.CONSUMER.DURABLE.CREATE.<stream>.<sandbox>", {}),
    ("$JS.API.CONSUMER.DELETE.<stream>.<sandbox>", {}),
    ("$JS.API.CONSUMER.MSG.NEXT.<stream>.<sandbox>", {"adapter": PULLED}),
    ("$JS.API.CONSUMER.RESET.<stream>.<sandbox>", {"adapter": PULLED}),
    ("$JS.API.CONSUMER.PAUSE.<stream>.<sandbox>", {}),
    ("$JS.API.CONSUMER.UNPIN.<stream>.<sandbox>", {}),
    ("$JS.API.CONSUMER.LEADER.STEPDOWN.<stream>.<sandbox>", {}),
    ("$JS.API.CONSUMER.PEER.REMOVE.<stream>.<sandbox>", {}),
    ("$JS.API.CONSUMER.PEER.EVACUATE.<stream>.<sandbox>", {}),
    ("$JS.API.META.LEADER.STEPDOWN", {}),
    ("$JS.API.META.RESCUE", {}),
    ("$JS.API.SERVER.REMOVE", {}),
    ("$JS.API.SERVER.EVACUATE", {}),
    ("$JS.API.ACCOUNT.PURGE.WECHAT", {}),
    ("$JS.API.ACCOUNT.STREAM.MOVE.WECHAT.<stream>", {}),
    ("$JS.API.ACCOUNT.STREAM.CANCEL_MOVE.WECHAT.<stream>", {}),
    ("$JS.hub.API.STREAM.INFO.<stream>", {}),
    ("$JS.ACK.<stream>.<sandbox>.1.1.1.1.0", {"adapter": PULLED}),
    ("$JS.ACK._.x.<stream>.<sandbox>.1.1.1.1.0.x", {"adapter": PULLED}),
    ("$JS.FC.<stream>.<sandbox>.x", {"operator": READ}),
    ("$JS.FC._.x.<stream>.<sandbox>.x", {"operator": READ}),
    ("$JS.SNAPSHOT.ACK.<stream>.x", {}),
    ("$JS.SNAPSHOT.RESTORE.<stream>.x", {}),
]
"""Publishing to JetStream itself, all that a server of 2.15 answers: of which streams each role may.

`<sandbox>` stands for the consumer's name, `hub` for another domain, `_.x` for domain and account before a stream.
"""


def api_rows() -> list[Row]:
    """API spelled out for each stream."""
    rows = []
    for subject, may in API:
        for stream in STREAMS if "<stream>" in subject else STREAMS[:1]:
            who = [column for column, of in may.items() if of == ALL or stream in of.split()]
            rows.append(Row("publish", subject.replace("<stream>", stream), " ".join(who)))
    return rows


ROWS = [*SUBJECTS, *api_rows()]


def table() -> str:
    """As the README shows it: who may use each subject, which streams of JetStream's API, and what nobody may."""
    lines = ["| | subject | who |", "|---|---|---|"]
    lines += [f"| {row.does} | `{row.subject}` | {_who(row)} |" for row in SUBJECTS if row.who]
    lines += ["", "| publish, of the streams | adapter | operator |", "|---|---|---|"]
    for subject, may in API:
        if may:
            cells = [_names(may.get(column, ""), subject) for column in ("adapter", "operator")]
            lines.append(f"| `{subject}` | {' | '.join(cells)} |")
    for does in ("publish", "subscribe"):
        refused = [row.subject for row in SUBJECTS if row.does == does and not row.who]
        refused += [subject for subject, may in API if does == "publish" and not may]
        lines += ["", f"Nobody may {does}: {', '.join(f'`{subject}`' for subject in refused)}."]
    return "\n".join(lines) + "\n"


def _who(row: Row) -> str:
    return ", ".join(head for head, column in zip(HEADS, COLUMNS, strict=True) if row.may(column))


def _names(streams: str, subject: str) -> str:
    if streams == ALL:
        return "all" if "<stream>" in subject else "yes"
    return ", ".join(f"`{stream}`" for stream in streams.split())


def rendered() -> str:
    """The README with the table of now."""
    before, start, rest = README.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{README} has lost the marks of the table")
    return before + start + table() + end + after


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    if rendered() == README.read_text(encoding="utf-8"):
        return 0
    if list(arguments) == ["--check"]:
        sys.stdout.write("helm/nats/README.md is not what the tests say; run: make generate\n")
        return 1
    README.write_text(rendered(), encoding="utf-8")
    sys.stdout.write("helm/nats/README.md\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
