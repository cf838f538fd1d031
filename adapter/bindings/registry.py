"""Which bot serves which sandbox: the bucket of bindings in memory, and compare-and-set changes to it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

import msgspec
import structlog

from adapter.contract.names import SHARDS, from_subject_token, shard_of, to_subject_token
from adapter.contract.records import Binding
from adapter.errors import UNDECODABLE, Conflict, RecordTooNew, Refused
from adapter.kit.timing import ChangeSignal
from adapter.observability.records import RecordDecoder
from adapter.ports import Account, Bucket, Entry
from adapter.security.seal import Sealer

log = structlog.get_logger()

DELETED_KEPT = 10_000


class BindingIndex:
    """Bindings in memory, by bot, sandbox and shard."""

    def __init__(self) -> None:
        self._by_bot: dict[str, tuple[Binding, int]] = {}
        """With their revisions."""
        self._by_shard: list[dict[str, dict[str, Binding]]] = [{} for _ in range(SHARDS)]
        """By sandbox and bot, in the order of bot ids."""

    def get(self, bot: str) -> Binding | None:
        return self.with_revision(bot)[0]

    def serving(self, bot: str) -> Binding | None:
        """The bot's binding, unless it is closing."""
        binding = self.get(bot)
        return None if binding is None or binding.closing else binding

    def with_revision(self, bot: str) -> tuple[Binding | None, int]:
        return self._by_bot.get(bot, (None, 0))

    def of_sandbox(self, sandbox: str) -> list[Binding]:
        """In the order of bot ids."""
        return list(self._by_shard[shard_of(sandbox)].get(sandbox, {}).values())

    def serving_sandbox(self, sandbox: str) -> list[Binding]:
        """As `of_sandbox`, without bindings that are closing."""
        return [binding for binding in self.of_sandbox(sandbox) if not binding.closing]

    def serving_user(self, sandbox: str, user: str) -> list[Binding]:
        """Those of `serving_sandbox` with this user; several only shortly after a login."""
        return [binding for binding in self.serving_sandbox(sandbox) if binding.user == user]

    def of_shard(self, shard: int) -> list[Binding]:
        """Bindings of the shard's sandboxes."""
        return [binding for of_sandbox in self._by_shard[shard].values() for binding in of_sandbox.values()]

    def __iter__(self) -> Iterator[Binding]:
        return iter([binding for binding, _ in self._by_bot.values()])

    def __len__(self) -> int:
        return len(self._by_bot)

    def _replace(self, bot: str, after: Binding | None, revision: int) -> None:
        before = self.get(bot)
        if before is not None:
            sandboxes = self._by_shard[shard_of(before.sandbox)]
            del sandboxes[before.sandbox][bot]
            if not sandboxes[before.sandbox]:
                del sandboxes[before.sandbox]
        if after is None:
            self._by_bot.pop(bot, None)
        else:
            self._by_bot[bot] = after, revision
            sandboxes = self._by_shard[shard_of(after.sandbox)]
            bound = {**sandboxes.get(after.sandbox, {}), bot: after}
            sandboxes[after.sandbox] = dict(sorted(bound.items())) if len(bound) > 1 else bound


