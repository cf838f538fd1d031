"""Permissions on the bus: the roles, the subjects of each, and the exports between accounts. No I/O.

The configurations in `helm/nats/`, the JWTs of `wechat-nats permissions` and the checks of `doctor` come from this
module.

Streams, buckets, adapter and operators are in one account. All others are in another account, and reach only what it
imports. Within an account the server does not check the reply subject of a request against permissions, so a request
could make it write anywhere. Between accounts a reply goes to the requester's account.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from adapter.contract.names import Names, check_sandbox
from adapter.errors import Refused

Role: TypeAlias = Literal["adapter", "operator", "platform", "service", "sandbox"]
ROLES: tuple[Role, ...] = ("adapter", "operator", "platform", "service", "sandbox")

SYSTEM, WECHAT, PLATFORM, SERVICE, SANDBOX = "SYS", "WECHAT", "PLATFORM", "SERVICE", "SANDBOX"
"""Names of the accounts. A sandbox's own account has its name, which is in lower case."""

ACCOUNT_OF: dict[Role, str] = {
    "adapter": WECHAT,
    "operator": WECHAT,
    "platform": PLATFORM,
    "service": SERVICE,
    "sandbox": SANDBOX,
}
TAG = "{{tag(sandbox)}}"
"""The sandbox in the template of a signing key; a user's JWT has the tag `sandbox:<name>`."""
USER_INFO = "$SYS.REQ.USER.INFO"
"""Subject on which the server reports a user's permissions."""


SANDBOX_PAYLOAD = 528 * 1024
"""Largest message of a sandbox, headers included: a piece of media fits, the server's full megabyte does not."""


class Grants(NamedTuple):
    """Subjects that a role may publish and subscribe; all others are denied."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


class Share(NamedTuple):
    """A subject of WECHAT that another account imports."""

    kind: Literal["stream", "service"]
    """stream: WECHAT publishes there. service: the importer publishes, and WECHAT may answer."""
    subject: str
    many: bool = False
    """The answer has several messages."""


SHADOW = Share("service", "$JS.API.INFO")
"""An account without JetStream answers every request to `$JS.API` with an error, also one that it imports, unless it
imports this one, too. No user may publish it."""


def inbox(role: Role, sandbox: str = "") -> str:
    """The inbox prefix of a role, or of one sandbox (setting NATS_INBOX_PREFIX)."""
    return f"_INBOX_{sandbox or role}"


def grants(names: Names, role: Role, sandbox: str = TAG) -> Grants:
    """The permissions of a role. `sandbox` matters only for that role."""
    match role:
        case "adapter":
            return Grants(_adapter_publishes(names), _adapter_subscribes(names))
        case "operator":
            heard = (names.live("*"), names.event("*", ">"), names.out_plain, names.out("*"))
            return Grants(_operator_publishes(names), (*heard, _inbox_subjects("operator")))
        case "platform":
            asks = (names.svc("bindings.*"), names.svc("login.*"), names.svc("window"), names.svc("receipt"))
            return Grants(
                (names.bind, names.unbind, names.erase, *asks), (names.event("*", ">"), _inbox_subjects("platform"))
            )
        case "service":
            publish = (names.out_plain, names.svc("window"), names.svc("receipt"), names.svc("media.put.*"))
            return Grants(publish, (names.receipts("*"), _inbox_subjects("service")))
        case "sandbox":
            shares = imports(names, role, sandbox)
            stream_subjects = [share.subject for share in shares if share.kind == "stream"]
            request_subjects = [share.subject for share in shares if share.kind == "service" and share != SHADOW]
            return Grants(tuple(request_subjects), (*stream_subjects, f"{inbox(role, sandbox)}.>"))


def imports(names: Names, role: Role, sandbox: str = "*") -> list[Share]:
    """The imports of a role's account outside of WECHAT, for one sandbox, or for all in one account."""
    if role == "sandbox":
        # an acknowledgement has exactly this many tokens; more could be domain and account of another
        pull = f"$JS.API.CONSUMER.MSG.NEXT.{names.stream_in}.{sandbox}"
        look = f"$JS.API.CONSUMER.INFO.{names.stream_in}.{sandbox}"  # JetStream clients ask for it before they pull
        verbs = ("media.get", "media.put", "receipt", "replay", "window")
        return [
            Share("stream", names.live(sandbox)),
            Share("stream", names.event(sandbox, ">")),
            Share("service", names.out(sandbox)),
            *(Share("service", names.svc(f"{verb}.{sandbox}")) for verb in verbs),
            SHADOW,
            Share("service", look),
            Share("service", pull, many=True),
            Share("service", f"$JS.ACK.{names.stream_in}.{sandbox}.*.*.*.*.*"),
        ]
    granted = grants(names, role)
    shares = [Share("service", subject) for subject in granted.publish]
    shares += [Share("stream", subject) for subject in granted.subscribe if subject != _inbox_subjects(role)]
    if role == "platform":  # answers to bind, unbind and erase go to the inbox in a header
        shares.append(Share("stream", _inbox_subjects(role)))
    return shares


