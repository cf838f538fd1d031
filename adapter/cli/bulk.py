"""`--from FILE`: a command for every row of a file, many at a time, those of one sandbox or bot in order.

Rows are JSON objects, one a line, or CSV with a header. What failed is written in the same form, to be run again.
"""

from __future__ import annotations

import asyncio
import csv
import io
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import msgspec
from cyclopts import Parameter

from adapter.cli import output
from adapter.cli.exits import NO, OK, USAGE, Failed
from adapter.cli.output import read_text, write_private
from adapter.contract.messages import Options, SandboxId

Source = Annotated[
    Path | None,
    Parameter(
        name="--from", allow_leading_hyphen=True, help="Rows to do: JSON lines, or CSV with a header; - is stdin."
    ),
]
FailedFile = Annotated[
    Path | None,
    Parameter(
        name="--failed", help="With --from: write the rows that failed, and why, to this file, to be run again."
    ),
]

PROGRESS_S = 5.0


class Row(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What all rows may have. `error`: why it failed before; it is not read."""

    sandbox: SandboxId
    bot: str | None = None
    error: str = ""


class OptionsRow(Row, kw_only=True):
    """A row that binds somebody."""

    auto_typing: bool = False

    @property
    def options(self) -> Options:
        return Options(auto_typing=self.auto_typing)


R = TypeVar("R", bound=Row)


class _ParsedRow(NamedTuple, Generic[R]):
    """A row as it was written, and as it is read; or why it cannot be."""

    number: int
    written: dict[str, Any]
    row: R | None
    error: str


class Rows(NamedTuple, Generic[R]):
    """What a file holds."""

    rows: list[_ParsedRow[R]]
    columns: list[str]
    """Of CSV; none: the rows are JSON lines."""


def read_rows(source: Path, kind: type[R], options: dict[str, Any]) -> Rows[R]:
    """Reads a file. `options`: values of the columns that a row leaves out. A row that is invalid has its error.
    Raises Failed if the file cannot be read."""

    def read_row(number: int, written: dict[str, Any]) -> _ParsedRow[R]:
        given = {name: value for name, value in written.items() if value is not None}
        try:
            return _ParsedRow(number, written, msgspec.convert(options | given, kind, strict=False), "")
        except msgspec.ValidationError as exc:
            return _ParsedRow(number, written, None, f"{exc}.")

    def read_line(number: int, line: str) -> _ParsedRow[R]:
        try:
            return read_row(number, msgspec.json.decode(line, type=dict[str, Any]))
        except msgspec.MsgspecError:
            return _ParsedRow(number, {"line": line}, None, "The line is no JSON object.")

    text = sys.stdin.read() if str(source) == "-" else read_text(source)
    if text.lstrip().startswith("{"):
        return Rows([read_line(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()], [])
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="more", skipinitialspace=True)
    rows = [read_row(reader.line_num, {name: cell for name, cell in cells.items() if cell}) for cells in reader]
    return Rows(rows, [name for name in reader.fieldnames or [] if name != "error"])


async def run_rows(
    found: Rows[R], work: Callable[[R], Awaitable[object]], *, done: str, failed_file: Path | None, limit: int
) -> int:
    """Calls `work` for each row, at most `limit` at a time, and returns the exit code. `work` raises Failed for a row
    that fails; `done` names the others in the summary.

    However it ends, `failed_file` gets the rows that were not done.
    """
    slots, last_of = asyncio.Semaphore(limit), dict[str, asyncio.Task[None]]()
    outcomes: dict[int, Failed | None] = {}
    began = time.monotonic()

    async def run_row(read: _ParsedRow[R], before: Sequence[asyncio.Task[None]]) -> None:
        async with slots:  # first come, first served: who is waited for below has had one
            if before:
                await asyncio.wait(before)
            try:
                if read.row is None:
                    raise Failed(USAGE, read.error)
                await work(read.row)
                outcomes[read.number] = None
            except Failed as exc:
                outcomes[read.number] = exc

    progress = asyncio.create_task(_report_forever(len(found.rows), outcomes))
    try:
        async with asyncio.TaskGroup() as group:
            for read in found.rows:
                keys = [f"sandbox {read.row.sandbox}", f"bot {read.row.bot or read.number}"] if read.row else []
                before = [last_of[key] for key in keys if key in last_of]
                last_of |= dict.fromkeys(keys, group.create_task(run_row(read, before)))
    finally:
        progress.cancel()
        undone = Failed(NO, "Not tried, or not answered yet.")
        failed = [(read, why) for read in found.rows if (why := outcomes.get(read.number, undone))]
        if failed_file is not None:
            rows = [read.written | {"error": str(why)} for read, why in failed]
            write_private(failed_file, _format_rows(rows, found.columns))
    for read, why in failed:
        output.complain(f"line {read.number} ({read.written.get('sandbox', '?')}): {why}")
    where = f"; what failed is in {failed_file}" if failed and failed_file else ""
    summary = f"{len(found.rows) - len(failed)} {done}, {len(failed)} failed, in {time.monotonic() - began:.1f} s"
    print(f"{summary}{where}.", file=sys.stderr, flush=True)
    codes = {why.code for _, why in failed}
    return OK if not codes else codes.pop() if len(codes) == 1 else NO


async def _report_forever(total: int, outcomes: dict[int, Failed | None]) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        said = f"{len(outcomes)} of {total}, {sum(why is not None for why in outcomes.values())} failed"
        print(said, file=sys.stderr, flush=True)


def _format_rows(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """As `read_rows` reads them."""
    if not columns:
        return "".join(msgspec.json.encode(row).decode() + "\n" for row in rows)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*columns, "error"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
