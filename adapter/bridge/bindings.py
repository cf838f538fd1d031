"""Which bot serves which sandbox: the bucket of bindings in memory, and compare-and-set changes to it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

import msgspec
import structlog
from msgspec import structs

from adapter.contract.messages import BindingState
from adapter.contract.names import LAYOUT_KEY, Names, from_subject_token, to_subject_token
from adapter.contract.records import Binding
from adapter.errors import UNDECODABLE, Conflict, RecordTooNew, Refused, Temporary
from adapter.ports import Account, Bucket, BucketEntry, History, LeaderBucket, StoredMessage
from adapter.tools.concurrency import Batches
from adapter.tools.decoding import decode_record
from adapter.tools.events import Events
from adapter.tools.seal import Sealer, Sealing, cursor_context
from adapter.tools.timing import ChangeSignal, Clock

log = structlog.get_logger()

START_S = 5.0
"""Longest wait for a replica that has just started."""
DELETED_KEPT = 10_000


class Bindings:
    """All bindings of the platform. Each replica holds all of them."""

    def __init__(
        self,
        bucket: Bucket,
        names: Names,
        same_token: Callable[[str, str, str], bool] = lambda _, one, other: one == other,
        *,
        unbound_s: int = 0,
    ) -> None:
        """`unbound_s`: time to live of the delete marker of a binding; 0: no limit."""
        self._by_bot: dict[str, tuple[Binding, int]] = {}
        """With their revisions."""
        self.partition_of = names.partition_of
        self._by_partition: list[dict[str, dict[str, Binding]]] = [{} for _ in range(names.partitions)]
        """By sandbox and bot, in the order of bot ids."""
        self.changed = ChangeSignal()
        self.is_loaded = False
        """False until the bucket was read once; before that, a missing binding means nothing."""
        self._bucket = bucket
        self._same_token = same_token
        """Whether two stored tokens of a bot are the same token, even if sealed again; then nothing has changed."""
        self._unbound_s = unbound_s
        self._deleted: OrderedDict[str, int] = OrderedDict()
        """Revisions of the last deletions, since a read that began before one may end after it."""
        self._catching_up = Batches(self._read_tail)
        self._read_to = 0
        """Revision up to which the bucket was read."""
        self._listeners: list[Callable[[str, Binding | None, Binding | None], None]] = []

    async def wait_loaded(self) -> None:
        """Raises Temporary if the bucket was not read in START_S."""
        if not await self.changed.wait_until(lambda: self.is_loaded, START_S):
            raise Temporary("starting", "The adapter is starting; ask again in a moment.")

    def get(self, bot: str) -> Binding | None:
        return self._by_bot.get(bot, (None, 0))[0]

    def of_sandbox(self, sandbox: str) -> list[Binding]:
        """In the order of bot ids."""
        return list(self._by_partition[self.partition_of(sandbox)].get(sandbox, {}).values())

    def serving_user(self, sandbox: str, user: str) -> list[Binding]:
        """Those of `of_sandbox` with this user; several only shortly after a login."""
        return [binding for binding in self.of_sandbox(sandbox) if binding.user == user]

    def of_partition(self, number: int) -> list[Binding]:
        """Bindings of the partition's sandboxes."""
        return [binding for of_sandbox in self._by_partition[number].values() for binding in of_sandbox.values()]

    def __iter__(self) -> Iterator[Binding]:
        return iter([binding for binding, _ in self._by_bot.values()])

    def __len__(self) -> int:
        return len(self._by_bot)

    def add_listener(self, on_change: Callable[[str, Binding | None, Binding | None], None]) -> None:
        """Calls `on_change(bot, before, after)` at every change."""
        self._listeners.append(on_change)

    async def run(self) -> None:
        """Follows the bucket until cancelled."""
        await self._bucket.watch(self._apply_entry, on_loaded=self._on_loaded)

    def ensure_known(self, bot: str) -> None:
        """Raises Refused for a bot whose binding a newer version wrote."""
        if (known := self.get(bot)) is not None and known.state == "too_new":
            raise Refused(
                "too_new", "A newer version wrote this bot's binding: finish the roll-out, then bind again."
            )

    async def update(self, bot: str, make: Callable[[Binding], Binding | None]) -> Binding | None:
        """Changes an existing binding and returns it. `make` gets the newest one, and returns None to leave it."""
        return await self.change(bot, lambda now: None if now is None else make(now))

    async def change(self, bot: str, make: Callable[[Binding | None], Binding | None]) -> Binding | None:
        """Writes what `make` makes of the newest binding (None: there is none that can be read), if nobody has
        written since. Returns it; None: it is left, or only a newer replica may change it. Raises what `make`
        raises."""
        while True:
            entry = await self.refresh(bot)
            before = None
            if entry is not None and entry.value is not None:
                try:
                    before = decode_record(entry.value, Binding, bot=bot)
                except RecordTooNew:
                    return None
                except UNDECODABLE:
                    pass  # counts as missing: a bind overwrites it
            if (after := make(before)) is None:
                return None
            value = msgspec.json.encode(after)
            try:
                revision = await self._bucket.update(to_subject_token(bot), value, entry.revision if entry else 0)
            except Conflict:
                continue  # written meanwhile: read again
            self._apply_entry(BucketEntry(to_subject_token(bot), value, revision))
            return after

    async def remove(self, bot: str, check: Callable[[], None] = lambda: None) -> None:
        """Deletes a binding; a missing one is no error. A binding that the bucket lost still gets a delete marker,
        for replicas that have it in memory. `check` is called after each read; the revision then refuses the
        deletion if another replica has written since."""
        while True:
            entry = await self.refresh(bot)
            check()
            if self.get(bot) is None and (entry is None or entry.value is None):
                return
            try:
                revision = await self._bucket.delete(
                    to_subject_token(bot), entry.revision if entry else 0, ttl_s=self._unbound_s
                )
            except Conflict:
                continue
            self._apply_entry(BucketEntry(to_subject_token(bot), None, revision))
            return

    async def refresh(self, bot: str) -> BucketEntry | None:
        """Reads a binding anew, and returns its key. Raises Temporary."""
        if entry := await self._bucket.get(to_subject_token(bot)):
            self._apply_entry(entry)
        return entry

    async def catch_up(self) -> None:
        """Returns when all is known here that was bound until this call; one read for many callers. Raises
        Temporary."""
        await self._catching_up.get("")

    async def _read_tail(self, keys: Sequence[str]) -> Mapping[str, None]:
        for entry in await self._bucket.read_since(self._read_to):
            self._apply_entry(entry)
            self._read_to = max(self._read_to, entry.revision)
        return {}

    def _on_loaded(self) -> None:
        if not self.is_loaded:
            self.is_loaded = True
            log.info("bindings.loaded", bindings=len(self))
        self.changed.notify_all()

    def _apply_entry(self, entry: BucketEntry) -> None:
        if entry.key == LAYOUT_KEY:
            return
        try:
            bot = from_subject_token(entry.key)
        except ValueError:  # another program's key
            log.error("binding.unreadable", key=entry.key[:64])
            return
        before, revision = self._by_bot.get(bot, (None, 0))
        if entry.revision <= max(revision, self._deleted.get(bot, 0)):
            return
        try:
            after = None if entry.value is None else self._decode(bot, entry.value)
        except UNDECODABLE as exc:
            log.error("binding.unreadable", bot=bot, detail=str(exc))
            return
        self._replace(bot, after, entry.revision)
        if after is None:
            self._deleted[bot] = entry.revision
            self._deleted.move_to_end(bot)
            if len(self._deleted) > DELETED_KEPT:
                self._deleted.popitem(last=False)
        if before and after and before.token != after.token and self._same_token(bot, before.token, after.token):
            before = structs.replace(before, token=after.token)
        if before != after:
            for listener in self._listeners:
                listener(bot, before, after)
            self.changed.notify_all()

    def _replace(self, bot: str, after: Binding | None, revision: int) -> None:
        before = self.get(bot)
        if before is not None:
            sandboxes = self._by_partition[self.partition_of(before.sandbox)]
            del sandboxes[before.sandbox][bot]
            if not sandboxes[before.sandbox]:
                del sandboxes[before.sandbox]
        if after is None:
            self._by_bot.pop(bot, None)
        else:
            self._by_bot[bot] = after, revision
            sandboxes = self._by_partition[self.partition_of(after.sandbox)]
            bound = {**sandboxes.get(after.sandbox, {}), bot: after}
            sandboxes[after.sandbox] = dict(sorted(bound.items())) if len(bound) > 1 else bound

    def _decode(self, bot: str, value: bytes) -> Binding:
        """A binding of a newer version is in the state `too_new`, without a token. Raises UNDECODABLE."""
        try:
            return decode_record(value, Binding, bot=bot)
        except RecordTooNew:
            known = msgspec.json.decode(value, type=_Served)
            return Binding(bot=bot, token="", state="too_new", **structs.asdict(known))


