"""Binds, unbinds and erases as they are said: their bodies, and the binding that a bind makes of the present one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import msgspec
from msgspec import structs

from adapter.bridge import sending
from adapter.bridge.commands import command_id
from adapter.bridge.parts import Parts
from adapter.bridge.sending import CommandResult, QueuedCommand
from adapter.contract import messages as contract
from adapter.contract.messages import Bind, Erase, Unbind
from adapter.contract.names import H_MSG_ID, LAYOUT_KEY, UNROUTED, check_sandbox, in_words, person_token
from adapter.contract.records import Binding
from adapter.errors import UNDECODABLE, Refused, Unreadable
from adapter.tools.seal import Sealer, bind_context, cursor_context

BOT_SUFFIX, USER_SUFFIX = "@im.bot", "@im.wechat"
"""The ends of all known ids of iLink."""
_KINDS: dict[str, type[Bind | Unbind | Erase]] = {"bind": Bind, "unbind": Unbind, "erase": Erase}


def read_control(command: QueuedCommand) -> CommandResult | None:
    """Reads a bind, unbind or erase. Returns how it ends if it is none."""
    delivery, sandbox, verb = command.delivery, command.sandbox, command.kind
    ident, problem = "", None
    try:
        if len(delivery.data) > contract.COMMAND_BYTES:
            raise Unreadable("too_large", f"At most {contract.COMMAND_BYTES} bytes are read.")
        try:
            command.control = msgspec.json.decode(delivery.data, type=_KINDS[verb])
        except UNDECODABLE as exc:
            raise Unreadable("unreadable", in_words(exc)) from exc
        if verb != "erase" or sandbox != UNROUTED:
            check_sandbox(sandbox)
        if command.control.sandbox not in (None, sandbox):
            raise Refused("invalid", "The body names another sandbox than the subject.")
        command.bot = "" if isinstance(command.control, Erase) else command.control.bot or ""
    except (Refused, Unreadable) as exc:
        problem = sending.unreadable_result(exc)
    with contextlib.suppress(*UNDECODABLE):  # whoever waits for its receipt knows its id
        ident = msgspec.json.decode(delivery.data, type=_Named).id or ""
    ident = command_id(ident, "", delivery.headers.get(H_MSG_ID, ""), delivery.seq)
    command.ref = structs.replace(command.ref, id=ident)
    return problem


class _Named(msgspec.Struct):
    id: contract.CommandId | None = None


def open_token(sandbox: str, bind: Bind, sealer: Sealer) -> str:
    """The bot's token. A bind from a login has it sealed, for this bot and sandbox. Also checks the ids. Raises
    Refused."""
    token, user = bind.bot_token, bind.user or ""
    token = sealer.open_given(bind_context(sandbox, bind.bot), token)
    if not all("!" <= char <= "~" for char in bind.bot + token + user):
        raise Refused("invalid", "Bot, token and user are printable ASCII without spaces.")
    if bind.bot == LAYOUT_KEY:
        raise Refused("invalid", f"No bot is called {LAYOUT_KEY}.")
    if not bind.check:
        return token
    for kind, ident, suffix in (("bot", bind.bot, BOT_SUFFIX), ("user", user, USER_SUFFIX)):
        if ident and not ident.endswith(suffix):
            advice = "bind it unchecked if iLink has others by now."
            raise Refused("invalid", f"A {kind}'s id ends with {suffix}; {advice}")
    owner = token.partition(":")[0]
    if owner.endswith(BOT_SUFFIX) and owner != bind.bot:
        raise Refused("invalid", "The token is another bot's: it begins with the id of its bot.")
    return token


def new_binding(
    sandbox: str, bind: Bind, now: Binding | None, others: Sequence[Binding], token: str, number: int, parts: Parts
) -> Binding:
    """The binding that a bind makes of the present one. `others`: of the same user here; `number`: the bind's
    sequence. Raises Refused."""
    user = bind.user or ""
    if now is not None:
        if now.sandbox != sandbox:
            raise Refused("bound_elsewhere", "The bot serves another sandbox: unbind it there first.")
        if user != now.user and user and (now.user or others):
            raise Refused("bound_elsewhere", "The bot serves another user: unbind it first.")
    # who was bound twice without being named is two persons: the one that bears the user's name goes on
    named = person_token(sandbox, user or bind.bot)
    known = now or min(others, key=lambda each: each.person != named, default=None)
    return Binding(
        sandbox=sandbox,
        bot=bind.bot,
        token=parts.sealer.seal(bind.bot, token),
        user=user or (now.user if now is not None else ""),
        base_url=(bind.base_url or "").rstrip("/"),
        options=bind.options,
        since_ms=parts.clock.now_ms(),
        bound=number,
        start_cursor=_sealed_start_cursor(bind, now, parts.sealer),
        person=known.person if known is not None else named,
        since=known.since if known is not None else number,
    )


def _sealed_start_cursor(bind: Bind, now: Binding | None, sealer: Sealer) -> str | None:
    """The sealed cursor. An unchanged cursor keeps its sealed text, so that the bind changes nothing."""
    context, bound = cursor_context(bind.bot), now.start_cursor if now is not None else None
    if not bind.cursor:
        return None
    if bound is not None and sealer.is_same_secret(context, bound, bind.cursor):
        return bound
    return sealer.seal(context, bind.cursor)


def is_unchanged(before: Binding, after: Binding, sealer: Sealer) -> bool:
    """Whether a bind changes nothing, so that the poller continues. A bind after a dead token always counts as a
    change."""
    if before.state != "active" or not sealer.is_same_secret(before.bot, before.token, after.token):
        return False
    unimportant = {"token": "", "since_ms": 0, "bound": 0, "event_pending": False}
    return structs.replace(before, **unimportant) == structs.replace(after, **unimportant)
