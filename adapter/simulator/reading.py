"""Reads values from outside as typed values. An error names the value and what it may be."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct, structs

from adapter.simulator.records import Json, SimulatorError

T = TypeVar("T", bound=Struct)


def read(values: Json, kind: type[T]) -> T:
    """Accepts numbers and booleans in quotes, as a query has them. Raises SimulatorError."""
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as exc:
        raise SimulatorError(_explain(str(exc), kind)) from exc


def call(method: Callable[..., Any], values: Json) -> Any:
    """Calls `method` with `values`, which must fit its signature. Raises SimulatorError."""
    kind = _arguments_of(getattr(method, "__func__", method))
    return method(**(values if kind is None else structs.asdict(read(values, kind))))


@functools.cache
def _arguments_of(function: Callable[..., Any]) -> type[Struct] | None:
    hints = get_type_hints(function, include_extras=True)
    fields: list[Any] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            return None
        if name != "self":
            default = () if parameter.default is parameter.empty else (parameter.default,)
            fields.append((name, hints[name], *default))
    return msgspec.defstruct("Arguments", fields, kw_only=True, forbid_unknown_fields=True)


def _explain(problem: str, kind: type[Struct]) -> str:
    """The message of msgspec in the simulator's order: the name, the problem, the accepted values."""
    problem, _, place = problem.partition(" - at `$.")
    name = place.rstrip("`")
    if "unknown field" in problem:
        return f"{problem}, there are {', '.join(kind.__struct_fields__) or 'none'}"
    hint = get_type_hints(kind).get(name)
    choices = f", there are {', '.join(get_args(hint))}" if get_origin(hint) is Literal else ""
    return f"{name}: {problem}{choices}" if name else problem
