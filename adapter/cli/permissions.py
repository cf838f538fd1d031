"""`permissions`: the accounts of a NATS server with passwords, for any number of sandboxes."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from adapter.cli import output
from adapter.cli.bus import settings_here
from adapter.cli.exits import OK, USAGE, Failed
from adapter.cli.options import Sandbox, flag
from adapter.cli.output import read_text, write_private
from adapter.contract.names import Names
from adapter.tools.accounts import OF_ONE, ROLES, server_config, variable


def permissions(
    *sandboxes: Sandbox,
    untrusted: Annotated[
        tuple[Sandbox, ...], flag("A sandbox whose commands the adapter stores. May be repeated.", metavar="SANDBOX")
    ] = (),
    each: Annotated[bool, flag("Every sandbox in an account of its own.")] = False,
    passwords: Annotated[
        Path | None,
        Parameter(
            metavar="FILE",
            help="File beside the configuration for passwords: those in it stay, a new user gets a random one.",
        ),
    ] = None,
) -> int:
    """Print accounts, users and permissions for a NATS server's configuration: all roles, and these sandboxes.

    Passwords are variables: of the server's environment, or of the file that --passwords writes. After a change let
    the server read its configuration again: nats-server --signal reload.
    """
    roles = ["sys", *(role for role in ROLES if role not in OF_ONE)]
    names = [*roles, *sandboxes, *untrusted]
    known: dict[str, str] = {}
    for name in names:
        if other := known.get(variable("", name)):
            why = "that name is taken" if name == other else f"{other} has the same variable for its password"
            raise Failed(USAGE, f"{name} cannot be a sandbox here: {why}.")
        known[variable("", name)] = name
    text = server_config(Names(settings_here().prefix), sandboxes, untrusted=untrusted, own_accounts=each)
    if passwords is not None:
        there = read_text(passwords) if passwords.exists() else ""
        kept = dict(re.findall(r'(?m)^(\w+): (".*")$', there))
        lines = [f"{name}: {kept.get(name) or json.dumps(secrets.token_hex(16))}\n" for name in known]
        write_private(passwords, "".join(sorted(lines)))
        output.say(f"include {json.dumps(passwords.name)}\n")
    output.say(text)
    return OK
