"""One person: a WeChat user of one sandbox. The only object that knows both directions of a bot.

Two work on it: the poller is one task, the sender a coroutine that lives while there is work. `on_stored`,
`take_entry`, `check_binding` and `leave` change memory at once and never wait. After each wait both workers look at
the state instead of trusting what they saw.

What is stored of a person are the newest entry of their subject (`entries`), written by whoever polls, and their
record (`record`), written before each send. Of both the newer window counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from adapter.bridge import window
from adapter.bridge.entries import StoredEntry
from adapter.bridge.handover import Handover
from adapter.bridge.leases import Tenure
from adapter.bridge.parts import Parts
from adapter.bridge.persons import StoredPerson, binding_of
from adapter.bridge.record import BOTS_KEPT, Gone, PersonState
from adapter.bridge.sending import ServingBot
from adapter.bridge.typing_indicator import TypingIndicators
from adapter.bridge.window import InboundReceived
from adapter.contract.records import PersonKey
from adapter.contract.repeats import KEEP, SIZE, DedupWindow, lines_of
from adapter.errors import Conflict, RecordTooNew, Refused, StaleRead

CURSOR_SAVED_S = 86_400.0
"""Time after which the cursor of a silent person is stored."""


class AnswerState(NamedTuple):
    """What an entry says of the state after it."""

    bot: str
    """That of cursor, token and window."""
    lines: Sequence[bytes]
    """Fingerprints of its messages."""
    answer_size: int
    """Messages of the answer that are stored with it."""
    cursor: str | None
    token: str
    opened: InboundReceived | None
    """Its last message, which opens a window; None: it opens none."""


class Saved(NamedTuple):
    """The record as the bucket has it."""

    state: PersonState | None
    """None: it has none of the person's time."""
    revision: int


