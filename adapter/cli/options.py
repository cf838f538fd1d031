"""Arguments that several commands share, with their help texts and checks."""

from __future__ import annotations

from typing import Annotated
from uuid import uuid4

from cyclopts import Parameter, validators

from adapter.contract.names import check_sandbox
from adapter.errors import Refused

POSITIVE = validators.Number(gt=0)


def _legal_sandbox(_: object, value: str | None) -> None:
    try:
        if value is not None:
            check_sandbox(value)
    except Refused as exc:
        raise ValueError(exc.detail) from None


def flag(text: str, *, name: str | list[str] | None = None, metavar: str | None = None) -> Parameter:
    """An option without a negative form: one without a value, or one that may be given several times."""
    return Parameter(name=name, negative="", show_default=False, help=text, metavar=metavar)


Sandbox = Annotated[str, Parameter(validator=_legal_sandbox, help="Id of the sandbox.")]
MaybeSandbox = Annotated[
    str | None, Parameter(validator=_legal_sandbox, metavar="SANDBOX", help="Id of the sandbox; default: all.")
]
Json = Annotated[bool, flag("One JSON object per line.", name="--json")]
AutoTyping = Annotated[bool, flag("Show that the bot types from each message to the answer.")]
Timeout = Annotated[float, Parameter(validator=POSITIVE, metavar="SECONDS", help="Seconds to wait for the outcome.")]
RequestId = Annotated[
    str | None,
    Parameter(
        name="--id", metavar="ID", help="Idempotency key: the same id again has no second effect. Default: a new one."
    ),
]
ReceiptId = Annotated[str | None, Parameter(name="--id", metavar="ID", help="Id in the receipt. Default: a new one.")]


def new_id() -> str:
    return f"cli-{uuid4()}"
