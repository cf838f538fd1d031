"""The outcome of a send attempt: an ending, in the terms of the receipt, or a reason to wait. No I/O."""

from __future__ import annotations

from typing import Literal, NamedTuple

from adapter.contract import Outcome
from adapter.errors import Crashed, Refused
from adapter.outbound.commands import Command
from adapter.records import Hand


class Ending(NamedTuple):
    """The final outcome of a command."""

    outcome: Outcome
    reason: str = ""
    detail: str = ""
    message_ids: tuple[str, ...] = ()
    attempts: int = 0
    ret: int | None = None
    errcode: int | None = None
    errmsg: str = ""

    @property
    def is_sent(self) -> bool:
        """iLink took all of it."""
        return self.outcome in ("accepted", "accepted_unconfirmed")

    @property
    def may_be_sent(self) -> bool:
        """It may be on the phone."""
        return self.is_sent or self.outcome == "uncertain"

    def with_answer(self, answer: Refused) -> Ending:
        """With iLink's own words."""
        return self._replace(ret=answer.ret, errcode=answer.errcode, errmsg=answer.errmsg)


CRASHED = Ending("dead_lettered", Crashed().reason, Crashed().detail)
"""Of a command on which the code raised at every try."""
PERHAPS = Ending("uncertain", "", f"Whether it was sent cannot be looked up. {CRASHED.detail}")
"""The same, where an owner before may have sent it."""


class Wait(NamedTuple):
    """The command must wait for the user or for a login."""

    reason: str
    detail: str = ""
    attempts: int = 0
    ret: int | None = None
    errcode: int | None = None
    errmsg: str = ""

    def as_ending(self, outcome: Literal["parked", "refused"]) -> Ending:
        """What is told of it: it waits, or is refused where it does not want to."""
        return Ending(outcome, self.reason, self.detail, (), *self[2:])


class Repeat(NamedTuple):
    """A command with this id was sent before, by another message: nothing is sent and nothing said."""


class Apart(NamedTuple):
    """iLink refused texts that were merged, and took none: each must be sent by itself."""


def all_taken(hand: Hand) -> Ending:
    """iLink has taken every part of the command in hand."""
    outcome: Outcome = "accepted_unconfirmed" if hand.unconfirmed else "accepted"
    ids = tuple(hand.message_ids)
    return Ending(outcome, "", "", ids, hand.attempts, hand.ret, hand.errcode, hand.errmsg)


def in_doubt(ending: Ending, hand: Hand | None, command: Command) -> Ending:
    """What is told of a command that ends unsent, where the hand says what was tried of it before.

    A request that got no answer may have been taken: then it cannot be called refused. And all may have been taken,
    only that nobody could be told of it in time.
    """
    if hand is None or not hand.holds(command.client):
        return ending
    if command.parts and hand.part >= len(command.parts):
        return all_taken(hand)
    attempts = max(ending.attempts, hand.attempts)
    ending = ending._replace(message_ids=tuple(hand.message_ids), attempts=attempts)
    if not hand.tried and (command.parts or not hand.part):
        return ending  # where the command cannot be read, nobody knows whether the parts that were taken are all
    detail = f"It may have been sent: an earlier request got no answer. Later: {ending.detail}"
    return ending._replace(outcome="uncertain", reason="", detail=detail)
