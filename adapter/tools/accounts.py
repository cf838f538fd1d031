"""The accounts of a server, the roles in them, and the exports between them: what `permissions` writes, and the files
of `helm/nats/`.

Streams, buckets, adapter and operators are in one account. All others are in another account, and reach only what it
imports. Within an account the server does not check the reply subject of a request against permissions, so a request
could make it write anywhere. Between accounts a reply goes to the requester's account.
"""

from __future__ import annotations

from collections.abc import Sequence
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
#   ping_interval: 20s, ping_max: 2
#   jetstream {{ store_dir: "/data", sync_interval: always }}
#   include {file}
#
# Passwords are variables: of the server's environment, or of the file of passwords included below. It does not start
# while one is missing. For other sandboxes
# `wechat-nats permissions s1 s2 …` prints it. A sandbox that is not trusted has its commands stored by the adapter.

"""


FILES = {False: "accounts.conf", True: "accounts-each.conf"}
"""The configurations in `helm/nats/`, by whether each sandbox has its own account."""


def variable(role: str, sandbox: str = "") -> str:
    """The server's environment variable with a user's password."""
    return f"PASSWORD_{sandbox.replace('-', '_') or role}".upper()


def server_config(
    names: Names, sandboxes: Sequence[str], *, untrusted: Sequence[str], own_accounts: bool = False
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
                if any(accounts_of[role] for role in roles)  # an export to nobody would be one to all
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
    head = HEAD.format(title=title, file=FILES[own_accounts])
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
