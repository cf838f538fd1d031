"""Binds and unbinds bots: changes the bindings, and publishes events before and after.

A bot leaves a sandbox in these steps, so that the next person gets nothing of the former one: its binding is marked
as closing; the shard's owner releases the bot, ends the commands of its user and confirms; if nobody stays, the inbox
is emptied; the binding is deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import NamedTuple, Protocol

import structlog
from msgspec import structs

from adapter.bindings.readers import Readers
from adapter.bindings.registry import Bindings
from adapter.bindings.token_checks import Verdict, check_token
from adapter.contract.messages import Bind, BindingChange, ControlAnswer, Erase, Unbind
from adapter.contract.names import check_sandbox
from adapter.contract.records import Binding
from adapter.errors import Refused
from adapter.kit.timing import Clock
from adapter.observability.events import BusAccess
from adapter.observability.metrics import Metrics
from adapter.ports import Chat, CoreBus
from adapter.security.seal import Sealer, bind_context, cursor_context

log = structlog.get_logger()

PENDING_S = 60.0
"""Time after which an author is told that the end of a binding takes longer."""
BOT_SUFFIX, USER_SUFFIX = "@im.bot", "@im.wechat"


class Eraser(Protocol):
    """Erases persons."""

    async def run(self, command: Erase) -> ControlAnswer:
        """Erases a person whose bots are unbound. Raises Temporary, BusRefused."""


class ControlRequest(NamedTuple):
    """A control command that is being applied."""

    number: int
    """Its sequence in WECHAT_CTL."""
    id: str
    """The request id of its author; "" for none."""
    on_pending: Callable[[], Awaitable[None]]
    """Called once if the owners have not confirmed within PENDING_S that bots are released."""


class ControlDeps(NamedTuple):
    """What the processing of control commands needs."""

    access: BusAccess
    bindings: Bindings
    chat: Chat
    sealer: Sealer
    core: CoreBus
    readers: Readers
    ensure_owner: Callable[[], None]
    """Raises LeaseLost unless this replica may process commands now. A replica that was stopped or cut off may have
    commands in flight that another has processed since, together with later ones."""
    wait_complete: Callable[[], Awaitable[object]]
    """Returns when the bucket of bindings is complete; a write before that would be overwritten by its restore."""
    eraser: Eraser
    clock: Clock
    metrics: Metrics


class Binder:
    """Applies bind, unbind, and the unbind of an erasure."""

    def __init__(self, deps: ControlDeps) -> None:
        self._deps = deps
        self._bindings = deps.bindings
        self._names = deps.access.names
        self._history = deps.access.history
        self._sealer = deps.sealer
        self._changed: dict[str, asyncio.Event] = {}
        """By bot: set when a binding that is closing has changed."""
        self._last_out = _SharedRead(lambda: self._history.last_sequence(self._names.stream_out))
        deps.bindings.add_listener(self._on_binding)

    def _on_binding(self, bot: str, before: Binding | None, after: Binding | None) -> None:
        if (changed := self._changed.get(bot)) is not None:
            changed.set()

    async def bind(self, command: Bind, request: ControlRequest) -> ControlAnswer:
        """Binds a bot to a sandbox. Another bot of the same user there is replaced.

        Raises Refused, Temporary, LeaseLost.
        """
        check_sandbox(command.sandbox)
        token = self._open_token(command)
        if command.base_url:
            self._deps.chat.check_base_url(command.base_url)
        self._bindings.ensure_known(command.bot)
        before = self._bindings.get(command.bot)
        bound = self._bindings.of_sandbox(command.sandbox)
        binding = self._new_binding(command, token, before)
        replaced = [b for b in bound if binding.user and b.user == binding.user and b.bot != command.bot]
        is_begun = (
            before is not None
            and bool(command.id)
            and before.request == command.id
            and self._sealer.is_same_secret(before.bot, before.token, token)
        )
        """An earlier run wrote the binding and crashed. A refusal now would leave the command half done."""
        displaced = [*replaced, *([before] if before is not None else [])]
        is_closed = before is not None and before.closing == request.number
        is_checked = not (is_begun or is_closed) and await self._check_token(command, token, displaced)
        moved = before if before is not None and before.sandbox != command.sandbox else None
        if moved is not None:
            await self.close([moved], request)
            await self.exclude_earlier_commands(moved.sandbox, [moved])
            await self.empty_inbox(moved.sandbox, [moved])
            await self._publish_binding_event(moved, "unbound", request, reason="moved")
        bound = self._bindings.serving_sandbox(command.sandbox)
        known = next((other for other in bound if _is_same_person(other, binding)), None)
        # read right before the write: what is stored until then was not meant for this person
        out_after = known.out_after if known is not None else await self._last_out.read()
        binding = structs.replace(binding, out_after=out_after)
        new = before is None or not self._is_unchanged(before, binding)
        if new:
            await self._bindings.put(binding, self._deps.ensure_owner)
        if new or is_begun:
            # published again in case of a crash before the event: the stream drops a duplicate
            await self._publish_binding_event(binding, "bound", request)
        for other in replaced:
            await self._publish_binding_event(other, "replaced", request)  # first: a crash in between repeats it
            await self._bindings.remove(other.bot, self._deps.ensure_owner)
        return ControlAnswer(
            ok=True,
            id=request.id,
            bindings=[binding.info()],
            replaced=[other.bot for other in replaced],
            moved_from=moved.sandbox if moved is not None else "",
            checked=is_checked,
        )

    async def _check_token(self, command: Bind, token: str, displaced: Collection[Binding]) -> bool:
        """Whether iLink accepts the token; False if the token is not checked, or iLink does not answer. Raises
        Refused before anything has changed."""
        is_risky = any(
            known.state == "active"
            and not (known.bot == command.bot and self._sealer.is_same_secret(known.bot, known.token, token))
            for known in displaced
        )
        if command.check is False or not (command.check or is_risky):
            return False
        verdict = await check_token(self._deps.chat, command, token)
        if verdict is Verdict.DEAD:
            raise Refused("stale_token", "iLink refuses this token (-14). Existing bindings are unchanged.")
        if verdict is Verdict.SILENT and is_risky:
            raise Refused(
                "unchecked",
                "iLink does not answer about this token, and the bind would replace a working token. Try again later,"
                " or bind without the check.",
            )
        return verdict is Verdict.TAKEN

    def _open_token(self, command: Bind) -> str:
        """The bot's token. A bind from a login has it sealed, for this bot and sandbox.

        Raises Refused, also for a bot or user with an invalid id.
        """
        token = self._sealer.open_given(bind_context(command.sandbox, command.bot), command.bot_token)
        if any(ord(c) < 33 or ord(c) > 126 for c in command.bot + token + (command.user or "")):
            raise Refused("invalid", "Bot, token and user are printable ASCII without spaces.")
        if command.check is not False:
            check_ids(command.bot, token, command.user or "")
        return token

    def _new_binding(self, command: Bind, token: str, before: Binding | None) -> Binding:
        """The binding that a bind makes of the bot's binding `before`."""
        known = before.user if before is not None and before.sandbox == command.sandbox else ""
        return Binding(
            sandbox=command.sandbox,
            bot=command.bot,
            token=self._sealer.seal(command.bot, token),
            user=command.user or known,
            base_url=(command.base_url or "").rstrip("/"),
            options=command.options,
            since_ms=self._deps.clock.now_ms(),
            request=command.id or "",
            start_cursor=self._sealed_start_cursor(command, before),
        )

    async def unbind(self, command: Unbind, request: ControlRequest) -> ControlAnswer:
        """Unbinds a bot, or all bots of a sandbox. A missing binding is no error. Raises Refused, Temporary,
        LeaseLost."""
        check_sandbox(command.sandbox)
        bound = [b for b in self._bindings.of_sandbox(command.sandbox) if command.bot in (None, "", b.bot)]
        self.ensure_known([command.sandbox])
        await self.remove(command.sandbox, bound, request)
        return ControlAnswer(ok=True, id=request.id, bindings=[binding.info() for binding in bound])

    def ensure_known(self, sandboxes: Iterable[str]) -> None:
        """Raises Refused if a newer version has written a binding of one of the sandboxes, which this one can neither
        close nor change."""
        for sandbox in sandboxes:
            for binding in self._bindings.of_sandbox(sandbox):
                self._bindings.ensure_known(binding.bot)

    async def remove(self, sandbox: str, leaving: Collection[Binding], request: ControlRequest) -> None:
        """Unbinds these bots of a sandbox, and empties its inbox if nobody stays. Raises Temporary, LeaseLost."""
        await self.close(leaving, request)
        await self.exclude_earlier_commands(sandbox, leaving)
        await self.empty_inbox(sandbox, leaving)
        await self.announce_end(leaving, request)
        await self.delete(leaving)

    async def announce_end(self, leaving: Collection[Binding], request: ControlRequest) -> None:
        """Raises Temporary, LeaseLost."""
        for binding in leaving:
            await self._publish_binding_event(binding, "unbound", request)

    async def delete(self, leaving: Collection[Binding]) -> None:
        """Deletes bindings that are closed. Raises Temporary, LeaseLost."""
        for binding in leaving:
            await self._bindings.remove(binding.bot, self._deps.ensure_owner)

    async def reopen(self, number: int) -> None:
        """Lets the bindings serve again that a failed command has marked as closing. Raises Temporary."""
        for binding in [each for each in self._bindings if each.closing == number]:
            await self._bindings.update(
                binding.bot,
                lambda now: structs.replace(now, closing=0, closed=0) if now.closing == number else None,
            )

    async def close(self, leaving: Collection[Binding], request: ControlRequest) -> None:
        """Marks bindings as closing, and returns once their shard's owner has confirmed. Raises Temporary,
        LeaseLost."""

        def closing(now: Binding) -> Binding | None:
            self._deps.ensure_owner()  # the read may have been slow
            return None if now.closing == request.number else structs.replace(now, closing=request.number, closed=0)

        for binding in leaving:
            await self._bindings.update(binding.bot, closing)
        pending_at: float | None = asyncio.get_running_loop().time() + PENDING_S
        for binding in leaving:
            try:
                async with asyncio.timeout_at(pending_at):
                    await self._wait_closed(binding.bot, request.number)
            except TimeoutError:
                pending_at = None
                await request.on_pending()
                await self._wait_closed(binding.bot, request.number)

    async def _wait_closed(self, bot: str, number: int) -> None:
        changed = self._changed[bot] = asyncio.Event()
        try:
            # without the mark it is deleted or unreadable: nobody would confirm
            while (binding := self._bindings.get(bot)) is not None and binding.closing == number != binding.closed:
                changed.clear()
                await changed.wait()
        finally:
            del self._changed[bot]

    async def exclude_earlier_commands(self, sandbox: str, leaving: Collection[Binding]) -> None:
        """Commands that were stored until now and name nobody may have meant who leaves: they are not for who stays.
        Raises Temporary, LeaseLost."""
        if leaving and (stays := self._staying(sandbox, leaving)):
            out_after = await self._last_out.read()
            self._deps.ensure_owner()
            for binding in stays:
                await self._bindings.update(binding.bot, lambda now: structs.replace(now, out_after=out_after))

    async def empty_inbox(self, sandbox: str, leaving: Collection[Binding]) -> None:
        """Deletes the messages of a sandbox if nobody stays there. Raises Temporary, LeaseLost."""
        if self._staying(sandbox, leaving):
            return
        names = self._names
        last = await self._history.read_last(names.stream_in, names.inbox(sandbox))
        self._deps.ensure_owner()  # the wait before may have been long, and another person be bound
        if last is not None:
            await self._deps.readers.skip(sandbox, last.seq)  # an answer that is being made has nothing of it
            await self._history.purge(names.stream_in, names.inbox(sandbox), up_to=last.seq)

    def _staying(self, sandbox: str, leaving: Collection[Binding]) -> list[Binding]:
        gone = {binding.bot for binding in leaving}
        return [binding for binding in self._bindings.of_sandbox(sandbox) if binding.bot not in gone]

    def _sealed_start_cursor(self, command: Bind, before: Binding | None) -> str | None:
        """The sealed cursor. An unchanged cursor keeps its sealed text, because a cursor is applied only once."""
        context, bound = cursor_context(command.bot), before.start_cursor if before is not None else None
        if not command.cursor:
            return command.cursor
        if bound is not None and self._sealer.is_same_secret(context, bound, command.cursor):
            return bound
        return self._sealer.seal(context, command.cursor)

    def _is_unchanged(self, before: Binding, after: Binding) -> bool:
        """Whether a bind changes nothing, so that the poller continues. A bind after a dead token always counts as
        a change."""
        if before.state != "active" or not self._sealer.is_same_secret(before.bot, before.token, after.token):
            return False
        unimportant = {"token": "", "since_ms": 0, "request": "", "event_pending": False}
        return structs.replace(before, **unimportant) == structs.replace(after, **unimportant)

    async def _publish_binding_event(
        self, binding: Binding, change: BindingChange, request: ControlRequest, *, reason: str = ""
    ) -> None:
        event = binding.event(change, reason=reason, request=request.id)
        await self._deps.access.events.publish_binding_event(event, ensure_owner=self._deps.ensure_owner)
        log.info("binding.changed", change=change, sandbox=binding.sandbox, bot=binding.bot)


