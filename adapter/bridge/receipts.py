"""Publishes receipts, each on its command's own subject, and finds those of the previous owner.

The subject has the command's id and its sequence, so commands with one id have a subject each. A receipt is written
by compare-and-set on its subject, so that two owners of a command cannot publish two final ones. A final receipt of
the same command that is already stored counts as one's own.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import structlog

from adapter.bridge.record import CommandRef
from adapter.bridge.sending import CONTROL, CommandResult, QueuedCommand
from adapter.contract import messages as contract
from adapter.contract.messages import Receipt
from adapter.contract.names import (
    H_COMMAND,
    H_EXPECTED,
    H_MSG_ID,
    H_SCHEMA,
    H_TRACEPARENT,
    UNROUTED,
    Names,
    command_traceparent,
)
from adapter.errors import UNDECODABLE, AdapterError, BusRefused, Conflict, StaleRead, Temporary
from adapter.ports import BusMessage, History, StoredMessage
from adapter.tools.concurrency import Batches
from adapter.tools.events import Events
from adapter.tools.metrics import Metrics
from adapter.tools.timing import Clock

log = structlog.get_logger()

RECEIPTS_KEPT = 100_000
"""Receipts that a sandbox keeps. Each takes up to 0.56 kB of the server's memory, for its command's subject."""
DEAD_LETTERS = 16
"""Dead letters that are written at the same time; each may be large."""
MAX_SANDBOX = 64
"""Most characters of a sandbox's name (names.SANDBOX_PATTERN)."""
PURGE_EVERY = 10_000
"""Average number of receipts between two purges. A purge of 110,000 receipts takes tens of milliseconds."""


class Address(NamedTuple):
    """Sandbox, bot and user of a command."""

    sandbox: str
    bot: str = ""
    user: str = ""


class StoredReceipt(NamedTuple):
    """A receipt and its sequence in WECHAT_EVENT."""

    sequence: int
    receipt: Receipt


