"""Binds and unbinds bots: changes the bindings, and publishes events before and after."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import NamedTuple, Protocol

import structlog
from msgspec import structs

from adapter.bindings.registry import Bindings
from adapter.bindings.sandboxes import ReadSandboxes
from adapter.bindings.token_checks import TokenChecks, Verdict
from adapter.contract.messages import Bind, BindingChange, BindingEvent, ControlAnswer, Erase, Unbind
from adapter.contract.names import check_sandbox
from adapter.contract.records import Binding
from adapter.errors import Refused
from adapter.kit.timing import Clock
from adapter.observability.events import BusAccess
from adapter.observability.metrics import Metrics
from adapter.ports import Chat, CoreBus
from adapter.security.seal import Sealer, bind_context, cursor_context

log = structlog.get_logger()

BOT_SUFFIX, USER_SUFFIX = "@im.bot", "@im.wechat"


class Eraser(Protocol):
    """Erases persons."""

    async def run(self, command: Erase, unbound: Collection[str], turn: asyncio.Lock) -> ControlAnswer:
        """Erases a person whose bots `unbound` are unbound. Holds `turn` while no command may be processed. Raises
        Temporary, BusRefused."""

    async def wait_released(self, bots: Collection[str]) -> None:
        """Returns once all received messages of unbound bots are in their inboxes, or after a timeout. Raises
        Temporary."""


class ControlDeps(NamedTuple):
    """What the processing of control commands needs."""

    access: BusAccess
    bindings: Bindings
    chat: Chat
    sealer: Sealer
    core: CoreBus
    ensure_owner: Callable[[], None]
    """Raises LeaseLost unless this replica may process commands now. A replica that was stopped or cut off may have
    commands in flight that another has processed since, together with later ones."""
    wait_complete: Callable[[], Awaitable[object]]
    """Returns when the bucket of bindings is complete; a write before that would be overwritten by its restore."""
    eraser: Eraser
    clock: Clock
    metrics: Metrics


class Binder:
    """Applies bind and unbind."""

    def __init__(self, deps: ControlDeps) -> None:
        self.sandboxes = ReadSandboxes(deps.access, deps.bindings)
        self.checks = TokenChecks(deps.chat, deps.sealer)
        self._deps = deps
        self._bindings = deps.bindings
        self._names = deps.access.names
        self._history = deps.access.history
        self._sealer = deps.sealer

    async def bind(self, command: Bind, sequence: int) -> ControlAnswer:
        """Binds a bot to a sandbox. Another bot of the same user there is replaced.

        Raises Refused, Temporary, LeaseLost.
        """
        check_sandbox(command.sandbox)
        if command.keep_undelivered and command.options.fresh:
            raise Refused("invalid", "`keep_undelivered` and the option `fresh` exclude each other.")
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
        is_checked = not is_begun and await self._check_token(command, token, displaced, sequence)
        binding = await self._with_start_sequences(binding, bound, keep=command.keep_undelivered)
        if command.options.durable:
            await self._deps.core.make_durable(command.sandbox, binding.in_after)
        new = before is None or not self._is_unchanged(before, binding)
        if before is not None and before.sandbox != command.sandbox:  # first: a later put overwrites it
            replay_after = self._replay_start(before.sandbox, [before])
            await self._publish_binding_event(
                before, "unbound", command.id, reason="moved", replay_after=replay_after
            )
            await self._skip_undelivered(before.sandbox, [before])
        if new:
            await self._bindings.put(binding, self._deps.ensure_owner)
        if new or is_begun:
            # published again in case of a crash before the event: the stream drops a duplicate
            await self._publish_binding_event(binding, "bound", command.id, replay_after=binding.in_after)
        for other in replaced:
            await self._publish_binding_event(
                other, "replaced", command.id
            )  # first, so that a crash in between repeats it
            await self._bindings.remove(other.bot, self._deps.ensure_owner)
        return ControlAnswer(
            ok=True,
            id=command.id or "",
            bindings=[binding.info()],
            replaced=[other.bot for other in replaced],
            moved_from=before.sandbox if before is not None and before.sandbox != command.sandbox else "",
            checked=is_checked,
        )

    async def _check_token(self, command: Bind, token: str, displaced: Collection[Binding], sequence: int) -> bool:
        """Whether iLink accepts the token; False if the token is not checked, or iLink does not answer. Raises
        Refused before anything has changed."""
        is_risky = any(
            known.state == "active"
            and not (known.bot == command.bot and self._sealer.is_same_secret(known.bot, known.token, token))
            for known in displaced
        )
        if command.check is False or not (command.check or is_risky):
            return False
        verdict = await self.checks.verdict(sequence, command)
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

    async def _with_start_sequences(self, binding: Binding, bound: list[Binding], *, keep: bool) -> Binding:
        """`binding` with the sequences after which its person's messages and commands begin. If no other bot is
        `bound` to the sandbox, its durable consumer skips the messages of former persons.

        Raises Temporary.
        """
        for known in bound:
            if _is_same_person(known, binding):
                return structs.replace(binding, in_after=known.in_after, out_after=known.out_after)
        sandbox, names = binding.sandbox, self._names
        last = await self.sandboxes.last_person_change(sandbox)
        is_alone = all(other.bot == binding.bot for other in bound)
        is_again = last is not None and _is_same_person(last, binding)
        in_after = out_after = 0
        if bound or (last is not None and not is_again):
            for subject in (names.out_plain, names.out_of_sandbox(sandbox)):  # in the router's order
                out_after = max(out_after, await self._last_seq(names.stream_out, subject))
        kept_after = last.replay_after if last is not None else 0
        if is_alone and (keep or is_again) and kept_after is not None:
            in_after = kept_after
        else:
            in_after = await self._last_seq(names.stream_in, names.inbox(sandbox))
            if in_after and is_alone and not keep:
                await self._deps.core.move_durable(sandbox, in_after)
                if binding.options.fresh and not is_again:
                    await self._history.purge(names.stream_in, names.inbox(sandbox), up_to=in_after)
        return structs.replace(binding, in_after=in_after, out_after=out_after)

    def _replay_start(self, sandbox: str, gone: Collection[Binding] = ()) -> int | None:
        """Sequence after which a replay begins once `gone` are unbound; None: no person is bound then."""
        stays = [binding for binding in self._bindings.of_sandbox(sandbox) if binding not in gone]
        return min((binding.in_after for binding in stays), default=None)

    async def _skip_undelivered(self, sandbox: str, gone: Collection[Binding] = ()) -> None:
        """Moves the sandbox's durable consumer past all stored messages if no bot except `gone` is bound.

        Raises Temporary.
        """
        after = await self._last_seq(self._names.stream_in, self._names.inbox(sandbox))
        if after and self._replay_start(sandbox, gone) is None:
            await self._deps.core.move_durable(sandbox, after)

    async def _last_seq(self, stream: str, subject: str) -> int:
        """Raises Temporary."""
        last = await self._history.read_last(stream, subject)
        return last.seq if last is not None else 0

    async def unbind(self, command: Unbind) -> ControlAnswer:
        """Unbinds a bot, or all bots of a sandbox. A missing binding is no error. Raises Refused, Temporary,
        LeaseLost."""
        check_sandbox(command.sandbox)
        bound = [b for b in self._bindings.of_sandbox(command.sandbox) if command.bot in (None, "", b.bot)]
        if command.purge and (command.keep_undelivered or self._replay_start(command.sandbox, bound) is not None):
            raise Refused("invalid", "A purge keeps nothing, and no other bot may stay bound to the sandbox.")
        replay_after = self._replay_start(command.sandbox, [] if command.keep_undelivered else bound)
        for binding in bound:
            await self._publish_binding_event(binding, "unbound", command.id, replay_after=replay_after)
            await self._bindings.remove(binding.bot, self._deps.ensure_owner)
        if not command.keep_undelivered:
            await self._skip_undelivered(command.sandbox)
        if command.purge:
            await self.purge_inbox(command.sandbox)
        return ControlAnswer(ok=True, id=command.id or "", bindings=[binding.info() for binding in bound])

    async def purge_inbox(self, sandbox: str) -> None:
        """Deletes the messages of former persons, or all messages if no person is bound. Raises Temporary."""
        names = self._names
        up_to = self._replay_start(sandbox)
        if up_to is None:
            up_to = await self._last_seq(names.stream_in, names.inbox(sandbox))
        if up_to:
            await self._history.purge(names.stream_in, names.inbox(sandbox), up_to=up_to)

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
        self,
        binding: Binding,
        change: BindingChange,
        request: str | None,
        *,
        reason: str = "",
        replay_after: int | None = None,
    ) -> None:
        event = binding.event(change, reason=reason, request=request or "", replay_after=replay_after)
        await self._deps.access.events.publish_binding_event(event, ensure_owner_if_delayed=self._deps.ensure_owner)
        self.sandboxes.on_published(event)
        log.info("binding.changed", change=change, sandbox=binding.sandbox, bot=binding.bot)


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


def _is_same_person(one: Binding | BindingEvent, other: Binding) -> bool:
    """Whether both belong to the same person. A bot serves one person, who may not be known yet."""
    return one.user == other.user if one.user and other.user else one.bot == other.bot