class _Served(msgspec.Struct):
    """What every version of a binding has."""

    sandbox: str
    user: str = ""
    person: str = ""
    since: int = 0
    bound: int = 0


def account_of(binding: Binding, sealer: Sealer) -> Account:
    """The iLink account of a binding. Raises Refused("token_key")."""
    return Account(binding.bot, sealer.open(binding.bot, binding.token), binding.base_url)


# the state of a login -------------------------------------------------------------------------------


async def mark_login(bindings: Bindings, clock: Clock, binding: Binding, state: BindingState) -> Binding | None:
    """Marks a binding `needs_login`, since iLink refuses its token (-14), or active again; its event is pending.

    None: it is marked, or was bound again. Raises Temporary.
    """
    reason = "stale_token" if state == "needs_login" else ""

    def marked(now: Binding) -> Binding | None:
        if now.token != binding.token or now.state == state:
            return None
        return structs.replace(now, state=state, reason=reason, since_ms=clock.now_ms(), event_pending=True)

    changed = await bindings.update(binding.bot, marked)
    if changed is not None and state == "needs_login":
        log.error("session.needs_login", bot=binding.bot, sandbox=binding.sandbox)
    return changed


async def publish_login_event(bindings: Bindings, events: Events, binding: Binding, detail: str = "") -> Binding:
    """Publishes the pending event of a binding, and returns the binding without the mark.

    The mark survives a crash, or an outage of the bus, between the change and its event. Raises Temporary.
    """
    if not binding.event_pending:
        return binding
    event = binding.event("recovered")
    if binding.state == "needs_login":
        advice = "Have the user scan a new QR code and bind the new bot; what is parked waits for it."
        event = binding.event("needs_login", reason=detail, detail=advice)
    await events.publish_binding_event(event, cause=str(binding.since_ms))

    def without_mark(now: Binding) -> Binding | None:
        return structs.replace(now, event_pending=False) if now == binding else None

    return await bindings.update(binding.bot, without_mark) or binding


