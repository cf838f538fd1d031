"""The result of one check of `doctor`."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

State: TypeAlias = Literal["ok", "warn", "fail"]


class Check(msgspec.Struct, frozen=True):
    """`say` tells what to do unless all is well."""

    check: str
    state: State
    say: str
