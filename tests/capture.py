"""What the code logs, as it is written, and bugs that it is to log. The fixture `captured` is in conftest.py."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from adapter.tools import logs

WORDS = "poison-words"
"""Those of a message or command at fault. What is raised says them, and no log may."""
ALWAYS = 10**6


class Capture(io.BytesIO):
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]

    def crashes(self) -> list[dict[str, Any]]:
        """The lines that tell of an exception."""
        return [line for line in self.lines() if "exception" in line]


@contextmanager
def capturing() -> Iterator[Capture]:
    """Everything that is logged at debug or above; the configuration before is restored."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    out = Capture()
    logs.configure("debug", out, version="1.2.3")
    yield out
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


class Bugs:
    """Raises so many times, in the words of what is at fault."""

    def __init__(self, times: int) -> None:
        self.left = times

    def strike(self) -> None:
        if self.left > 0:
            self.left -= 1
            raise RuntimeError(f"a bug over {WORDS}")
