"""What makes the templates in `helm/nats/`: the accounts, the roles in them, and the exports between them.

Streams, buckets, adapter and operators are in one account. All others are in another account, and reach only what it
imports. Within an account the server does not check the reply subject of a request against permissions, so a request
could make it write anywhere. Between accounts a reply goes to the requester's account.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from adapter.contract.names import Names
from adapter.tools.permissions import TAG, Grants, Role, covers, inbox
from adapter.tools.permissions import grants as product_grants

ROLES: tuple[Role, ...] = ("adapter", "operator", "platform", "service", "agents", "sandbox", "untrusted")
OF_ONE: tuple[Role, ...] = ("sandbox", "untrusted")
"""Roles of a single sandbox."""

SYSTEM, WECHAT, PLATFORM, SERVICE, AGENTS = "SYS", "WECHAT", "PLATFORM", "SERVICE", "AGENTS"
SANDBOX, UNTRUSTED = "SANDBOX", "UNTRUSTED"
"""Names of the accounts. A sandbox's own account has its name, which is in lower case."""

ACCOUNT_OF: dict[Role, str] = {
    "adapter": WECHAT,
    "operator": WECHAT,
    "platform": PLATFORM,
    "service": SERVICE,
    "agents": AGENTS,
    "sandbox": SANDBOX,
    "untrusted": UNTRUSTED,
}
SANDBOX_PAYLOAD = 528 * 1024
"""Largest message of a sandbox, headers included: a piece of media fits, the server's full megabyte does not."""
ARGUMENT = "$1"
"""The sandbox in the scripts for `nsc`."""


class Share(NamedTuple):
    """A subject of WECHAT that another account imports."""

    kind: Literal["stream", "service"]
    """stream: WECHAT publishes there. service: the importer publishes, and WECHAT may answer."""
    subject: str


def grants(names: Names, role: Role, sandbox: str = TAG) -> Grants:
    """The permissions of a role. `sandbox` matters only for that role."""
    match role:
        case "platform":
            asks = (names.svc("bindings.*"), names.svc("login.*"), names.svc("window"), names.svc("receipt"))
            heard = (names.event("*", ">"), f"{inbox(role)}.>")
            return Grants((*(names.said(verb, "*") for verb in ("bind", "unbind", "erase")), *asks), heard)
        case "service":
            publish = (names.out_plain, names.svc("window"), names.svc("receipt"), names.svc("media.put.*"))
            return Grants(publish, (names.receipts("*"), f"{inbox(role)}.>"))
        case "agents":
            of_each = product_grants(names, "sandbox", "*").publish
            inboxes = f"{inbox(role)}.>"
            return Grants((*of_each, names.svc("bindings.list")), (names.live("*"), names.event("*", ">"), inboxes))
        case _:
            return product_grants(names, role, sandbox)


def imports(names: Names, role: Role, sandbox: str = "*") -> list[Share]:
    """The imports of a role's account outside of WECHAT, for one sandbox, or for all in one account."""
    granted = grants(names, role, sandbox)
    own = f"{inbox(role, sandbox if role in OF_ONE else '')}.>"
    shares = [Share("service", subject) for subject in granted.publish]
    shares += [Share("stream", subject) for subject in granted.subscribe if subject != own]
    if role == "platform":  # the receipt of a bind, unbind or erase goes to the inbox in a header, too
        shares.append(Share("stream", own))
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


# Passwords ---------------------------------------------------------------------------------------------

HEAD = """\
# {title}
# Include it into the server's configuration:
#
#   jetstream {{ store_dir: "/data", sync_interval: always }}
#   include {file}
#
# Passwords are variables of the server's environment. It does not start while one is missing. For another sandbox
# than s1 and s2, repeat what names them{each}. The sandbox u1 is not trusted: the adapter stores its commands.

"""


FILES = {False: "accounts.conf", True: "accounts-each.conf"}
"""The configurations in `helm/nats/`, by whether each sandbox has its own account."""


def variable(role: str, sandbox: str = "") -> str:
    """The server's environment variable with a user's password."""
    return f"PASSWORD_{sandbox.replace('-', '_') or role}".upper()


def server_config(
    names: Names, sandboxes: Sequence[str], *, untrusted: Sequence[str] = ("u1",), own_accounts: bool = False
) -> str:
    """A nats-server configuration with a user for each role and sandbox."""
    accounts_of = {role: [account] for role, account in ACCOUNT_OF.items()}
    if own_accounts:
        accounts_of |= {"sandbox": list(sandboxes), "untrusted": list(untrusted)}
    inside: tuple[Role, ...] = ("adapter", "operator")
    outside: tuple[Role, ...] = ("platform", "service", "agents")
    accounts: dict[str, Any] = {
        SYSTEM: {"users": [{"user": '"sys"', "password": f"${variable('sys')}"}]},
        WECHAT: {
            "jetstream": "enabled",
            "users": [_user(role, grants(names, role)) for role in inside],
            "exports": [
                {share.kind: f'"{share.subject}"'}
                | {"accounts": [f'"{account}"' for role in roles for account in accounts_of[role]]}
                for share, roles in exports(names).items()
            ],
        },
    }
    for role in outside:
        accounts[ACCOUNT_OF[role]] = {"users": [_user(role, grants(names, role))], "imports": _imports(names, role)}
    limits = {"limits": {"max_payload": SANDBOX_PAYLOAD}}
    of_one: list[tuple[Role, Sequence[str]]] = [("sandbox", sandboxes), ("untrusted", untrusted)]
    for role, members in of_one:
        users = {sandbox: _user(sandbox, grants(names, role, sandbox), sandbox) for sandbox in members}
        if own_accounts:
            for sandbox, user in users.items():
                accounts[sandbox] = limits | {"users": [user], "imports": _imports(names, role, sandbox)}
        else:
            accounts[ACCOUNT_OF[role]] = limits | {"users": list(users.values()), "imports": _imports(names, role)}
    title = "Every sandbox in an account of its own." if own_accounts else "All sandboxes in one account."
    each = ": their accounts, and their names among the exports" if own_accounts else ""
    head = HEAD.format(title=title, each=each, file=FILES[own_accounts])
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


