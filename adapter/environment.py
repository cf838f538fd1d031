"""Reads Settings from a mapping such as the environment, reporting all faults at once. Never reads `os.environ`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec

from adapter.errors import SettingsError
from adapter.settings import PREFIX, SECRETS, Settings, split_addr, variable_of

TOKEN_KEY = variable_of("token_key")
_FILES = ("nats_creds", "nats_nkey", "nats_ca", "nats_cert", "nats_key")
_BASE_URLS = ("ilink_base_url", "cdn_base_url")
_HOST = r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+)"
_BASE_URL = rf"https?://{_HOST}(:\d{{1,5}})?(/[^\s?#@]*)?", "https://host[/path] without query or password"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_PRODUCT = r"[A-Za-z0-9_.-]{1,32}/[A-Za-z0-9_.+-]{1,32}( \([ -'*-~]{1,64}\))?"
"""Of the official client's `bot_agent` (docs/reference/ilink-protocol.md, "base_info")."""
_FORMATS = {
    "nats_url": (
        rf"((nats|tls|ws|wss)://)?([^\s/]+@)?{_HOST}(:\d{{1,5}})?/?",
        "nats://host:port, tls://, ws:// or wss://, several separated by commas",
    ),
    "allowed_hosts": (rf"{_HOST}(:\d{{1,5}})?", "host or host:port, several separated by commas"),
    "ilink_base_url": _BASE_URL,
    "cdn_base_url": _BASE_URL,
    "ilink_version": (rf"{_BYTE}\.{_BYTE}\.{_BYTE}", "major.minor.patch, each 0 to 255, such as 2.4.9"),
    "ilink_agent": (
        rf"(?=.{{1,256}}\Z){_PRODUCT}( {_PRODUCT})*",
        "Name/version (comment) of one or several products, 256 characters at most",
    ),
    "ilink_route_tag": (r"[!-~]{1,256}", "printable ASCII characters without spaces"),
    "console_token": (r"(?s).{16,}", "16 characters or more (openssl rand -hex 16)"),
}
"""What a type cannot say of a text, or of each of several: a pattern, and the same in words."""
_KEYS = "base64 of 32 bytes (openssl rand -base64 32), several separated by commas"


def read_settings(environ: Mapping[str, str], *, adapter: bool = False) -> Settings:
    """The settings in `environ`; a variable that is empty counts as absent. `adapter`: with what an adapter needs.

    Raises SettingsError("invalid_settings"), whose text names every variable at fault, one per line.
    """
    faults: list[str] = []
    values: dict[str, Any] = {}
    hints = get_type_hints(Settings, include_extras=True)
    for field in Settings.__struct_fields__:
        try:
            if raw := _raw_value(field, environ):
                values[field] = _parse_value(field, hints[field], raw)
        except ValueError as exc:
            faults.append(f"{variable_of(field)}: {exc}")
    values.setdefault("language", "zh" if _locale(environ).startswith("zh") else "en")
    settings = Settings(**values)
    faults += _find_contradictions(settings, environ)
    if adapter and not settings.token_key and not any(fault.startswith(TOKEN_KEY) for fault in faults):
        faults.append(
            f"{TOKEN_KEY}: expected a key, which seals bot tokens at rest; keep it: openssl rand -base64 32"
        )
    faults += _unknown_variables(environ)
    if faults:
        raise SettingsError("invalid_settings", "\n".join(faults))
    return settings


def _locale(environ: Mapping[str, str]) -> str:
    """The locale of messages, by the first variable that POSIX asks; "" for none."""
    return next(filter(None, map(environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")


def _raw_value(field: str, environ: Mapping[str, str]) -> str:
    """What the environment, or for a secret its file, says; "" if nothing. Raises ValueError."""
    variable = variable_of(field)
    raw = environ.get(variable, "").strip()
    path = environ.get(f"{variable}_FILE", "").strip() if field in SECRETS else ""
    if not path:
        return raw
    if raw:
        raise ValueError(f"expected either {variable} or {variable}_FILE, not both")
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise ValueError(f"expected {variable}_FILE to name a readable file, cannot read {path!r}: {why}") from exc
    if not text:
        raise ValueError(f"expected {variable}_FILE to name a file with the secret, {path!r} is empty")
    return text


def _parse_value(field: str, kind: Any, raw: str) -> Any:
    """The value of one field. Raises ValueError, whose text holds no secret."""
    is_list = get_origin(kind) is tuple
    parts = [part.strip() for part in raw.split(",") if part.strip()] if is_list else [raw]
    pattern, words = _FORMATS.get(field, (r"(?s).*", _KEYS if field == "token_key" else _in_words(kind)))
    hidden = field in SECRETS or field == "nats_url" or "@" in raw  # a URL may hold a password
    shown = "" if hidden else f", got {raw[:100]!r}"
    try:
        value = msgspec.convert(parts if is_list else raw, kind, strict=False)
    except msgspec.ValidationError as exc:
        raise ValueError(f"expected {words}{shown}") from exc
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if not (parts and is_finite and all(re.fullmatch(pattern, part) for part in parts)):
        raise ValueError(f"expected {words}{shown}")
    if field in ("http_addr", "console_addr"):
        split_addr(raw)
    if field in _FILES:
        path = Path(raw).expanduser()
        if not path.is_file():
            raise ValueError(f"expected a file, there is none at {raw!r}")
        return str(path)
    return value.rstrip("/") if field in _BASE_URLS else value


def _in_words(kind: Any) -> str:
    """A type by its JSON Schema: "integer, minimum 1"."""
    schema = msgspec.json.schema(kind)
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    return ", ".join(str(value) if name == "type" else f"{name} {value}" for name, value in schema.items())


def _find_contradictions(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    """Values that are right alone and wrong together."""
    for field in _BASE_URLS:
        parts = urlsplit(getattr(settings, field))
        allowed = {parts.hostname, parts.netloc} & set(settings.allowed_hosts)
        if parts.scheme == "http" and not allowed:
            yield (
                f"{variable_of(field)}: expected https://, or a host that {PREFIX}ALLOWED_HOSTS names,"
                f" got http://{parts.netloc}"
            )
    if settings.in_max_age_h < (least := settings.window_hours + 1):  # an entry has the window that it opened
        yield (
            f"{variable_of('in_max_age_h')}: expected at least {least:g}, an hour more than"
            f" {variable_of('window_hours')}, got {settings.in_max_age_h:g}"
        )
    given = {name.removesuffix("_FILE") for name, value in environ.items() if value.strip()}
    for one, other in (
        ("NATS_CERT", "NATS_KEY"),
        ("NATS_KEY", "NATS_CERT"),
        ("NATS_PASSWORD", "NATS_USER"),
        (f"{PREFIX}CONSOLE_ADDR", f"{PREFIX}CONSOLE_TOKEN"),
    ):
        if one in given and other not in given:
            yield f"{other}: expected a value, since {one} has one"
    asks = next((field for field in ("nats_ca", "nats_cert", "nats_tls_first") if getattr(settings, field)), None)
    if asks and any(url.startswith("ws:") for url in settings.nats_url):
        yield f"NATS_URL: expected wss:// instead of ws://, which has no TLS, since {variable_of(asks)} asks for it"


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """Names that start like ours and are none, most likely typing errors."""
    known = {variable_of(field) for field in Settings.__struct_fields__}
    known |= {f"{variable_of(field)}_FILE" for field in SECRETS}
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            yield f"{name}: no such setting" + (f", did you mean {near[0]}?" if near else "")
