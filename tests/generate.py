"""Writes what is generated from the code: `schemas/`, the pages of messages and settings, and the templates in
`helm/nats/`.

`python -m tests.generate` writes; with `--check` it only says what differs (exit status 1).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from adapter.cli.schema import json_schema
from adapter.contract.messages import MESSAGES
from adapter.contract.names import Names
from adapter.settings import GROUPS, SECRETS, Settings, variable_of
from adapter.tools.accounts import FILES, server_config
from tests.asyncapi import RAW, asyncapi, channels
from tests.bus.accounts import nsc_scripts

ROOT = Path(__file__).parents[1]
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
    for name, kind in MESSAGES.items():
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
    files = {Path("schemas") / f"{name}.json": _document_text(json_schema(name)) for name in MESSAGES}
    files[Path("schemas/asyncapi.json")] = _document_text(asyncapi())
    for own_accounts, file in FILES.items():
        files[Path("helm/nats") / file] = server_config(
            Names(), EXAMPLES, untrusted=("u1",), own_accounts=own_accounts
        )
    files |= {Path("helm/nats") / file: text for file, text in nsc_scripts(Names()).items()}
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
    for name in sorted(MESSAGES):
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
        sys.stderr.write("usage: python -m tests.generate [--check]\n")
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