class Receipts:
    """Publishes receipts through Events, and reads them from WECHAT_EVENT."""

    def __init__(self, events: Events, history: History, names: Names, clock: Clock, metrics: Metrics) -> None:
        self._events = events
        self._history = history
        self._names = names
        self._clock = clock
        self._metrics = metrics
        self._dead_letters = asyncio.Semaphore(DEAD_LETTERS)
        self._lasts = Batches(self._read_lasts)
        """Of the commands of many persons, in one request."""

    async def tell(
        self,
        command: QueuedCommand,
        result: CommandResult,
        address: Address,
        check: Callable[[], None],
        shown: contract.Window = contract.Window(),  # noqa: B008 - frozen
    ) -> None:
        """Publishes the receipt of a command, bind, unbind or erase, and before that the dead letter if it is one,
        and counts it. `check` raises LeaseLost unless this replica may end it. Raises Temporary, LeaseLost; StaleRead
        if a command is parked that has ended."""
        ref = command.ref
        ensure_owner = None if result.is_sent else check  # another owner may still send it
        if ensure_owner is not None:
            ensure_owner()
        if len(address.sandbox) > MAX_SANDBOX:  # a longer name in the subject would break the connection
            address = Address(UNROUTED)
        trace = command_traceparent(
            command.traceparent, address.sandbox, ref.sequence, ref.stored_ms, command.reply_to
        )
        if result.outcome == "dead_lettered":
            try:
                await self._publish_dead_letter(command, result, address, trace)
            except AdapterError:
                raise
            except Exception:  # whatever makes the code raise, a command is not left without its receipt
                log.exception("dead_letter.crashed", sandbox=address.sandbox, sequence=command.sequence)
        receipt = _receipt(command, result, address, shown, self._clock.now_ms())
        is_told = await self._store(command, receipt, trace, ensure_owner)
        if result.outcome == "parked" or not is_told:
            return
        outcome = "duplicate" if result.repeat_of else result.outcome
        self._metrics.outbound_messages.labels(command.kind, outcome, result.reason or "none").inc()
        if not command.parked and command.verb == "receipt":
            failed = result.outcome in ("dead_lettered", "uncertain")
            took_s = max(0, self._clock.now_ms() - max(ref.stored_ms, command.send_at_ms)) / 1000
            self._metrics.outbound_duration.labels("failed" if failed else "settled").observe(took_s)

    async def _publish_dead_letter(
        self, command: QueuedCommand, result: CommandResult, address: Address, trace: str
    ) -> None:
        names, delivery = self._names, command.delivery
        async with self._dead_letters:
            data, headers = delivery.data, delivery.headers
            subject = names.out_plain if delivery.subject == names.out_plain else names.out(address.sandbox)
            if command.kind in CONTROL:
                subject = names.said(command.kind, address.sandbox)
            if command.kind in ("bind", "erase"):  # it has a token, or names whom to forget
                data, headers = b"", {}
            elif not data and (stored := await self._history.get(names.stream_out, command.sequence)):
                data, headers = stored.data, stored.headers
            await self._events.publish_dead_letter(
                "OUT",
                data,
                subject=subject,
                headers=headers | {H_COMMAND: command.ref.id, H_TRACEPARENT: trace},
                reason=result.reason,
                detail=result.detail,
                msg_id=f"dead:{command.client_id_base}",
                sandbox=address.sandbox,
                user=address.user,
            )

    async def _store(
        self, command: QueuedCommand, receipt: Receipt, trace: str, ensure_owner: Callable[[], None] | None
    ) -> bool:
        """Stores a receipt behind the one that is known, or behind a newer one that is not final. False: another
        owner has told the end. Raises as `tell`."""
        subject = self._subject(receipt.sandbox, command.ref, command.verb)
        while True:
            try:
                command.receipt = await self._publish(receipt, subject, trace, command.receipt, ensure_owner)
            except Conflict:
                last = await self._history.read_last(self._names.stream_event, subject)
            else:
                if random.random() * PURGE_EVERY < 1:
                    await self._purge(receipt.sandbox)
                return True
            command.receipt = last.seq if last else 0
            stored = _read(last)
            if stored and _is_of(stored, command.ref) and (is_final(stored) or not is_final(receipt)):
                if is_final(stored) and not is_final(receipt):
                    raise StaleRead("stale_read", "the command has its final receipt")
                return stored == receipt  # the answer to its own write was lost

    async def _publish(
        self, receipt: Receipt, subject: str, trace: str, expected: int, ensure_owner: Callable[[], None] | None
    ) -> int:
        """Returns the receipt's sequence. One that the stream refuses is shortened; then it is a dead letter, and
        has none (0).

        `expected`: sequence of the subject's last receipt; 0: none. Raises Conflict; Temporary if nothing of it can
        be stored; what `ensure_owner` raises.
        """
        # the id has `expected` and outcome: another receipt must meet the comparison, which comes after that of ids
        ident = f"{subject}:{receipt.received_at_ms}:{expected}:{receipt.outcome}"
        headers = {
            H_MSG_ID: ident,
            H_SCHEMA: contract.SCHEMA_VERSION,
            H_EXPECTED: str(expected),
            H_TRACEPARENT: trace,
        }
        whole = payload = msgspec.json.encode(receipt)
        try:
            sequence = await self._events.store(BusMessage("event", subject, payload, headers, ensure_owner))
        except Conflict:
            raise
        except BusRefused as exc:
            log.error("event.refused", sandbox=receipt.sandbox, kind="receipt", detail=exc.detail)
            # without what iLink and the adapter say in words
            payload = msgspec.json.encode(msgspec.structs.replace(receipt, detail="", errmsg=""))
            try:
                sequence = await self._events.store(BusMessage("event", subject, payload, headers, ensure_owner))
            except Conflict:
                raise
            except BusRefused as refusal:
                is_kept = await self._events.publish_dead_letter(
                    "EVENT",
                    whole,
                    subject=subject,
                    headers={H_COMMAND: receipt.command, H_TRACEPARENT: trace},
                    reason="receipt_refused",
                    detail=refusal.detail,
                    msg_id=f"dead:{ident}",
                    sandbox=receipt.sandbox,
                )
                if not is_kept:
                    raise Temporary("receipt_refused", refusal.detail) from refusal
                return 0
        self._metrics.receipts.labels(receipt.outcome).inc()
        log.info(
            "receipt.stored",
            sandbox=receipt.sandbox,
            command=receipt.command,
            outcome=receipt.outcome,
            reason=receipt.reason,
            sequence=sequence,
            reply_to=receipt.reply_to,
        )
        return sequence

    async def _purge(self, sandbox: str) -> None:
        """Purges receipts beyond the limit, by chance: counters would need memory for every sandbox ever."""
        try:
            await self._history.purge(self._names.stream_event, self._names.receipts(sandbox), keep=RECEIPTS_KEPT)
        except (Temporary, BusRefused) as exc:
            log.warning("receipts.not_purged", sandbox=sandbox, reason=exc.reason)

    async def find(
        self, sandbox: str, refs: Iterable[CommandRef], verb: str = "receipt"
    ) -> dict[CommandRef, StoredReceipt]:
        """The newest receipts of these commands. Raises Temporary."""
        refs = list(refs)
        found: dict[CommandRef, StoredReceipt] = {}
        lasts = await asyncio.gather(*(self._lasts.get(self._subject(sandbox, ref, verb)) for ref in refs))
        for ref, last in zip(refs, lasts, strict=True):
            receipt = _read(last)
            if last is not None and receipt is not None and _is_of(receipt, ref):
                found[ref] = StoredReceipt(last.seq, receipt)
        return found

    async def _read_lasts(self, subjects: Sequence[str]) -> Mapping[str, StoredMessage]:
        lasts = await self._history.read_last_of_each(self._names.stream_event, subjects)
        return {last.subject: last for last in lasts}

    async def last(self, sandbox: str, command: str, sequence: int | None, verb: str = "receipt") -> Receipt | None:
        """The newest receipt of a command; without its sequence, of any command with this id. Raises Temporary."""
        subject = self._names.receipt(sandbox, command, sequence, verb)
        return _read(await self._history.read_last(self._names.stream_event, subject))

    async def of_erase(self, ref: CommandRef) -> list[Receipt]:
        """The receipts of the erases in single sandboxes that one for all sandboxes has made. Raises Temporary."""
        found = self._history.read(self._names.stream_event, self._subject("*", ref, "erase"))
        receipts = [_read(stored) async for stored in found]
        return [each for each in receipts if each is not None and _is_of(each, ref)]

    def _subject(self, sandbox: str, ref: CommandRef, verb: str) -> str:
        return self._names.receipt(sandbox, ref.id, ref.sequence, verb)