# JWTs ----------------------------------------------------------------------------------------------------

SCRIPT = """\
#!/bin/sh
# {title} README.md says how to go on.
set -eu
LC_ALL=C

"""


CHECK = """\
case "${1-}" in ''|*[!a-z0-9_-]*) echo "usage: $0 SANDBOX, of a-z, 0-9, _ and -" >&2; exit 2 ;; esac

"""
"""Of the name: a tag `*` would open every sandbox."""


def nsc_scripts(names: Names) -> dict[Path, str]:
    """Commands of `nsc` for the same permissions as JWTs, by the name of their file."""
    once: list[list[str]] = [["add", "operator", "--name", "wechat-nats", "--sys"]]
    accounts = dict.fromkeys(ACCOUNT_OF.values())
    once += [["add", "account", "--name", account, "--deny-pubsub", ">"] for account in accounts]
    unlimited = [f"--js-{what}=-1" for what in ("mem-storage", "disk-storage", "streams", "consumer")]
    once.append(["edit", "account", "--name", WECHAT, *unlimited])
    for share in exports(names):
        once.append(["add", "export", "--account", WECHAT, "--name", share.subject, "--subject", share.subject])
        if share.kind == "service":
            once[-1] += ["--service", "--response-type", "Singleton"]
    for role in ROLES:
        if ACCOUNT_OF[role] != WECHAT:
            once += _nsc_imports(ACCOUNT_OF[role], imports(names, role))
        if role in OF_ONE:
            once.append(_nsc_template(names, role, ACCOUNT_OF[role]))
        else:
            user = ["--account", ACCOUNT_OF[role], "--name", role]
            once.append(["add", "user", *user, *_nsc_permissions(grants(names, role))])
            once.append(["generate", "creds", *user, "--output-file", f"{role}.creds"])
    once.append(["generate", "config", "--nats-resolver", "--sys-account", SYSTEM, "--config-file", "resolver.conf"])
    scripts = {Path("nsc.sh"): _script("Operator, accounts and users of all roles but sandboxes, once.", once)}
    for role in OF_ONE:
        each = [["add", "account", "--name", ARGUMENT, "--deny-pubsub", ">"]]
        each += [*_nsc_imports(ARGUMENT, imports(names, role, ARGUMENT)), _nsc_template(names, role, ARGUMENT)]
        what = "A user for the sandbox $1" + ("" if role == "sandbox" else ", which is not trusted")
        scripts |= {
            Path(f"nsc-{role}.sh"): _script(f"{what}, in the account of all.", _nsc_user(role, ACCOUNT_OF[role])),
            Path(f"nsc-{role}-each.sh"): _script(
                f"{what}, in an account of its own.", [*each, *_nsc_user(role, ARGUMENT)]
            ),
        }
    return scripts


def _script(title: str, commands: Sequence[Sequence[str]]) -> str:
    takes_name = any(ARGUMENT in word for command in commands for word in command)
    lines = "".join(f"nsc {' '.join(map(_quote, command))}\n" for command in commands)
    return SCRIPT.format(title=title) + (CHECK if takes_name else "") + lines


def _quote(word: str) -> str:
    """For a shell, which is to put in ARGUMENT and nothing else."""
    parts = [shlex.quote(part) if part else "" for part in word.split(ARGUMENT)]
    return f'"{ARGUMENT}"'.join(parts)


def _nsc_imports(account: str, shares: Iterable[Share]) -> list[list[str]]:
    made = []
    for share in shares:
        subject = ["--remote-subject", share.subject, "--local-subject", share.subject]
        made.append(
            ["add", "import", "--account", account, "--src-account", WECHAT, "--name", share.subject, *subject]
        )
        made[-1] += ["--service"] if share.kind == "service" else []
    return made


def _nsc_permissions(may: Grants) -> list[str]:
    return ["--allow-pub", ",".join(may.publish), "--allow-sub", ",".join(may.subscribe)]


def _nsc_template(names: Names, role: Role, account: str) -> list[str]:
    """A signing key that makes users of sandboxes only: the tag `sandbox` of the user fills the template."""
    scope = ["--account", account, "--role", role, "--sk", "generate"]
    may = _nsc_permissions(grants(names, role))
    return ["edit", "signing-key", *scope, *may, f"--payload={SANDBOX_PAYLOAD}"]


def _nsc_user(role: Role, account: str) -> list[list[str]]:
    user = ["--account", account, "--name", ARGUMENT]
    return [
        ["add", "user", *user, "--private-key", role, "--tag", f"sandbox:{ARGUMENT}"],
        ["generate", "creds", *user, "--output-file", f"{ARGUMENT}.creds"],
    ]