class Person:
    """What memory has of a person while this replica owns them, and beyond that while a poll of theirs is open."""

    def __init__(
        self,
        key: PersonKey,
        parts: Parts,
        tenure: Tenure,
        handover: Handover,
        typing: TypingIndicators,
        on_change: Callable[[], None],
    ) -> None:
        """`on_change`: called at each change of what may be sent."""
        self._parts = parts
        self._typing = typing
        self._on_change = on_change
        self.key = key
        self.user = ""
        """As iLink names them; "" as long as nobody knows."""
        self.bot: ServingBot | None = None
        """The bot that serves them; None: their time or their binding is over."""
        self.state = PersonState()
        self.is_open = False
        """Entry and record were read; before that nothing is sent."""
        self.gone: Gone = ""
        self.position = 0
        """Sequence of the subject's newest entry as it is known here, which the next entry expects."""
        self.seen = DedupWindow()
        self.tenure = tenure
        self.handover = handover
        self.is_posting = False
        """A request to iLink is out for them, or about to be."""
        self.is_save_due = False
        """The record is to be stored although nothing is sent."""
        self._saved = Saved(None, 0)
        self._written = self.state
        """The record as it was written last, perhaps without an answer."""
        self._saved_at = parts.clock.monotonic()

    # what is stored ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Reads entry and record if they were not read. Raises Temporary; Refused("token_key") and RecordTooNew where
        they cannot be read here: nothing of theirs may be overwritten."""
        if not self.is_open:
            self.restore(await self._parts.persons.load(self.key))

    def restore(self, stored: StoredPerson) -> None:
        """Takes what is stored. What memory has newer stays."""
        if not self.is_open:
            self.is_open = True
            if stored.state is not None:
                self._take_record(stored.state)
            self._saved = Saved(stored.state, stored.revision)
        if stored.entry is not None:
            self.take_entry(stored.entry)
        self.position = max(self.position, stored.last)
        self._forget_other_bot()
        self._on_change()

    async def read_newest(self) -> None:
        """Takes the newest entry, which another replica may have stored. Raises as `open`."""
        entry, last = await self._parts.persons.newest(self.key)
        if entry is not None and entry.sequence > self.position:
            self.take_entry(entry)
        self.position = max(self.position, last)

    def _take_record(self, stored: PersonState) -> None:
        """Takes a record that was read. Newer token, window and cursor of memory stay."""
        now = self.state
        if now.window.id and now.window.opened_ms >= stored.window.opened_ms and now.window.id != stored.window.id:
            stored = msgspec.structs.replace(stored, token=now.token, window=now.window, bot=now.bot, bots=now.bots)
        if now.cursor is not None and now.cursor_after >= stored.cursor_after:
            stored = msgspec.structs.replace(stored, cursor=now.cursor, cursor_after=now.cursor_after)
        self.state = stored

    def take_entry(self, stored: StoredEntry) -> None:
        """Takes an entry that somebody else has written, or that was read at a taking. One of another time says
        nothing but its sequence, and one of another bot than the binding's counts for its fingerprints alone."""
        entry, secrets, state = stored.entry, stored.secrets, self.state
        self.position = max(self.position, stored.sequence)
        if entry.since > self.key.since or (entry.ended and entry.since == self.key.since):
            self.leave("erased" if entry.erased else "not_bound")
            return
        if entry.since != self.key.since:
            return
        if self.seen:
            new = [line for line in lines_of(entry.seen) if line not in self.seen]
            self.seen.add(new, max(KEEP, len(new)))
        else:
            self.seen = DedupWindow(entry.seen)
        if secrets is None:  # no known key opens it
            return
        self.learn(self.user or entry.user)
        bot = self.bot.id if self.bot is not None else entry.bot
        self.state = state = _with_bots(state, bot, (*secrets.bots, entry.bot))
        if entry.bot == bot:
            if stored.sequence > state.cursor_after or state.cursor is None:
                cursor = secrets.cursor or None
                self.state = msgspec.structs.replace(state, cursor=cursor, cursor_after=stored.sequence)
            if (opened := stored.opened()) is not None:
                now_ms, in_flight = self._parts.clock.now_ms(), int(self.is_posting)
                self.state = window.newer_window(self.state, opened, now_ms, in_flight)
        self._on_change()

    async def save(self) -> None:
        """Stores the record. Raises Temporary, LeaseLost; StaleRead if somebody else has written or deleted it since
        it was read: `take_newer_record`. Over the end of the person's time nothing is written."""
        persons = self._parts.persons
        while True:
            self.tenure.check()
            written, self._written, state = self._written, self.state, self.state
            try:
                revision = await persons.save(self.key, self.user, state, self._saved.revision, self.tenure.check)
            except Conflict:
                self.tenure.check()
                try:
                    stored, revision, is_over = await persons.reload(self.key)
                except (RecordTooNew, Refused) as exc:
                    self.is_open = False  # `open` waits until it can be read
                    raise StaleRead("stale_read", exc.detail) from exc
                self.tenure.check()  # the read may be slow, and the record that of a new owner
                before, self._saved = self._saved, Saved(stored, revision)
                if is_over:
                    self.leave("not_bound")
                if is_over or stored not in (before.state, written):
                    raise StaleRead("stale_read", "the record is newer than what was read of it") from None
            else:
                self._saved, self._saved_at = Saved(state, revision), self._parts.clock.monotonic()
                return

    def take_newer_record(self) -> None:
        """Takes the record that `save` met. What was about to be done by the older one was taken back."""
        if self._saved.state is None:  # the person is gone: nothing comes back from memory
            self.state = PersonState(bot=self.state.bot, bots=self.state.bots)
        else:
            self._take_record(self._saved.state)
            self._forget_other_bot()

    @property
    def is_saved(self) -> bool:
        """The bucket has the state as memory has it."""
        return self._saved.state is self.state

    @property
    def has_unsaved_sends(self) -> bool:
        """The record lacks what was sent last, which a person may quote, or that a request was taken back."""
        saved = self._saved.state or PersonState()
        return (self.state.sent, self.state.progress) != (saved.sent, saved.progress)

    # what others tell -------------------------------------------------------------------------------

    def on_stored(self, sequence: int, after: AnswerState) -> None:
        """Takes what was stored of an answer, whose entry has this sequence."""
        self.seen.add(after.lines, max(KEEP, after.answer_size))
        # one that another has written behind it is newer, and was taken; a login may have changed the bot meanwhile
        if sequence >= self.position and after.bot == self.state.bot:
            token = after.token or self.state.token
            self.state = msgspec.structs.replace(self.state, token=token, cursor=after.cursor, cursor_after=sequence)
            if after.opened is not None:
                self.state = self.state_after(after.opened)
        self.position = max(self.position, sequence)
        self._on_change()

    def on_cursor(self, bot: str, cursor: str) -> None:
        """iLink has given a cursor without news, which is stored with what comes next, or once a day."""
        if bot == self.state.bot and cursor != self.state.cursor:
            self.state = msgspec.structs.replace(self.state, cursor=cursor, cursor_after=self.position)
            if self._parts.clock.monotonic() - self._saved_at > CURSOR_SAVED_S:
                self.is_save_due = True
                self._on_change()

    def check_binding(self) -> None:
        """Takes the binding that serves the person now. Token and cursor of another bot are forgotten."""
        binding = binding_of(self._parts.bindings, self.key)
        is_served = binding is not None and not self.gone
        former, self.bot = self.bot, self._parts.sessions.serving(binding) if binding and is_served else None
        self.learn(binding.user if binding is not None else "")
        if self.bot != former:
            self._forget_other_bot()
            self._on_change()

    def leave(self, gone: Gone) -> None:
        """Their time is over: what waits for them ends. "": it goes on after all."""
        self.gone = gone
        self.check_binding()

    def learn(self, user: str) -> None:
        """The person's user, as the binding or the first message has it; "": it says nothing."""
        if user and user != self.user:
            self.user = user
            self._on_change()

    # typing indicator -------------------------------------------------------------------------------

    def show_typing(self) -> None:
        """Shows the typing indicator. Best effort."""
        if self.bot is not None and self.bot.account.token:
            self._typing.show(self.bot.account, self.key.sandbox, self.user, self.state.token)

    def hide_typing(self) -> None:
        self._typing.hide(self.key.sandbox, self.user)

    # for an entry -----------------------------------------------------------------------------------

    def prints_with(self, lines: Sequence[bytes], answer_size: int) -> bytes:
        """The fingerprints of the next entry. `lines`: those of its messages; `answer_size`: how many of the answer
        are stored with it, which are remembered whole."""
        most = max(KEEP, answer_size)
        kept = self.seen.kept(self._parts.clock.now_ms(), most)
        return b"".join((kept, *lines))[-most * SIZE :]

    def _forget_other_bot(self) -> None:
        if self.bot is not None and self.is_open:
            self.state = _with_bots(self.state, self.bot.id, ())

    def state_after(self, opened: InboundReceived) -> PersonState:
        """The state after a message of theirs, which opens a new window."""
        return window.open_window(self.state, opened, self._parts.clock.now_ms(), int(self.is_posting))


def _with_bots(state: PersonState, bot: str, bots: Sequence[str]) -> PersonState:
    """The state with this bot, whose token and cursor are those of no other, and with former bots."""
    known = (*state.bots, *bots, state.bot)
    former = tuple(dict.fromkeys(each for each in reversed(known) if each and each != bot))[::-1][-BOTS_KEPT:]
    if state.bot == bot:
        return state if former == state.bots else msgspec.structs.replace(state, bots=former)
    return msgspec.structs.replace(state, bot=bot, bots=former, token="", cursor=None, cursor_after=0)
