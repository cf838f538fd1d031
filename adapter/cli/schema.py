"""Writes what is generated from the code: `schemas/`, the pages of messages and settings, and `helm/nats/*.conf`.

`python -m adapter.cli.schema` writes; with `--check` it only says what differs (exit status 1).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from adapter.contract.messages import MESSAGES, SCHEMA_VERSION, ReplayPage, ReplayQuery
from adapter.contract.names import H_MSG_ID, H_REPLY_TO, H_SCHEMA, H_TRACEPARENT, SANDBOX_PATTERN, Names
from adapter.security.permissions import FILES, server_config
from adapter.settings import GROUPS, SECRETS, Settings, variable_of

ROOT = Path(__file__).parents[2]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
DOCUMENTED: dict[str, type[msgspec.Struct]] = {**MESSAGES, "replay_query": ReplayQuery, "replay_page": ReplayPage}
"""Every message that has a file here, by its name."""
RAW = ("media_bytes", "media_piece")
"""Messages whose payload are bytes; their schema is that of their headers."""
TYPES = Path("schemas/examples/typescript/wechat-nats.d.ts")
"""TypeScript types, made of the JSON Schemas by tests/npm/types.mjs: here they are only checked."""
EXAMPLES = ("s1", "s2")
"""The sandboxes in the configurations of `helm/nats/`."""
SAMPLES = Path("schemas/samples/valid")
ODD_SAMPLES = ("unknown-field", "nulls")
"""Samples that show what a reader has to bear, not what a message has."""
MESSAGES_PAGE = Path("docs/reference/messages.md")
MESSAGES_HEAD = """\
# Messages

