"""What makes the scripts in `helm/nats/`: `adapter.tools.accounts` as commands of `nsc`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from adapter.contract.names import Names
from adapter.tools.accounts import (
    ACCOUNT_OF,
    OF_ONE,
    ROLES,
    SANDBOX_PAYLOAD,
    SYSTEM,
    WECHAT,
    Share,
    exports,
    grants,
    imports,
)
from adapter.tools.permissions import Grants, Role

ARGUMENT = "$1"
"""The sandbox in the scripts for `nsc`."""

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
