"""Checks at iLink whether the token of a bind is alive.

The check is a `notifystart`, which consumes no messages, unlike a poll.
"""

from __future__ import annotations

import asyncio
from enum import Enum

from adapter.contract.messages import Bind
from adapter.errors import Refused, SessionExpired, Temporary, Uncertain
from adapter.ports import Account, Chat

CHECK_S = 5.0
"""Time limit of a check."""


class Verdict(Enum):
    """Result of a check."""

    TAKEN = "an answer that is not -14"
    DEAD = "-14"
    SILENT = "no answer"


async def check_token(chat: Chat, command: Bind, token: str) -> Verdict:
    """Asks iLink about the token of a bind. Raises Refused for an invalid base URL."""
    base_url = chat.check_base_url(command.base_url) if command.base_url else ""
    try:
        async with asyncio.timeout(CHECK_S):
            await chat.notify(Account(command.bot, token, base_url), start=True)
    except SessionExpired:
        return Verdict.DEAD
    except Temporary as exc:
        return Verdict.TAKEN if exc.reason == "ret_other" else Verdict.SILENT
    except (Uncertain, TimeoutError):
        return Verdict.SILENT
    except Refused:  # the bind itself will fail
        return Verdict.TAKEN
    return Verdict.TAKEN
