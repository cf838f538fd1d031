"""What control commands change: binds and unbinds bots, erases persons, and publishes the events of that.

A bot leaves a sandbox in these steps, so that the next person gets nothing of the former one: its binding is marked
as closing; the partition's owner releases the bot, ends the commands of its person, stores the end of the person's
time and confirms; the binding is deleted. Each step may be repeated, and goes on where an earlier run has ended.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

import structlog
from msgspec import structs

from adapter.bindings.registry import Bindings
from adapter.contract.messages import Bind, BindingChange, ControlAnswer, Erase, Unbind
from adapter.contract.names import LAYOUT_KEY, Names, check_sandbox, person_token
from adapter.contract.records import Binding, PersonKey
from adapter.errors import BusRefused, Refused
from adapter.kit.persist import Owner
from adapter.kit.timing import Clock
from adapter.observability.events import Events
from adapter.ports import Chat, History
from adapter.security.seal import Sealer, bind_context, cursor_context

log = structlog.get_logger()

BOT_SUFFIX, USER_SUFFIX = "@im.bot", "@im.wechat"
"""The ends of all known ids of iLink."""


class Persons(Protocol):
    """The ends of persons' times, as `bridge.persons.Persons`."""

    def end(self, key: PersonKey, *, erased: bool = False) -> Awaitable[object]: ...

    def forget(self, key: PersonKey) -> Awaitable[None]: ...


