"""The command line. `main` turns every way in which a command ends into an exit code and at most one sentence."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import logging
import os
import sys

import structlog
from cyclopts import App, CycloptsError

from adapter import __version__
from adapter.cli import backup, bindings, dead, demo, doctor, login, output, permissions, queued, run, send, tail
from adapter.cli.embedded import EmbeddedFailed
from adapter.cli.exit_codes import EXIT_CODES, INTERRUPTED, NO, OK, USAGE, Failed
from adapter.errors import AdapterError, SettingsError

HELP = "The bridge between WeChat (iLink bots) and NATS."
CONNECTION = """\
The bus is found by NATS_URL (default nats://127.0.0.1:4222), NATS_CREDS, NATS_NKEY, NATS_USER, NATS_PASSWORD,
NATS_TOKEN, NATS_CA, NATS_CERT, NATS_KEY, NATS_TLS_FIRST, NATS_INBOX_PREFIX and WECHAT_NATS_PREFIX."""

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Of a file that takes nothing more."""


def build() -> App:
    """The application with all its commands."""
    app = App(
        name="wechat-nats",
        help=HELP,
        help_epilogue=f"{CONNECTION}\n\n{EXIT_CODES}",
        version=__version__,
        help_format="markdown",
        suppress_keyboard_interrupt=False,
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
    )
    app.command(demo.demo)
    app.command(run.run)
    app.command(login.login)
    app.command(bindings.bind)
    app.command(bindings.unbind)
    app.command(bindings.bindings)
    app.command(send.send)
    app.command(tail.tail)
    app.command(queued.app)
    app.command(dead.app)
    app.command(doctor.doctor)
    app.command(backup.backup)
    app.command(backup.restore)
    app.command(permissions.app)
    app.command(run.simulator)
    app.command(run.schema)
    return app


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code (`exit_codes.EXIT_CODES`)."""
    _have_streams()
    _silence_libraries()
    try:
        result = build()(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except CycloptsError as exc:
        output.complain(f"{_sentence(exc)} See --help.")
        return USAGE
    except Failed as exc:
        output.complain(str(exc))
        return exc.code
    except SettingsError as exc:
        output.complain(exc.detail)
        return USAGE
    except (EmbeddedFailed, AdapterError) as exc:
        output.complain(exc.detail or exc.reason)
        return NO
    except UnicodeError:  # of standard input, or of an argument, whose wrong bytes Python has as surrogates
        output.complain("What it was given is not UTF-8.")
        return USAGE
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    except SystemExit as exc:  # the simulator's own parser, and rich where nobody reads its tables
        if isinstance(exc.__context__, BrokenPipeError):
            return _is_output_closed()
        return exc.code if isinstance(exc.code, int) else USAGE
    except BrokenPipeError:
        return _is_output_closed()
    except OSError as exc:
        if exc.errno not in NO_ROOM:
            raise
        _is_output_closed()
        with contextlib.suppress(OSError):  # that may be the same file
            output.complain(f"What it says cannot be written: {exc.strerror}.")
        return NO
    return result if isinstance(result, int) else OK


def _sentence(exc: CycloptsError) -> str:
    """Cyclopts' own words, on one line."""
    return " ".join(str(exc).split())


def _have_streams() -> None:
    """Stands in for standard streams that were closed (`<&-`, `>&-`), which Python has as None: nothing is read, and
    what is said is lost. Their numbers are taken, too, so that no connection gets them. In any locale they are UTF-8,
    as what people write is."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 -- as long as the process
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="strict" if mode == "r" else "backslashreplace")


def _silence_libraries() -> None:
    """The adapter's modules log; a command speaks for itself. `run` and `demo` set up logs of their own."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.getLogger("nats").setLevel(logging.CRITICAL + 1)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)


def _is_output_closed() -> int:
    """`wechat-nats tail | head -1`: the reader has what it wanted. Python must not fail once more on its way out."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OK