def exports(names: Names) -> dict[Share, list[Role]]:
    """WECHAT's exports with their roles. No subject contains another, which a server refuses in a JWT."""
    wanted = [(share, role) for role in ROLES if ACCOUNT_OF[role] != WECHAT for share in imports(names, role)]
    found: dict[Share, list[Role]] = {}
    for share, role in wanted:
        wide = next(
            (s for s, _ in wanted if s != share and s.kind == share.kind and covers(s.subject, share.subject)), share
        )
        found.setdefault(wide, []).append(role)
    return {share: list(dict.fromkeys(roles)) for share, roles in found.items()}


def streams(names: Names) -> tuple[str, ...]:
    """All streams, including those of buckets and objects."""
    return (names.stream_ctl, *_purged_streams(names), *(f"KV_{bucket}" for bucket in buckets(names)))


def buckets(names: Names) -> tuple[str, ...]:
    """All key-value buckets."""
    return names.bindings, names.conversations, names.members, names.claims, names.logins


def _inbox_subjects(role: Role) -> str:
    return f"{inbox(role)}.>"


def _api_subjects(*verbs: str) -> tuple[str, ...]:
    return tuple(f"$JS.API.{verb}" for verb in verbs)


def _purged_streams(names: Names) -> tuple[str, ...]:
    """Streams of which the adapter deletes single messages: a person's, above all."""
    kept = (names.stream_event, names.stream_dead, names.stream_journal, f"OBJ_{names.media}")
    return (names.stream_in, names.stream_out, *kept)


def _adapter_publishes(names: Names) -> tuple[str, ...]:
    prefix, media = names.prefix, f"OBJ_{names.media}"
    return (
        *(names.inbox("*"), names.out("*"), names.bind, names.event("*", ">"), names.bot_released()),
        *(names.replica_status(), names.out_plain, names.unbind),  # the console asks, and retries dead commands
        *(f"{prefix}.journal.>", names.dead_letters("*")),
        *(f"$KV.{bucket}.>" for bucket in buckets(names)),
        f"$O.{names.media}.>",
        *_api_subjects("INFO", "STREAM.INFO.*", "STREAM.MSG.GET.*", "DIRECT.GET.>"),
        *_api_subjects("CONSUMER.NAMES.*", "CONSUMER.INFO.*.*"),
        *_api_subjects(*(f"STREAM.{verb}.{stream}" for verb in ("CREATE", "UPDATE") for stream in streams(names))),
        *_api_subjects(*(f"STREAM.MSG.DELETE.{stream}" for stream in _purged_streams(names))),
        *_api_subjects(*(f"STREAM.PURGE.{stream}" for stream in (media, names.stream_event, names.stream_in))),
        *_api_subjects(f"CONSUMER.CREATE.{names.stream_in}.*.{names.inbox('*')}"),
        *_api_subjects(f"CONSUMER.RESET.{names.stream_in}.*"),
        *_api_subjects(
            *(f"CONSUMER.{verb}.{s}.*" for s in _pulled_streams(names) for verb in ("CREATE", "RESET", "MSG.NEXT"))
        ),
        *(f"$JS.ACK.{stream}.>" for stream in _pulled_streams(names)),
        *(_inbox_subjects("operator"), _inbox_subjects("platform"), "_R_.>"),
        # requests of `doctor` under this user
        *(USER_INFO, "$SRV.PING.>", names.svc("bindings.list"), _inbox_subjects("adapter")),
    )


def _pulled_streams(names: Names) -> tuple[str, str]:
    """Streams with consumers of the adapter."""
    return names.stream_out, names.stream_ctl


def _adapter_subscribes(names: Names) -> tuple[str, ...]:
    return names.svc(">"), f"{names.prefix}.kv.>", "$SRV.>", _inbox_subjects("adapter")


