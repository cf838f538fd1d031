"""The command line. `main` turns every way in which a command ends into an exit code and at most one sentence."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence

import structlog
from cyclopts import App, CycloptsError

from adapter import __version__
from adapter.cli import output
from adapter.cli.exits import EXIT_CODES, INTERRUPTED, NO, OK, UNREACHABLE, USAGE, Failed, until_signalled
from adapter.errors import AdapterError, SettingsError, Temporary

HELP = "The bridge between WeChat (iLink bots) and NATS."
CONNECTION = """\
The bus is found by NATS_URL (default nats://127.0.0.1:4222), NATS_CREDS,
NATS_NKEY, NATS_USER, NATS_PASSWORD, NATS_TOKEN, NATS_CA, NATS_CERT, NATS_KEY,
NATS_TLS_FIRST, NATS_INBOX_PREFIX and WECHAT_NATS_PREFIX. What they do not say
is taken from the context of the command `nats` that NATS_CONTEXT names;
@selected is the one that `nats context select` has chosen."""

COMMANDS = {
    "demo": ("start:demo", "Chat with an echo agent: simulated WeChat, real bus."),
    "start": ("start:start", "Talk to an agent of yours in WeChat: all in one terminal."),
    "run": ("run:run", "Run the adapter; with --embedded also a NATS server."),
    "login": ("login:login", "Show a QR code: whoever scans it talks to this sandbox."),
    "acceptance": ("acceptance:acceptance", "Try the real service with your phone, and write a report."),
    "bind": ("bindings:bind", "Let a bot serve a sandbox."),
    "unbind": ("bindings:unbind", "Let a bot, or every bot of a sandbox, serve it no longer."),
    "bindings": ("bindings:bindings", "List which bots serve which sandboxes, and their states."),
    "agent": ("agent:agent", "Let an agent of your own answer a sandbox's people."),
    "mcp": ("mcp:mcp", "Let an agent write to a sandbox's people by tools (MCP)."),
    "send": ("send:send", "Send text or files to a sandbox's user; wait for the receipt."),
    "erase": ("persons:erase", "Unbind a person, and erase everything of theirs."),
    "export": ("persons:export", "Print everything of one person as JSON lines."),
    "trace": ("messages:trace", "Tell the story of one message or command."),
    "media": ("send:media", "Pictures, files and voice in the object store: fetch, bring."),
    "queue": ("stored:queue", "Commands that wait to be sent: delete."),
    "dead": ("stored:dead", "Messages that could not be handled: list, show, retry, delete."),
    "doctor": ("doctor:doctor", "Check NATS, permissions, streams, adapters and bindings."),
    "permissions": ("permissions:permissions", "Print a NATS server's accounts for these sandboxes."),
    "simulator": ("run:simulator", "Serve a simulated iLink: bots, phones, faults."),
    "schema": ("schema:schema", "Print the JSON Schema of a message of the bus."),
}
"""Each command's function, below this package, and its line in the help. Its module is imported when the command is
called: all modules together take a second."""


def build(argv: Sequence[str] = ()) -> App:
    """The application with all its commands, for a call with `argv`."""
    app = App(
        name="wechat-nats",
        help=HELP,
        help_epilogue=f"{CONNECTION}\n\n{EXIT_CODES}",
        version=__version__,
        help_format="markdown",
        exit_on_error=False,
        print_error=False,
    )
    for place, (name, (function, summary)) in enumerate(COMMANDS.items()):
        line = None if name in argv else summary  # it would replace the command's own help
        app.command(f"{__name__}.{function}", name=name, help=line, sort_key=place)
    return app


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code (`exits.EXIT_CODES`)."""
    code, complaint = _run(sys.argv[1:] if argv is None else argv)
    if complaint:
        output.complain(complaint)
    return code


def _run(argv: list[str]) -> tuple[int, str]:
    """The exit code, and the sentence that goes with it."""
    try:
        result = _call(argv)
        sys.stdout.flush()
    except Failed as exc:
        return exc.code, str(exc)
    except CycloptsError as exc:
        return USAGE, f"{' '.join(str(exc).split())} See --help."
    except SettingsError as exc:
        return USAGE, exc.detail
    except AdapterError as exc:
        return UNREACHABLE if isinstance(exc, Temporary) else NO, exc.detail or exc.reason
    except UnicodeError:  # of standard input, or of an argument, whose wrong bytes Python has as surrogates
        return USAGE, "What it was given is not UTF-8."
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED, ""
    except (SystemExit, BrokenPipeError) as exc:  # the former: the simulator's own parser, and rich without a reader
        if isinstance(exc, BrokenPipeError) or isinstance(exc.__context__, BrokenPipeError):
            _discard_output()  # `wechat-nats export … | head -1`: the reader has what it wanted
            return OK, ""
        return exc.code if isinstance(exc.code, int) else USAGE, ""
    return (result if isinstance(result, int) else OK), ""


def _call(argv: list[str]) -> object:
    """What the command returns. Raises CycloptsError where it is called wrongly."""
    _silence_libraries()
    command, given, _ = build(argv).parse_args(argv)
    result = command(*given.args, **given.kwargs)
    return asyncio.run(until_signalled(result)) if asyncio.iscoroutine(result) else result


def _silence_libraries() -> None:
    """Turns off the logs of the adapter's modules: a command says itself what happened. `run` and `demo` configure
    logs of their own."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.getLogger("nats").setLevel(logging.CRITICAL + 1)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)


def _discard_output() -> None:
    """Python must not fail once more on its way out."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
