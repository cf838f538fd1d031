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
from adapter.cli.exit_codes import NO, OK, USAGE, Failed
from adapter.cli.files import read_text, write_private
from adapter.contract.messages import SandboxId

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

NAMED = 20
"""Failures that are said one by one; all are in the file."""
TICK_S, LINE_S = 0.1, 5.0
"""Between two reports of the progress on a terminal, and elsewhere."""


class Row(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What all rows may have. `error`: why it failed before; it is not read."""

    sandbox: SandboxId
    bot: str | None = None
    error: str = ""


R = TypeVar("R", bound=Row)


class _Read(NamedTuple, Generic[R]):
    """A row as it was written, and as it is read; or why it cannot be."""

    number: int
    written: dict[str, Any]
    row: R | None
    error: str


class Rows(NamedTuple, Generic[R]):
    """What a file holds."""

    rows: list[_Read[R]]
    columns: list[str]
    """Of CSV; none: the rows are JSON lines."""


def read_rows(source: Path, kind: type[R]) -> Rows[R]:
    """Raises Failed where the file cannot be read; a row that cannot be has its error."""
    text = sys.stdin.read() if str(source) == "-" else read_text(source)
    if text.lstrip().startswith("{"):
        lines = enumerate(text.split("\n"), 1)
        return Rows([_read_line(number, line, kind) for number, line in lines if line.strip()], [])
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="more", skipinitialspace=True)
    rows = []
    for cells in reader:
        written = {name: cell for name, cell in cells.items() if cell}
        rows.append(_read_row(reader.line_num, written, kind))
    return Rows(rows, [name for name in reader.fieldnames or [] if name != "error"])


def _read_line(number: int, line: str, kind: type[R]) -> _Read[R]:
    try:
        written = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.MsgspecError:
        return _Read(number, {"line": line}, None, "The line is no JSON object.")
    return _read_row(number, written, kind)


def _read_row(number: int, written: dict[str, Any], kind: type[R]) -> _Read[R]:
    try:
        return _Read(number, written, msgspec.convert(written, kind, strict=False), "")
    except msgspec.ValidationError as exc:
        return _Read(number, written, None, f"{exc}.")


async def run_rows(
    found: Rows[R], work: Callable[[R], Awaitable[object]], *, done: str, failed_file: Path | None, limit: int
) -> int:
    """Does `work` for each row, which raises Failed; the exit code. `done` says what has become of the others.

    At most `limit` rows are under way. However it ends, what was not done is in `failed_file`.
    """
    slots, last_of = asyncio.Semaphore(limit), dict[str, asyncio.Task[None]]()
    failures: dict[int, Failed] = {}
    began, finished = time.monotonic(), set[int]()

    async def run_row(read: _Read[R], before: Sequence[asyncio.Task[None]]) -> None:
        async with slots:  # first come, first served: who is waited for below has had one
            if before:
                await asyncio.wait(before)
            try:
                if read.row is None:
                    raise Failed(USAGE, read.error)
                await work(read.row)
            except Failed as exc:
                failures[read.number] = exc
            finished.add(read.number)

    progress = asyncio.create_task(_report_forever(len(found.rows), finished, failures))
    try:
        async with asyncio.TaskGroup() as group:
            for read in found.rows:
                keys = [f"sandbox {read.row.sandbox}", f"bot {read.row.bot or read.number}"] if read.row else []
                before = [last_of[key] for key in keys if key in last_of]
                last_of |= dict.fromkeys(keys, group.create_task(run_row(read, before)))
    finally:
        progress.cancel()
        missing = {
            read.number: "Not tried, or not answered yet." for read in found.rows if read.number not in finished
        }
        errors = {number: str(exc) for number, exc in failures.items()} | missing
        if failed_file is not None:
            _write_failed(failed_file, found, errors)
    for read in [read for read in found.rows if read.number in errors][:NAMED]:
        output.complain(f"line {read.number} ({read.written.get('sandbox', '?')}): {errors[read.number]}")
    more = f"; {len(errors) - NAMED} failures more" if len(errors) > NAMED else ""
    where = f"; what failed is in {failed_file}" if errors and failed_file else ""
    summary = f"{len(found.rows) - len(errors)} {done}, {len(errors)} failed, in {time.monotonic() - began:.1f} s"
    print(f"{summary}{more}{where}.", file=sys.stderr, flush=True)
    codes = {exc.code for exc in failures.values()}
    return OK if not codes else codes.pop() if len(codes) == 1 else NO


async def _report_forever(total: int, finished: set[int], failures: dict[int, Failed]) -> None:
    is_terminal = output.can_style(sys.stderr)
    try:
        while True:
            await asyncio.sleep(TICK_S if is_terminal else LINE_S)
            said = f"{len(finished)} of {total}, {len(failures)} failed"
            print(
                f"\r\x1b[K{said}" if is_terminal else said,
                end="" if is_terminal else "\n",
                file=sys.stderr,
                flush=True,
            )
    finally:
        if is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _write_failed(path: Path, found: Rows[R], errors: dict[int, str]) -> None:
    """Only its owner may read it: tokens stand in it. Raises Failed."""
    text = io.StringIO(newline="")
    failed = [read.written | {"error": errors[read.number]} for read in found.rows if read.number in errors]
    if found.columns:
        writer = csv.DictWriter(text, [*found.columns, "error"], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(failed)
    else:
        text.writelines(msgspec.json.encode(row).decode() + "\n" for row in failed)
    write_private(path, text.getvalue())
