"""The command line. `main` turns every way in which a command ends into an exit code and at most one sentence."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import logging
import os
import sys
from typing import TYPE_CHECKING

from adapter import __version__
from adapter.cli.exit_codes import EXIT_CODES, INTERRUPTED, NO, OK, USAGE, Failed
from adapter.cli.signals import until_signalled
from adapter.errors import AdapterError, SettingsError

if TYPE_CHECKING:
    from cyclopts import App

HELP = "The bridge between WeChat (iLink bots) and NATS."
CONNECTION = """\
The bus is found by NATS_URL (default nats://127.0.0.1:4222), NATS_CREDS,
NATS_NKEY, NATS_USER, NATS_PASSWORD, NATS_TOKEN, NATS_CA, NATS_CERT, NATS_KEY,
NATS_TLS_FIRST, NATS_INBOX_PREFIX and WECHAT_NATS_PREFIX. What they do not say
is taken from a context of the command `nats`: --context NAME, NATS_CONTEXT, or
@selected as the name for the one that `nats context select` has chosen."""

COMMANDS = {
    "demo": ("demo:demo", "Chat with an echo agent: simulated WeChat, real bus."),
    "run": ("run:run", "Run the adapter; with --embedded also a NATS server."),
    "login": ("login:login", "Show a QR code: whoever scans it talks to this sandbox."),
    "bind": ("bindings:bind", "Let a bot serve a sandbox."),
    "unbind": ("bindings:unbind", "Let a bot, or every bot of a sandbox, serve it no longer."),
    "bindings": ("bindings:bindings", "List which bots serve which sandboxes, and their states."),
    "agent": ("agent:agent", "Let an agent of your own answer a sandbox's people."),
    "send": ("send:send", "Send text or files to a sandbox's user; wait for the receipt."),
    "tail": ("tail:tail", "Print messages as they come."),
    "erase": ("persons:erase", "Unbind a person, and erase everything of theirs."),
    "export": ("persons:export", "Print everything of one person as JSON lines."),
    "trace": ("trace:trace", "Tell the story of one message or command."),
    "media": ("media:app", "Pictures, files and voice in the object store: fetch, bring."),
    "queue": ("queued:app", "Commands that wait to be sent: list, delete."),
    "dead": ("dead:app", "Messages that could not be handled: list, show, retry, delete."),
    "doctor": ("doctor:doctor", "Check NATS, permissions, streams, adapters and bindings."),
    "simulator": ("run:simulator", "Serve a simulated iLink: bots, phones, faults."),
    "schema": ("run:schema", "Print the JSON Schema of a message of the bus."),
}
"""Each command's function, below this package, and its line in the help. Its module is imported when the command is
called: all modules together take a second."""

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a disk or a file that is full."""


def help_text() -> str:
    """What `wechat-nats --help` prints, in 80 columns."""
    commands = "\n".join(f"  {name:<11}  {summary}" for name, (_, summary) in COMMANDS.items())
    return f"""\
Usage: wechat-nats COMMAND

{HELP}

Commands (wechat-nats COMMAND --help says more):
{commands}

{CONNECTION}

{EXIT_CODES}"""


def build() -> App:
    """The application with all its commands."""
    from cyclopts import App  # noqa: PLC0415 -- --help and --version start faster without it

    app = App(
        name="wechat-nats",
        help_epilogue=f"{CONNECTION}\n\n{EXIT_CODES}",
        version=__version__,
        help_format="markdown",
        exit_on_error=False,
        print_error=False,
    )
    for name, (place, _) in COMMANDS.items():
        app.command(f"{__name__}.{place}", name=name)
    return app


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code (`exit_codes.EXIT_CODES`)."""
    _have_streams()
    code, complaint = _run(sys.argv[1:] if argv is None else argv)
    if complaint:
        from adapter.cli import output  # noqa: PLC0415 -- --help starts faster without it

        with contextlib.suppress(OSError):  # standard error may be what has no room
            output.complain(complaint)
    return code


def _run(argv: list[str]) -> tuple[int, str]:
    """The exit code, and the sentence that goes with it."""
    try:
        result = _call(_take_context(argv))
        sys.stdout.flush()
    except Failed as exc:
        return exc.code, str(exc)
    except SettingsError as exc:
        return USAGE, exc.detail
    except AdapterError as exc:
        return NO, exc.detail or exc.reason
    except UnicodeError:  # of standard input, or of an argument, whose wrong bytes Python has as surrogates
        return USAGE, "What it was given is not UTF-8."
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED, ""
    except SystemExit as exc:  # the simulator's own parser, and rich where nobody reads its tables
        if not isinstance(exc.__context__, BrokenPipeError):
            return exc.code if isinstance(exc.code, int) else USAGE, ""
        _discard_output()
        return OK, ""
    except OSError as exc:
        if not isinstance(exc, BrokenPipeError) and exc.errno not in NO_ROOM:
            raise
        _discard_output()
        if isinstance(exc, BrokenPipeError):  # `wechat-nats tail | head -1`: the reader has what it wanted
            return OK, ""
        return NO, f"What it says cannot be written: {exc.strerror}."
    return (result if isinstance(result, int) else OK), ""


def _take_context(argv: list[str]) -> list[str]:
    """`argv` without `--context NAME`, which sets NATS_CONTEXT for this process. Raises Failed."""
    options = argv[: argv.index("--")] if "--" in argv else argv
    for at, option in enumerate(options):
        name, joined, value = option.partition("=")
        if name == "--context":
            if not joined and at + 1 == len(options):
                raise Failed(USAGE, "--context needs the name of a context.")
            os.environ["NATS_CONTEXT"] = value if joined else options[at + 1]
            return argv[:at] + argv[at + (1 if joined else 2) :]
    return argv


def _call(argv: list[str]) -> object:
    """What the command returns. Raises Failed where it is called wrongly."""
    if argv == ["--version"]:
        print(__version__)
        return OK
    if argv in ([], ["--help"], ["-h"]):
        print(help_text())
        return OK
    try:
        from cyclopts import CycloptsError  # noqa: PLC0415 -- --help and --version start faster without it
    except ModuleNotFoundError as exc:
        sys.stderr.write(f"wechat-nats: {exc.name} is left out here: of the commands only a plain `run` works.\n")
        return USAGE
    _silence_libraries()
    try:
        command, given, _ = build().parse_args(argv)
    except CycloptsError as exc:
        raise Failed(USAGE, f"{' '.join(str(exc).split())} See --help.") from None
    result = command(*given.args, **given.kwargs)
    return asyncio.run(until_signalled(result)) if asyncio.iscoroutine(result) else result


def _have_streams() -> None:
    """Replaces closed standard streams (`<&-`, `>&-`), which Python has as None, by /dev/null, so that no connection
    gets their numbers. Sets UTF-8 in any locale, since people write it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 -- as long as the process
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="strict" if mode == "r" else "backslashreplace")


def _silence_libraries() -> None:
    """Turns off the logs of the adapter's modules: a command says itself what happened. `run` and `demo` configure
    logs of their own."""
    import structlog  # noqa: PLC0415 -- --help starts faster without it

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.getLogger("nats").setLevel(logging.CRITICAL + 1)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)


def _discard_output() -> None:
    """Python must not fail once more on its way out."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
