"""How a command ends: exit codes that scripts can trust, and the one sentence that goes with each failure."""

from __future__ import annotations

OK = 0
NO = 1
USAGE = 2
UNREACHABLE = 3
TIMEOUT = 4
INTERRUPTED = 130

EXIT_CODES = """\
Exit codes:

* 0 done
* 1 refused, not found, or not accepted
* 2 wrong usage or settings
* 3 NATS unreachable, or no adapter answered
* 4 the outcome did not come in time
* 130 ctrl-C
"""


class Failed(Exception):
    """A command ends with `code`. The text is one sentence that says what to do and never holds a secret."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