class Binder:
    """Applies commands. `number` is the command's sequence in WECHAT_CTL. All methods raise Refused before anything
    has changed; Temporary, BusRefused, LeaseLost."""

    def __init__(
        self,
        *,
        bindings: Bindings,
        events: Events,
        history: History,
        names: Names,
        chat: Chat,
        sealer: Sealer,
        persons: Persons,
        erase: Callable[[Erase], Awaitable[ControlAnswer]],
        owner: Owner,
        clock: Clock,
    ) -> None:
        """`erase`: deletes what is stored of a person whom no bot serves."""
        self._bindings = bindings
        self._events = events
        self._history = history
        self._names = names
        self._chat = chat
        self._sealer = sealer
        self._persons = persons
        self._erase_stored = erase
        self._owner = owner
        self._clock = clock

    # bind -------------------------------------------------------------------------------------------

    async def bind(self, command: Bind, number: int) -> ControlAnswer:
        """Binds a bot to a sandbox. Another bot of the same user there is replaced."""
        sandbox, before = check_sandbox(command.sandbox), self._bindings.get(command.bot)
        token = self._open_token(command)
        if command.base_url:
            self._chat.check_base_url(command.base_url)
        self._bindings.ensure_known(command.bot)
        known_user = before.user if before is not None else ""
        binding = Binding(
            sandbox=sandbox,
            bot=command.bot,
            token=self._sealer.seal(command.bot, token),
            user=command.user or known_user,
            base_url=(command.base_url or "").rstrip("/"),
            options=command.options,
            since_ms=self._clock.now_ms(),
            bound=number,
            start_cursor=self._sealed_start_cursor(command, before),
        )
        same = [each for each in self._bindings.serving_sandbox(sandbox) if _is_same_person(each, binding)]
        named = person_token(sandbox, binding.user or binding.bot)
        known = min(same, key=lambda each: (each.person != named, each.bot != command.bot), default=None)
        replaced = [each for each in same if known and each.key == known.key and each.bot != command.bot]
        former = before if before is not None and (known is None or before.key != known.key) else None
        if former is not None:  # it serves another person from now on
            await self._leave(former.sandbox, [former], command, number, reason="moved")
        if known is not None:
            person, since, out_after = known.person, known.since, known.out_after
        else:
            # read right before the write: what is stored until then was not meant for this person
            person, since, out_after = named, number, await self._last_command()
        binding = structs.replace(binding, person=person, since=since, out_after=out_after)
        is_new = before is None or not self._is_unchanged(before, binding)
        if is_new:
            await self._bindings.put(binding, self._owner.check)
        if is_new or (before is not None and before.bound == number):  # an earlier run may have told nobody
            await self._announce([binding], "bound", command)
        await self._replace(replaced, command)
        return ControlAnswer(
            ok=True,
            id=command.id or "",
            bindings=[binding.info()],
            replaced=[other.bot for other in replaced],
            moved_from=former.sandbox if former is not None and former.sandbox != sandbox else "",
        )

    def _open_token(self, command: Bind) -> str:
        """The bot's token. A bind from a login has it sealed, for this bot and sandbox. Also checks the ids."""
        token, user = command.bot_token, command.user or ""
        token = self._sealer.open_given(bind_context(command.sandbox, command.bot), token)
        if not all("!" <= char <= "~" for char in command.bot + token + user):
            raise Refused("invalid", "Bot, token and user are printable ASCII without spaces.")
        if command.bot == LAYOUT_KEY:
            raise Refused("invalid", f"No bot is called {LAYOUT_KEY}.")
        if not command.check:
            return token
        for kind, ident, suffix in (("bot", command.bot, BOT_SUFFIX), ("user", user, USER_SUFFIX)):
            if ident and not ident.endswith(suffix):
                advice = "bind it unchecked if iLink has others by now."
                raise Refused("invalid", f"A {kind}'s id ends with {suffix}; {advice}")
        owner = token.partition(":")[0]
        if owner.endswith(BOT_SUFFIX) and owner != command.bot:
            raise Refused("invalid", "The token is another bot's: it begins with the id of its bot.")
        return token

    def _sealed_start_cursor(self, command: Bind, before: Binding | None) -> str | None:
        """The sealed cursor. An unchanged cursor keeps its sealed text, so that the bind changes nothing."""
        context, bound = cursor_context(command.bot), before.start_cursor if before is not None else None
        if not command.cursor:
            return None
        if bound is not None and self._sealer.is_same_secret(context, bound, command.cursor):
            return bound
        return self._sealer.seal(context, command.cursor)

    def _is_unchanged(self, before: Binding, after: Binding) -> bool:
        """Whether a bind changes nothing, so that the poller continues. A bind after a dead token always counts as
        a change."""
        if before.state != "active" or not self._is_same_token(before, after.token):
            return False
        unimportant = {"token": "", "since_ms": 0, "bound": 0, "event_pending": False}
        return structs.replace(before, **unimportant) == structs.replace(after, **unimportant)

    def _is_same_token(self, known: Binding, token: str) -> bool:
        return self._sealer.is_same_secret(known.bot, known.token, token)

    # unbind and erase -------------------------------------------------------------------------------

    async def unbind(self, command: Unbind, number: int) -> ControlAnswer:
        """Unbinds a bot, or all bots of a sandbox. A missing binding is no error."""
        sandbox = check_sandbox(command.sandbox)
        bound = [each for each in self._bindings.of_sandbox(sandbox) if command.bot in (None, "", each.bot)]
        self._ensure_known([sandbox])
        await self._leave(sandbox, bound, command, number)
        await self._delete(bound)
        return ControlAnswer(ok=True, id=command.id or "", bindings=[each.info() for each in bound])

    async def erase(self, command: Erase, number: int) -> ControlAnswer:
        """Unbinds a person and erases what is theirs; messages one by one, since a purge leaves them on the disk."""
        if command.dry_run:
            return await self._erase_stored(command)
        bound = [b for b in self._bindings if b.user == command.user and command.sandbox in (None, b.sandbox)]
        sandboxes = sorted({binding.sandbox for binding in bound})
        self._ensure_known(sandboxes)
        await self._close(bound, number)
        for sandbox in sandboxes:
            await self._exclude_earlier_commands(sandbox, bound)
        for key in self._persons_of(bound):
            await self._persons.end(key, erased=True)
        await self._announce(bound, "unbound", command)  # its event is erased, too
        try:
            answer = await self._erase_stored(command)
        except BusRefused as exc:
            advice = f"The erasure is not complete ({exc.reason}): erase again."
            answer = ControlAnswer(ok=False, id=command.id or "", error=advice)
        await self._forget_persons(bound)
        await self._delete(bound)  # last: an erasure that is cut finds them again
        return structs.replace(answer, bindings=[binding.info() for binding in bound])

    async def reopen(self, number: int) -> None:
        """Lets the bindings serve again that a command has marked as closing, which is over without their end."""
        for binding in [each for each in self._bindings if each.closing == number]:
            await self._bindings.update(
                binding.bot,
                # the end of their time may be stored: a new one begins
                lambda now: (
                    structs.replace(now, closing=None, closed=None, since=number) if now.closing == number else None
                ),
            )

    def _ensure_known(self, sandboxes: Collection[str]) -> None:
        """A binding of a newer version can neither be closed nor changed."""
        for sandbox in sandboxes:
            for binding in self._bindings.of_sandbox(sandbox):
                self._bindings.ensure_known(binding.bot)

    # the end of bindings ----------------------------------------------------------------------------

    async def _replace(self, replaced: Collection[Binding], command: Bind) -> None:
        """Ends bots whose user the new one serves: nothing of the user's ends with them."""
        for binding in replaced:
            await self._announce([binding], "replaced", command)  # first: a crash in between repeats it
            await self._delete([binding])

    async def _leave(
        self,
        sandbox: str,
        leaving: Collection[Binding],
        command: Bind | Unbind,
        number: int,
        reason: str = "",
    ) -> None:
        """Ends the service of bots in a sandbox, whose bindings stay closed."""
        await self._close(leaving, number)
        await self._exclude_earlier_commands(sandbox, leaving)
        await self._forget_persons(leaving)
        await self._announce(leaving, "unbound", command, reason=reason)

    async def _close(self, leaving: Collection[Binding], number: int) -> None:
        """Marks bindings as closing, and returns once their partition's owner has confirmed."""

        def closing(now: Binding) -> Binding | None:
            self._owner.check()  # the read may have been slow
            return None if now.closing == number else structs.replace(now, closing=number, closed=None)

        def are_closed() -> bool:
            # without the mark it is deleted or unreadable: nobody would confirm
            now = [self._bindings.get(binding.bot) for binding in leaving]
            return all(each is None or each.closing != number or each.closed == number for each in now)

        for binding in leaving:
            await self._bindings.update(binding.bot, closing)
        await self._bindings.changed.wait_until(are_closed)

    async def _exclude_earlier_commands(self, sandbox: str, leaving: Collection[Binding]) -> None:
        """Commands that were stored until now and name nobody may have meant who leaves: not for who stays."""
        if leaving and (stays := self._staying(sandbox, leaving)):
            out_after = await self._last_command()
            self._owner.check()
            for binding in stays:
                await self._bindings.update(binding.bot, lambda now: structs.replace(now, out_after=out_after))

    def _persons_of(self, leaving: Collection[Binding]) -> list[PersonKey]:
        """The persons whom no other bot serves."""
        staying = {each.key for binding in leaving for each in self._staying(binding.sandbox, leaving)}
        return [key for key in dict.fromkeys(binding.key for binding in leaving) if key not in staying]

    async def _forget_persons(self, leaving: Collection[Binding]) -> None:
        """Deletes what is left of persons whom no other bot serves."""
        for key in self._persons_of(leaving):
            self._owner.check()  # the wait before may have been long
            await self._persons.forget(key)

    async def _delete(self, leaving: Collection[Binding]) -> None:
        for binding in leaving:
            await self._bindings.remove(binding.bot, self._owner.check)

    def _staying(self, sandbox: str, leaving: Collection[Binding]) -> list[Binding]:
        gone = {binding.bot for binding in leaving}
        return [binding for binding in self._bindings.of_sandbox(sandbox) if binding.bot not in gone]

    async def _last_command(self) -> int:
        return await self._history.last_sequence(self._names.stream_out)

    async def _announce(
        self,
        changed: Collection[Binding],
        change: BindingChange,
        command: Bind | Unbind | Erase,
        *,
        reason: str = "",
    ) -> None:
        """Publishes events. A repeat after a crash is a duplicate, which the stream drops."""
        for binding in changed:
            event = binding.event(change, reason=reason, request=command.id or "")
            cause = event.request or f"bound-{binding.bound}"
            await self._events.publish_binding_event(event, cause=cause, ensure_owner=self._owner.check)
            log.info("binding.changed", change=change, sandbox=binding.sandbox, bot=binding.bot)


def _is_same_person(one: Binding, other: Binding) -> bool:
    """Whether both belong to the same person. A bot serves one person, who may not be known yet."""
    return one.user == other.user if one.user and other.user else one.bot == other.bot
