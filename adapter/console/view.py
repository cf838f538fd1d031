"""The data that the console's pages show, without secrets but the QR code of the login that is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from adapter.contract.messages import BindingInfo, BotStatus, Login
from adapter.ownership.replica_status import ReplicaStatus
from adapter.services.dead_letters import DeadLetter

PAGE = 50
"""Bindings, or dead letters, on a page."""


class BindingFilter(NamedTuple):
    """Which bindings are asked for."""

    words: str = ""
    """Part of a sandbox, bot or user."""
    state: str = ""
    """A status; "" for all."""
    page: int = 1


class BindingsOverview(NamedTuple):
    """Bindings as they are asked for, and all in numbers."""

    rows: list[BindingInfo]
    """With their health."""
    matching: int
    pages: int
    bindings: int
    states: Mapping[BotStatus, int]
    """How many bots are how."""


class Platform(NamedTuple):
    """Everything in numbers, for the head of each page."""

    replicas: list[ReplicaStatus]
    expected: int
    """Replicas that live, as far as is known; fewer may have answered."""
    dead: int
    logins: int


class DeadPage(NamedTuple):
    """Dead letters, newest first."""

    letters: list[tuple[DeadLetter, bool]]
    """Each, and whether it can be tried again."""
    total: int
    older: int | None
    """Ask for those before this sequence; None: there are none."""


class OpenLogin(NamedTuple):
    """A login that is not over, without its code."""

    handle: str
    sandbox: str
    status: str
    changed_ms: int
    until_ms: int


class ShownLogin(NamedTuple):
    """A login with its code, as an operator shows it to a person."""

    handle: str
    login: Login
    picture: str
    """The code as inline SVG, or as an `img`; "" where there is none to scan."""