class _SharedRead:
    """Reads once for all who ask before the read begins."""

    def __init__(self, read: Callable[[], Awaitable[int]]) -> None:
        self._read = read
        self._next: asyncio.Task[int] | None = None

    async def read(self) -> int:
        """A value that is as new as this call. Raises what the read raises."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._run())
        return await asyncio.shield(self._next)

    async def _run(self) -> int:
        self._next = None
        return await self._read()


def check_ids(bot: str, token: str, user: str) -> None:
    """Checks the form that all known ids of iLink have. Raises Refused("invalid")."""
    if not bot.endswith(BOT_SUFFIX):
        raise Refused("invalid", f"A bot's id ends with {BOT_SUFFIX}; bind it unchecked if iLink has others by now.")
    if user and not user.endswith(USER_SUFFIX):
        raise Refused(
            "invalid", f"A user's id ends with {USER_SUFFIX}; bind it unchecked if iLink has others by now."
        )
    owner = token.partition(":")[0]
    if owner.endswith(BOT_SUFFIX) and owner != bot:
        raise Refused("invalid", "The token is another bot's: it begins with the id of its bot.")


def _is_same_person(one: Binding, other: Binding) -> bool:
    """Whether both belong to the same person. A bot serves one person, who may not be known yet."""
    return one.user == other.user if one.user and other.user else one.bot == other.bot