class Bindings(BindingIndex):
    """All bindings of the platform. Each replica holds all of them."""

    def __init__(
        self,
        bucket: Bucket,
        same_token: Callable[[str, str, str], bool] = lambda _, one, other: one == other,
        *,
        unbound_s: int = 0,
    ) -> None:
        """`unbound_s`: time to live of the delete marker of a binding; 0: no limit."""
        super().__init__()
        self.changed = ChangeSignal()
        self.is_loaded = False
        """False until the bucket was read once; before that, a missing binding means nothing."""
        self._bucket = bucket
        self._same_token = same_token
        """Whether two stored tokens of a bot are the same token, even if sealed again; then nothing has changed."""
        self._unbound_s = unbound_s
        self._decoder = RecordDecoder(Binding)
        self._deleted: OrderedDict[str, int] = OrderedDict()
        """Revisions of the last deletions, since a read that began before one may end after it."""
        self._listeners: list[Callable[[str, Binding | None, Binding | None], None]] = []

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

    async def put(self, binding: Binding, ensure_owner: Callable[[], None] = lambda: None) -> None:
        """Writes a binding over any existing one. `ensure_owner` is called after each read; the revision then refuses
        the write if another replica has written since. Raises Refused("too_new")."""
        _, revision = self.with_revision(binding.bot)
        while True:
            ensure_owner()
            if await self._write_if_unchanged(binding, revision):
                return
            entry = await self._bucket.get(to_subject_token(binding.bot))
            if entry is not None:
                self._apply_entry(entry)
            revision = entry.revision if entry else 0

    async def update(self, bot: str, make: Callable[[Binding], Binding | None]) -> Binding | None:
        """Changes an existing binding and returns it. `make` gets the newest one, and returns None to leave it."""
        while True:
            entry = await self._bucket.get(to_subject_token(bot))
            if entry is None:
                return None
            self._apply_entry(entry)
            if entry.value is None:
                return None
            try:
                before = self._decoder.decode(entry.value, bot=bot)
            except RecordTooNew:
                return None  # only a newer replica changes it
            except UNDECODABLE:
                return None  # counts as missing: a bind overwrites it
            after = make(before)
            if after is None:
                return None
            if await self._write_if_unchanged(after, entry.revision):
                return after

    async def remove(self, bot: str, ensure_owner: Callable[[], None] = lambda: None) -> None:
        """Deletes a binding; a missing one is no error. A binding that the bucket lost still gets a delete marker,
        for replicas that have it in memory. `ensure_owner`: as for `put`."""
        while True:
            entry = await self._bucket.get(to_subject_token(bot))
            ensure_owner()
            if entry and entry.value is None:
                self._apply_entry(entry)
            is_deleted = entry.value is None if entry else self.get(bot) is None
            if is_deleted:
                return
            try:
                revision = await self._bucket.delete(
                    to_subject_token(bot), entry.revision if entry else 0, ttl_s=self._unbound_s
                )
            except Conflict:
                continue
            self._apply_entry(Entry(to_subject_token(bot), None, revision))
            return

    async def refresh(self, bot: str) -> None:
        """Reads a binding anew. Raises Temporary."""
        if entry := await self._bucket.get(to_subject_token(bot)):
            self._apply_entry(entry)

    async def reload(self) -> None:
        """Reads all bindings anew, since this replica may lag behind another one's writes. Raises Temporary."""
        entries = await self._bucket.list_prefix()
        for entry in entries:
            self._apply_entry(entry)
        keys = {entry.key for entry in entries}
        for binding in self:
            if to_subject_token(binding.bot) not in keys:  # it was deleted
                await self.refresh(binding.bot)

    async def _write_if_unchanged(self, binding: Binding, revision: int) -> bool:
        self.ensure_known(binding.bot)
        value = msgspec.json.encode(binding)
        try:
            written = await self._bucket.update(to_subject_token(binding.bot), value, revision)
        except Conflict:
            return False  # written meanwhile: read again
        self._apply_entry(Entry(to_subject_token(binding.bot), value, written))
        return True

    def _on_loaded(self) -> None:
        if not self.is_loaded:
            self.is_loaded = True
            log.info("bindings.loaded", bindings=len(self))
        self.changed.notify_all()

    def _apply_entry(self, entry: Entry) -> None:
        try:
            bot = from_subject_token(entry.key)
        except ValueError:  # another program's key
            log.error("binding.unreadable", key=entry.key[:64])
            return
        before, revision = self.with_revision(bot)
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
            before = msgspec.structs.replace(before, token=after.token)
        if before != after:
            for listener in self._listeners:
                listener(bot, before, after)
            self.changed.notify_all()

    def _decode(self, bot: str, value: bytes) -> Binding:
        """A binding of a newer version is in the state `too_new`, without a token. Raises UNDECODABLE."""
        try:
            return self._decoder.decode(value, bot=bot)
        except RecordTooNew:
            known = msgspec.json.decode(value, type=_Served)
            return Binding(sandbox=known.sandbox, bot=bot, token="", user=known.user, state="too_new")


class _Served(msgspec.Struct):
    """What every version of a binding has."""

    sandbox: str
    user: str = ""


def account_of(binding: Binding, sealer: Sealer) -> Account:
    """The iLink account of a binding. Raises Refused("token_key")."""
    return Account(binding.bot, sealer.open(binding.bot, binding.token), binding.base_url)