def _operator_publishes(names: Names) -> tuple[str, ...]:
    media = f"OBJ_{names.media}"
    readable = (names.stream_in, names.stream_event, names.stream_dead, media)
    return (
        *(names.bind, names.unbind, names.erase, names.out_plain, names.out("*"), names.svc(">"), "$SRV.>"),
        *_api_subjects("INFO", "STREAM.NAMES", "STREAM.LIST", "STREAM.INFO.*"),
        *_api_subjects("CONSUMER.NAMES.*", "CONSUMER.LIST.*", "CONSUMER.INFO.*.*"),
        *_api_subjects(*(f"CONSUMER.CREATE.{stream}{rest}" for stream in readable for rest in ("", ".>"))),
        *_api_subjects(*(f"DIRECT.GET.{stream}{rest}" for stream in readable for rest in ("", ".>"))),
        *_api_subjects(*(f"STREAM.MSG.GET.{stream}" for stream in readable)),
        *_api_subjects(f"DIRECT.GET.{names.stream_out}"),  # a work queue allows no other consumer
        *_api_subjects(*(f"STREAM.MSG.DELETE.{stream}" for stream in (names.stream_dead, names.stream_out))),
        *_api_subjects(f"STREAM.PURGE.{media}"),
        *(f"$JS.FC.{stream}.>" for stream in readable),
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


# The server's configuration ----------------------------------------------------------------------------

HEAD = """\
# {title}
# Written by `wechat-nats permissions config{arguments}`. Include it into the server's configuration:
#
#   jetstream {{ store_dir: "/data", sync_interval: always }}
#   include {file}
#
# Passwords are variables of the server's environment. It does not start while one is missing.

"""


FILES = {False: "accounts.conf", True: "accounts-each.conf"}
"""The configurations in `helm/nats/`, by whether each sandbox has its own account."""
OWN_ACCOUNTS = "--own-accounts"


def variable(role: str, sandbox: str = "") -> str:
    """The server's environment variable with a user's password."""
    return f"PASSWORD_{sandbox.replace('-', '_') or role}".upper()


def server_config(names: Names, sandboxes: Sequence[str], *, own_accounts: bool = False) -> str:
    """A nats-server configuration with a user for each role and sandbox. Raises Refused("invalid")."""
    for sandbox in sandboxes:
        check_sandbox(sandbox)
    variables = [variable(role) for role in (*ROLES[:-1], "sys")] + [variable("", sandbox) for sandbox in sandboxes]
    if twice := {name for name in variables if variables.count(name) > 1}:
        raise Refused("invalid", f"Two users would have their password in {min(twice)}: rename a sandbox.")
    accounts_of = {role: [account] for role, account in ACCOUNT_OF.items()}
    if own_accounts:
        accounts_of["sandbox"] = list(sandboxes)
    inside: tuple[Role, ...] = ("adapter", "operator")
    outside: tuple[Role, ...] = ("platform", "service")
    accounts: dict[str, Any] = {
        SYSTEM: {"users": [{"user": '"sys"', "password": f"${variable('sys')}"}]},
        WECHAT: {
            "jetstream": "enabled",
            "users": [_user(role, grants(names, role)) for role in inside],
            "exports": [
                {share.kind: f'"{share.subject}"'}
                | ({"response_type": "stream"} if share.many else {})
                | {"accounts": [f'"{account}"' for role in roles for account in accounts_of[role]]}
                for share, roles in exports(names).items()
            ],
        },
    }
    for role in outside:
        accounts[ACCOUNT_OF[role]] = {"users": [_user(role, grants(names, role))], "imports": _imports(names, role)}
    limits = {"limits": {"max_payload": SANDBOX_PAYLOAD}}
    users = {sandbox: _user(sandbox, grants(names, "sandbox", sandbox), sandbox) for sandbox in sandboxes}
    if own_accounts:
        for sandbox, user in users.items():
            accounts[sandbox] = limits | {"users": [user], "imports": _imports(names, "sandbox", sandbox)}
    else:
        accounts[SANDBOX] = limits | {"users": list(users.values()), "imports": _imports(names, "sandbox")}
    arguments = "".join(f" {argument}" for argument in ([OWN_ACCOUNTS] if own_accounts else []) + list(sandboxes))
    title = "Every sandbox in an account of its own." if own_accounts else "All sandboxes in one account."
    head = HEAD.format(title=title, arguments=arguments, file=FILES[own_accounts])
    quoted = {f'"{name}"': account for name, account in accounts.items()}
    return f"{head}system_account: SYS\n\naccounts: {_render(quoted)}\n"


def _user(name: str, may: Grants, sandbox: str = "") -> dict[str, Any]:
    allowed = {"publish": may.publish, "subscribe": may.subscribe}
    permissions = {key: {"allow": [f'"{subject}"' for subject in subjects]} for key, subjects in allowed.items()}
    return {"user": f'"{name}"', "password": f"${variable(name, sandbox)}", "permissions": permissions}


def _imports(names: Names, role: Role, sandbox: str = "*") -> list[Any]:
    shares = imports(names, role, sandbox)
    return [{share.kind: {"account": f'"{WECHAT}"', "subject": f'"{share.subject}"'}} for share in shares]


def _render(value: Any, indent: str = "") -> str:
    """A value of the configuration. What has few parts stands on one line."""
    inner = f"{indent}  "
    match value:
        case dict():
            parts = [f"{key}: {_render(each, inner)}" for key, each in value.items()]
            first, last = "{}"
        case list():
            parts = [_render(each, inner) for each in value]
            first, last = "[]"
        case _:
            return str(value)
    if len(line := ", ".join(parts)) < 100 and "\n" not in line:
        return f"{first} {line} {last}"
    return f"{first}\n" + "".join(f"{inner}{part}\n" for part in parts) + indent + last