# the keys that seal tokens --------------------------------------------------------------------------


async def count_stored_tokens(history: History, names: Names, sealer: Sealer) -> Counter[Sealing]:
    """Number of tokens by their sealing. Raises Temporary."""
    return Counter(
        [
            sealer.sealing_of(text)
            async for _, binding in _stored_bindings(history, names)
            for text in (binding.token, binding.start_cursor)
            if text
        ]
    )


async def reseal_tokens(history: History, bucket: LeaderBucket, names: Names, sealer: Sealer) -> int:
    """Seals what another known key sealed with the first. Returns the number of changes. Concurrent writes have
    priority. Raises Temporary, Refused (a token cannot be opened)."""
    sealed = 0
    async for stored, binding in _stored_bindings(history, names):
        start, context = binding.start_cursor, cursor_context(binding.bot)
        if "older" not in [sealer.sealing_of(text) for text in (binding.token, start) if text]:
            continue
        token = sealer.seal(binding.bot, sealer.open(binding.bot, binding.token))
        if start and sealer.sealing_of(start) == "older":
            start = sealer.seal(context, sealer.open(context, start))
        value = msgspec.json.encode(structs.replace(binding, token=token, start_cursor=start))
        try:
            await bucket.write(stored.subject.removeprefix(f"$KV.{names.bindings}."), value, stored.seq)
        except Conflict:
            continue
        sealed += 1
    return sealed


async def _stored_bindings(history: History, names: Names) -> AsyncIterator[tuple[StoredMessage, Binding]]:
    async for stored in history.read(f"KV_{names.bindings}", f"$KV.{names.bindings}.>"):
        if not stored.data:
            continue  # it was deleted
        try:
            binding = msgspec.json.decode(stored.data, type=Binding)
        except UNDECODABLE:
            continue  # unreadable, or of a newer version: `Bindings` logs and ignores it
        yield stored, binding
