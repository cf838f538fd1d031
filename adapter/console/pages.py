"""The console's pages as HTML. Everything that is shown is escaped; nothing is asked or changed here."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from adapter import __version__
from adapter.console.languages import LANGUAGES, Language
from adapter.contract.messages import BotStatus
from adapter.tools.logs import escape_invisible

STATUS_NAMES: dict[BotStatus, str] = {
    "not_polled": "not polled",
    "too_new": "of a newer version",
    "failing": "failing",
    "needs_login": "needs a login",
    "unknown": "not known",
    "stale": "token refused",
    "paused": "paused",
    "retrying": "retrying",
    "waiting": "waiting",
    "storing": "active",
    "polling": "active",
}
PLENTY = 3
"""Sends left from which on nobody needs to worry."""


class Pages:
    """Renders templates. `now_ms` is passed with each page: ages are counted from there."""

    def __init__(self) -> None:
        self._templates = {name: _templates(language) for name, language in LANGUAGES.items()}

    def render(self, page: str, language: str, **values: Any) -> bytes:
        """`page`: the template's name without its suffix; `language`: a key of LANGUAGES."""
        return self._templates[language].get_template(f"{page}.html").render(values).encode()


def _templates(language: Language) -> Environment:
    made = Environment(
        loader=PackageLoader("adapter.console"),
        autoescape=True,
        finalize=_make_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"moment": moment, "size": size, "iso": iso}
    made.tests["past"] = lambda value, now_ms: value <= now_ms
    made.globals |= {"version": __version__, "query": query, "svg": Markup, "plenty": PLENTY, "_": language}
    made.globals["status_names"] = STATUS_NAMES
    return made


def _make_visible(value: Any) -> Any:
    """What is foreign in a page: what nobody sees is made visible; markup of ours stays."""
    return escape_invisible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def moment(then_ms: int) -> str:
    """A time as people read it."""
    return datetime.fromtimestamp(then_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def iso(then_ms: int) -> str:
    """A time as machines read it."""
    return datetime.fromtimestamp(then_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def size(number: int) -> str:
    """Bytes."""
    if number < 1024:
        return f"{number} B"
    return f"{number / 1024:.0f} KiB" if number < 1024 * 1024 else f"{number / 1024 / 1024:.1f} MiB"


def query(**values: Any) -> str:
    """A query string of what is set; "" if nothing is."""
    given = {name: value for name, value in values.items() if value}
    return f"?{urlencode(given)}" if given else ""