Every message of the bus, once. [Messages of the bus](../../schemas/README.md) says what you can rely on; the JSON
Schemas beside that page say which fields are optional, and what each means.
"""
SETTINGS_PAGE = Path("docs/reference/settings.md")
SETTINGS_START, SETTINGS_END = "<!-- settings -->\n", "<!-- /settings -->"


class SettingRow(NamedTuple):
    """One line of the table of settings."""

    variable: str
    default: str
    meaning: str


class Channel(NamedTuple):
    """A subject, what goes over it, and what the adapter does with it."""

    key: str
    subject: str
    message: str
    does: str
    summary: str
    answer: str = ""
    """Message of the answer; "" if there is none."""
    answer_to: str = ""
    """Where the answer goes, as an AsyncAPI runtime expression."""


def channels(names: Names) -> list[Channel]:
    """Every subject that sandboxes, services and the platform use. `does`: send or receive, seen from the adapter."""
    sandbox = "{sandbox}"
    by_header = f"$message.header#/{H_REPLY_TO}"

    def service(key: str, verb: str, message: str, summary: str, answer: str) -> Channel:
        return Channel(key, names.svc(verb), message, "receive", summary, answer, "$message.header#/reply")

    return [
        Channel("in", names.live(sandbox), "inbound", "send", "Live: what a user said, by plain subscribe."),
        Channel("inbox", names.inbox(sandbox), "inbound", "send", f"The same, as {names.stream_in} keeps it."),
        Channel("out", names.out(sandbox), "outbound", "receive", "A sandbox says something to its user."),
        Channel("out_any", names.out_plain, "outbound", "receive", "A service says it; the body names the sandbox."),
        Channel(
            "receipt",
            names.receipts(sandbox).replace("*", "{command}"),
            "receipt",
            "send",
            "What became of a command.",
        ),
        Channel("binding", names.event(sandbox, "binding"), "binding_event", "send", "A binding changed."),
        Channel("window_change", names.event(sandbox, "window"), "window_event", "send", "The window changed."),
        Channel("erased", names.event(sandbox, "erased"), "erased_event", "send", "A person was erased."),
        Channel("login", names.event(sandbox, "login"), "login_event", "send", "A step of a QR login."),
        Channel("bind", names.bind, "bind", "receive", "Let a bot serve a sandbox.", "control_answer", by_header),
        Channel("unbind", names.unbind, "unbind", "receive", "End that.", "control_answer", by_header),
        Channel("erase", names.erase, "erase", "receive", "Erase a person.", "control_answer", by_header),
        service("bindings_list", "bindings.list", "bindings_query", "Which bindings there are.", "bindings_page"),
        service(
            "bindings_get", "bindings.get", "bindings_query", "The bindings of one bot or sandbox.", "bindings_page"
        ),
        service(
            "media_get",
            f"media.get.{sandbox}",
            "media_query",
            "The next piece of an object of the sandbox; its bytes are the answer.",
            "media_bytes",
        ),
        service(
            "media_put", f"media.put.{sandbox}", "media_piece", "A piece of media that the sandbox brings.", "media"
        ),
        service("login_start", "login.start", "login_start", "Start a QR login; the answer holds the code.", "login"),
        service("login_status", "login.status", "login_query", "How a login stands, and its newest code.", "login"),
        service("login_verify", "login.verify", "login_verify", "The digits that the phone shows.", "login"),
        service("login_cancel", "login.cancel", "login_query", "End a login.", "login"),
        service("window", f"window.{sandbox}", "window_query", "What the sandbox may still send.", "window"),
        service("last_receipt", f"receipt.{sandbox}", "receipt_query", "The last receipt of a command.", "receipt"),
        service(
            "replay", f"replay.{sandbox}", "replay_query", "The sandbox's own inbound messages again.", "replay_page"
        ),
        service(
            "window_any", "window", "window_query", "What may still be sent; the body names the sandbox.", "window"
        ),
        service(
            "last_receipt_any",
            "receipt",
            "receipt_query",
            "The last receipt of a command of the sandbox that the body names.",
            "receipt",
        ),
        service(
            "replay_any",
            "replay",
            "replay_query",
            "The inbound messages of the sandbox that the body names.",
            "replay_page",
        ),
    ]


def json_schema(name: str) -> dict[str, Any]:
    """JSON Schema 2020-12 of one of `DOCUMENTED`, complete in itself."""
    kind = DOCUMENTED[name]
    definitions = _definitions([kind], "#/$defs/{name}")
    root = definitions.pop(kind.__name__)
    schema: dict[str, Any] = {
        "$schema": DIALECT,
        "$id": f"urn:wechat-nats:schema:{SCHEMA_VERSION}:{name}",
        **root,
    }
    if definitions:
        schema["$defs"] = dict(sorted(definitions.items()))
    return schema


def _definitions(kinds: Iterable[type[msgspec.Struct]], ref_template: str) -> dict[str, dict[str, Any]]:
    """What msgspec says of messages; of docstrings, whose indentation only Python 3.13 takes away, without it."""
    _, definitions = msgspec.json.schema_components(kinds, ref_template=ref_template)
    for definition in definitions.values():
        if "description" in definition:
            definition["description"] = inspect.cleandoc(definition["description"])
    return definitions


def asyncapi() -> dict[str, Any]:
    """AsyncAPI 3.0 of the bus, under the default prefix."""
    listed = channels(Names())
    definitions = _definitions(DOCUMENTED.values(), "#/components/schemas/{name}")
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "wechat-nats",
            "version": f"{SCHEMA_VERSION}.0.0",
            "description": (
                "The bus between WeChat and sandboxes. Operations are the adapter's: what it sends you receive,"
                " what it receives you send. The first token of every subject is a setting. See README.md."
            ),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {
            **{channel.key: _channel(channel) for channel in listed},
            **{f"{channel.key}_answer": _answer_channel(channel) for channel in listed if channel.answer},
        },
        "operations": {channel.key: _operation(channel) for channel in listed},
        "components": {
            "messages": {name: _message(name) for name in DOCUMENTED},
            "schemas": {
                **_without_discriminators(dict(sorted(definitions.items()))),
                "Headers": _headers(),
            },
        },
    }


def settings_table() -> list[SettingRow]:
    """Every variable with its default and the docstring of its field, in the order of `Settings`."""
    docs = _docstrings()
    defaults = Settings()
    rows = []
    for field in Settings.__struct_fields__:
        variable = variable_of(field) + (f"`, `{variable_of(field)}_FILE" if field in SECRETS else "")
        rows.append(SettingRow(variable, _show_default(getattr(defaults, field)), docs[field]))
    return rows


def settings_markdown() -> str:
    """`settings_table` as `SETTINGS_PAGE` shows it: a table for each group."""
    lines = []
    for field, (variable, default, meaning) in zip(Settings.__struct_fields__, settings_table(), strict=True):
        if field in GROUPS:
            lines += ["", f"## {GROUPS[field]}", "", "| variable | default | meaning |", "|---|---|---|"]
        lines.append(f"| `{variable}` | {f'`{default}`' if default else 'empty'} | {meaning} |")
    return "\n".join(lines) + "\n\n"


def messages_markdown() -> str:
    """`MESSAGES_PAGE`: of each message where it is, what it is, and its fullest sample."""
    listed = channels(Names())
    text = MESSAGES_HEAD
    for name, kind in DOCUMENTED.items():
        subjects = [f"`{channel.subject}`" for channel in listed if channel.message == name]
        subjects += [f"the answer to `{channel.subject}`" for channel in listed if channel.answer == name]
        where = ", ".join(subjects).replace("{", "<").replace("}", ">")
        about = "Headers; the payload are bytes." if name in RAW else _first_sentence(kind)
        samples = [file for file in (ROOT / SAMPLES).glob(f"{name}-*.json") if not file.stem.endswith(ODD_SAMPLES)]
        fullest = max(samples, key=lambda file: (file.stem.endswith("-full"), file.stat().st_size, file.name))
        sample = json.dumps(json.loads(fullest.read_bytes()), indent=2, ensure_ascii=False)
        text += f"\n## {name}\n\n{where}\n\n{about}\n\n```json\n{sample}\n```\n"
    return text


def _first_sentence(kind: type[msgspec.Struct]) -> str:
    sentence = " ".join((kind.__doc__ or "").split()).partition(". ")[0].removesuffix(".")
    return sentence.replace("<", "&lt;") + "."


def generated_files(root: Path = ROOT) -> dict[Path, str]:
    """Path below `root` and text of every generated file."""
    files = {Path("schemas") / f"{name}.json": _document_text(json_schema(name)) for name in DOCUMENTED}
    files[Path("schemas/asyncapi.json")] = _document_text(asyncapi())
    for own_accounts, file in FILES.items():
        files[Path("helm/nats") / file] = server_config(Names(), EXAMPLES, own_accounts=own_accounts)
    files[MESSAGES_PAGE] = messages_markdown()
    page = (root / SETTINGS_PAGE).read_text(encoding="utf-8")
    before, start, rest = page.partition(SETTINGS_START)
    _, end, after = rest.partition(SETTINGS_END)
    if start and end:
        files[SETTINGS_PAGE] = before + start + settings_markdown() + end + after
    return files


def types_stamp(files: dict[Path, str]) -> str:
    """What the types say of the JSON Schemas that they were made of, in hex."""
    digest = hashlib.sha256()
    for name in sorted(DOCUMENTED):
        path = Path("schemas") / f"{name}.json"
        digest.update(f"{path.name}\0{files[path]}\0".encode())
    return digest.hexdigest()


def stale_files(root: Path = ROOT) -> list[Path]:
    """Generated files that are absent, stale, or no longer generated."""
    files = generated_files(root)
    stale = [path for path, text in files.items() if not _is_current(root / path, text)]
    remaining = [path.relative_to(root) for path in (root / "schemas").glob("*.json")]
    types = [] if types_stamp(files) in _read_text(root / TYPES) else [TYPES]
    return sorted({*stale, *types, *(path for path in remaining if path not in files)})


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    if list(arguments) not in ([], ["--check"]):
        sys.stderr.write("usage: python -m adapter.cli.schema [--check]\n")
        return 2
    changes = stale_files()
    if arguments:
        sys.stdout.writelines(f"{path} is not what the code says; run: make generate\n" for path in changes)
        return 1 if changes else 0
    files = generated_files()
    for path in changes:
        if path == TYPES:
            continue  # needs node: `make generate` goes on with it
        if path in files:
            (ROOT / path).write_text(files[path], encoding="utf-8")
        else:
            (ROOT / path).unlink()
        sys.stdout.write(f"{path}\n")
    return 0


def _channel(channel: Channel) -> dict[str, Any]:
    made: dict[str, Any] = {
        "address": channel.subject,
        "summary": channel.summary,
        "messages": {channel.message: {"$ref": f"#/components/messages/{channel.message}"}},
    }
    if "{sandbox}" in channel.subject:
        made["parameters"] = {"sandbox": {"description": f"Name of the sandbox; matches {SANDBOX_PATTERN}"}}
    if "{command}" in channel.subject:
        made["parameters"]["command"] = {
            "description": "Id of the command; =XX for each byte that is no word character"
        }
    return made


def _answer_channel(channel: Channel) -> dict[str, Any]:
    return {
        "address": None,
        "summary": f"Answers to {channel.subject}, at an inbox of the asker.",
        "messages": {channel.answer: {"$ref": f"#/components/messages/{channel.answer}"}},
    }


def _operation(channel: Channel) -> dict[str, Any]:
    made: dict[str, Any] = {
        "action": channel.does,
        "channel": {"$ref": f"#/channels/{channel.key}"},
        "summary": channel.summary,
        "messages": [{"$ref": f"#/channels/{channel.key}/messages/{channel.message}"}],
    }
    if channel.answer:
        made["reply"] = {
            "address": {"location": channel.answer_to},
            "channel": {"$ref": f"#/channels/{channel.key}_answer"},
            "messages": [{"$ref": f"#/channels/{channel.key}_answer/messages/{channel.answer}"}],
        }
    return made


def _message(name: str) -> dict[str, Any]:
    kind = DOCUMENTED[name]
    shape = {"$ref": f"#/components/schemas/{kind.__name__}"}
    about = {"name": name, "title": kind.__name__, "summary": " ".join((kind.__doc__ or "").split())}
    if name in RAW:
        binary = {"type": "string", "format": "binary"}
        return {**about, "contentType": "application/octet-stream", "headers": shape, "payload": binary}
    headers = {"$ref": "#/components/schemas/Headers"}
    return {**about, "contentType": "application/json", "headers": headers, "payload": shape}


def _headers() -> dict[str, Any]:
    return {
        "title": "Headers",
        "type": "object",
        "properties": {
            H_SCHEMA: {"type": "string", "description": f"Major version of the contract: {SCHEMA_VERSION}."},
            H_MSG_ID: {
                "type": "string",
                "description": "Id; JetStream drops a repeat within five minutes, of a command within 15 s.",
            },
            H_REPLY_TO: {"type": "string", "description": "Inbox for the answer to bind, unbind and erase."},
            H_TRACEPARENT: {
                "type": "string",
                "description": "W3C Trace Context; a command's is that of its receipts.",
            },
        },
    }


def _without_discriminators(node: Any) -> Any:
    """AsyncAPI means something else by the word than JSON Schema's code generators do."""
    match node:
        case dict():
            return {key: _without_discriminators(value) for key, value in node.items() if key != "discriminator"}
        case list():
            return [_without_discriminators(value) for value in node]
        case _:
            return node


def _docstrings() -> dict[str, str]:
    """The string that follows each field in the source; Python itself does not keep it."""
    (struct,) = ast.parse(textwrap.dedent(inspect.getsource(Settings))).body
    assert isinstance(struct, ast.ClassDef)
    docs = {}
    for field, after in zip(struct.body, struct.body[1:], strict=False):
        match field, after:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = " ".join(text.split())
    return docs


def _show_default(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case tuple():
            return ",".join(_show_default(part) for part in value)
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def _document_text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _is_current(path: Path, text: str) -> bool:
    return _read_text(path) == text


def _read_text(path: Path) -> str:
    """The text of a file; "" where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
