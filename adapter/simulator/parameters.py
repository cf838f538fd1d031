"""The `params` that each fault accepts (README, Faults). A misspelt parameter is an error."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

GARBLED = ("malformed", "truncated", "html", "empty", "wrong_type")
CHANGES = frozenset(
    {
        "same",
        "message_id",
        "client_id",
        "no_message_id",
        "zero_message_id",
        "empty_message_id",
        "context_token",
        "ids",
        "all",
    }
)
"""The changes of a repeated message (fault `F16`). `ids`: all ids and the context token; `all`: also the times."""

Status = Annotated[int, Meta(ge=200, le=599)]
Duration = Annotated[float, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]

PARAMETERS: dict[str, dict[str, Any]] = {
    "F1": {"status": Status, "body": str, "after_ms": Duration},
    "F2": {"status": Status, "body": str, "after_ms": Duration},
    "F3": {"kind": GARBLED, "processed": bool, "after_ms": Duration},
    "F4": {"chunk": Positive, "pause_ms": Duration},
    "F5": {"hang_ms": Duration, "processed": bool},
    "F6": {"when": ("before", "after"), "after_ms": Duration, "consumed": bool},
    "F10": {"text": str},
    "F11": {
        **{"errmsg": str | None, "errmsgs": list[str | None], "code": int, "field": ("ret", "errcode")},
        "until_notifystart": bool,
    },
    "F12": {"penalty_s": Duration, "errmsg": str | None, "burst": NotNegative, "burst_s": Duration},
    "F13": {"shown": bool},
    "F14": {"body": ("object", "empty"), "shown": bool},
    "F15": {"delay_s": Duration},
    "F16": {"change": CHANGES, "delay_s": Duration},
    "F18": {"last": Positive},
    "F19": {"cursor": ("empty", "absent")},
    "F20": {"order": ("reversed", "same")},
    "F21": {"hint": Any},
    "F23": {"redirect_host": Any, "baseurl": Any},
    "F24": {"kind": ("rejected", "error", "no_header", "down"), "status": Status, "message": str, "code": Any},
    "F25": {"kind": ("status", "wrong_key", "odd_length"), "status": Status},
    "F26": {"ret": int, "errmsg": str | None},
    "F27": {"kind": ("expired", "blocked", "wrong_code", "no_bot_id")},
}
"""By fault and parameter: the type, or the accepted words. Other faults have no parameters."""
NEEDED = {"F23": ("redirect_host", "baseurl"), "F27": ("kind",)}
"""By fault: parameters of which at least one is required."""


def check(fault: str, params: dict[str, Any]) -> None:
    """Raises ValueError with the name of the wrong parameter."""
    known = PARAMETERS.get(fault, {})
    if unknown := params.keys() - known:
        raise ValueError(f"{fault} has no {', '.join(sorted(unknown))}; it has {', '.join(known) or 'no parameters'}")
    if (needed := NEEDED.get(fault)) and params.keys().isdisjoint(needed):
        raise ValueError(f"{fault} needs {' or '.join(needed)}")
    for name, value in params.items():
        _check_one(f"{name} of {fault}", value, known[name])


def _check_one(name: str, value: Any, allowed: Any) -> None:
    if isinstance(allowed, tuple | frozenset):
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name} is one of {', '.join(sorted(allowed))}")
        return
    try:
        msgspec.convert(value, allowed)
    except msgspec.ValidationError as exc:
        raise ValueError(f"{name}: {exc}") from exc
