"""What comes before a command: a signal that arrives early, and exceptions that nobody catches."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from types import TracebackType


def prepare() -> None:
    """Once, before anything of the command is imported."""
    _end_on_sigterm()
    _redact_uncaught_exceptions()


def _end_on_sigterm() -> None:
    """As the first process of a container, ends on a SIGTERM that comes before anybody listens for it.

    The kernel drops signals that this process does not handle: an adapter that is stopped while it still imports
    would start all the same, and be killed with work in hand when the patience of who stopped it is over.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _redact_uncaught_exceptions() -> None:
    """Prints uncaught exceptions redacted as logs are: Python's own report would repeat whatever they hold."""

    def print_redacted(
        kind: type[BaseException],
        exc: BaseException | None,
        trace: TracebackType | None,
        where: str = "",
    ) -> None:
        from adapter.tools.logs import TRACEBACK_CHARS, redact_text  # noqa: PLC0415 -- see _end_on_sigterm

        text = "".join([where, *traceback.format_exception(kind, exc, trace)])
        sys.stderr.write(redact_text(text, 2 * TRACEBACK_CHARS) + "\n")

    def report_thread_exception(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_type is not SystemExit:
            print_redacted(failed.exc_type, failed.exc_value, failed.exc_traceback, "In a thread:\n")

    def report_unraisable(failed: sys.UnraisableHookArgs) -> None:
        print_redacted(failed.exc_type, failed.exc_value, failed.exc_traceback, f"{failed.err_msg or 'Ignored'}:\n")

    sys.excepthook = print_redacted
    threading.excepthook = report_thread_exception
    sys.unraisablehook = report_unraisable