def result_of(receipt: Receipt) -> CommandResult:
    """The result in a receipt, for commands that shared its message. Its fields have the same names there."""
    return msgspec.convert(receipt, CommandResult, from_attributes=True)


def _receipt(
    command: QueuedCommand, result: CommandResult, address: Address, shown: contract.Window, now_ms: int
) -> Receipt:
    told = msgspec.structs.asdict(result)  # its fields have the same names in a receipt
    told["detail"] = result.detail or _ADVICE.get(result.reason, "")
    told["message_ids"], told["bots"] = list(result.message_ids), list(result.bots)
    return Receipt(
        command=command.ref.id,
        sequence=command.ref.sequence,
        sandbox=address.sandbox,
        bot=address.bot,
        user=address.user,
        window=shown,
        reply_to=command.reply_to,
        received_at_ms=command.ref.stored_ms,
        at_ms=now_ms,
        **told,
    )


def _read(stored: StoredMessage | None) -> Receipt | None:
    """None also for a message that is no receipt."""
    try:
        return msgspec.json.decode(stored.data, type=Receipt) if stored else None
    except UNDECODABLE:
        return None


def _is_of(receipt: Receipt, ref: CommandRef) -> bool:
    """The sequences of a stream that was created anew begin again."""
    return (receipt.sequence, receipt.received_at_ms) == (ref.sequence, ref.stored_ms)


def is_final(receipt: Receipt) -> bool:
    return receipt.outcome in contract.FINAL_OUTCOMES


_ADVICE = {
    "window_closed": "The user must write first; WeChat lets a bot send only for a day after that.",
    "quota": "The command needs more sends than are left after the user's last message; they must write again.",
    "throttled": "iLink refuses more messages to this user until they write.",
    "needs_login": "The bot's token is dead; have the user scan a new QR code and bind the new bot.",
}
