"""Arguments that several commands share, with their help texts and checks."""

from __future__ import annotations

import re
import time
from typing import Annotated
from uuid import uuid4

from cyclopts import Parameter, validators

from adapter.contract.names import check_sandbox
from adapter.errors import Refused

POSITIVE = validators.Number(gt=0)
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def _legal_sandbox(_: object, value: str | None) -> None:
    try:
        if value is not None:
            check_sandbox(value)
    except Refused as exc:
        raise ValueError(exc.detail) from None


def _legal_age(_: object, value: str | None) -> None:
    if value is not None:
        seconds(value)


def flag(text: str, *, name: str | list[str] | None = None, metavar: str | None = None) -> Parameter:
    """An option without a negative form: one without a value, or one that may be given several times."""
    return Parameter(name=name, negative="", show_default=False, help=text, metavar=metavar)


Sandbox = Annotated[str, Parameter(validator=_legal_sandbox, help="Id of the sandbox.")]
MaybeSandbox = Annotated[
    str | None, Parameter(validator=_legal_sandbox, metavar="SANDBOX", help="Id of the sandbox; default: all.")
]
RowSandbox = Annotated[
    str | None, Parameter(validator=_legal_sandbox, help="Id of the sandbox. With --from it stands in the rows.")
]
Json = Annotated[bool, flag("One JSON object per line.", name="--json")]
AutoTyping = Annotated[bool, flag("Show that the bot types from each message to the answer.")]
Timeout = Annotated[float, Parameter(validator=POSITIVE, metavar="SECONDS", help="Seconds to wait for the outcome.")]
Age = Annotated[
    str | None, Parameter(validator=_legal_age, metavar="AGE", help="Start this long ago: 30s, 10m, 2h, 3d.")
]
RequestId = Annotated[
    str | None,
    Parameter(
        name="--id", metavar="ID", help="Idempotency key: the same id again has no second effect. Default: a new one."
    ),
]


def seconds(duration: str) -> float:
    """`10m` as 600. Raises ValueError."""
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise ValueError("Expected a duration such as 30s, 10m, 2h or 3d.")
    return float(match[1]) * _UNITS_S[match[2]]


def moment(age: str) -> int:
    """Unix milliseconds `age` ago, by this machine's clock."""
    return int((time.time() - seconds(age)) * 1000)


def new_id() -> str:
    return f"cli-{uuid4()}"
