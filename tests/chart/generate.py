"""Writes what of the chart is made of other files: parts of values.schema.json and the table of its README.

`python -m tests.chart.generate`; part of `make generate`. The README needs npm.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from adapter.settings import PREFIX, Settings, variable_of
from tests.chart.helm import CHART, ROOT, Object
from tests.generate import settings_table

SCHEMA = CHART / "values.schema.json"
README = CHART / "README.md"
GENERATOR = ROOT / "tests" / "npm" / "node_modules" / ".bin" / "readme-generator"

ELSEWHERE = frozenset(
    {"WECHAT_NATS_TOKEN_KEY", "WECHAT_NATS_DRAIN_S", "WECHAT_NATS_HTTP_ADDR"}  # have values of their own
    | {"WECHAT_NATS_CONSOLE_ADDR", "WECHAT_NATS_CONSOLE_TOKEN"}  # so do these
    | {"WECHAT_NATS_DATA_DIR"}  # for `--embedded` only
)
"""Variables of the program that `settings` does not take."""


def documented(values: str | None = None) -> dict[str, str]:
    """Path and words of every @param in values.yaml."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8") if values is None else values
    return dict(re.findall(r"^\s*## @param (\S+)(?: \[[^\]]*\])? (.+)$", text, re.MULTILINE))


def settings_schema() -> Object:
    """One property per variable, as the program checks it; a list is one text with commas."""
    words = {row.variable.partition("`")[0]: row.meaning for row in settings_table()}
    hints = get_type_hints(Settings, include_extras=True)
    found: Object = {}
    for field in Settings.__struct_fields__:
        variable = variable_of(field)
        if variable.startswith(PREFIX) and variable not in ELSEWHERE:
            found[variable] = {"description": words[variable], **_type(msgspec.inspect.type_info(hints[field]))}
    return found


def _type(info: msgspec.inspect.Type) -> Object:
    match info:
        case msgspec.inspect.LiteralType(values=values):
            return {"enum": list(values)}
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            kind = "integer" if isinstance(info, msgspec.inspect.IntType) else "number"
            names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum"}
            return {"type": kind} | {
                name: bound for key, name in names.items() if (bound := getattr(info, key)) is not None
            }
        case msgspec.inspect.StrType(pattern=str(pattern)):
            return {"type": "string", "pattern": pattern.replace(r"\Z", "$")}
        case msgspec.inspect.StrType(max_length=int(longest)):
            return {"type": "string", "maxLength": longest}
        case msgspec.inspect.StrType() | msgspec.inspect.VarTupleType():
            return {"type": "string"}
        case _:
            raise TypeError(f"no schema for {info}")


def schema() -> str:
    """values.schema.json with the words of values.yaml and the program's settings."""
    made: Object = json.loads(SCHEMA.read_text(encoding="utf-8"))
    made["properties"]["settings"]["properties"] = settings_schema()
    for path, words in documented().items():
        place = at(made, path)
        place_words = {"description": words}
        rest = {key: value for key, value in place.items() if key != "description"}
        place.clear()
        place.update(place_words | rest)
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def at(made: Object, path: str) -> Object:
    """The schema of a value. Raises KeyError."""
    place: Any = made
    for key in path.split("."):
        place = place["properties"][key]
    found: Object = place
    return found


def readme() -> str:
    """The README with the table as the generator writes it. Raises FileNotFoundError without `make npm`."""
    if not GENERATOR.exists():
        raise FileNotFoundError(GENERATOR)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(README, folder))
        command: list[str | Path] = [GENERATOR, "--values", CHART / "values.yaml", "--readme", copy]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ValueError(done.stdout + done.stderr)
        return copy.read_text(encoding="utf-8")


def main() -> int:
    SCHEMA.write_text(schema(), encoding="utf-8")
    try:
        README.write_text(readme(), encoding="utf-8")
    except FileNotFoundError:
        sys.stderr.write(f"run `make npm` first: {README.relative_to(ROOT)} is left as it is\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
