"""Reads Settings from a mapping such as the environment, reporting all faults at once. Never reads `os.environ`."""

from __future__ import annotations

import base64
import binascii
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit

import msgspec

from adapter.errors import SettingsError
from adapter.settings import PREFIX, SECRETS, Settings, split_addr, variable_of

SHORTEST_TOKEN = 16
"""Least length of the console's token, in characters: enough that nobody guesses it."""
TOKEN_KEY = variable_of("token_key")
_FILES = ("nats_creds", "nats_nkey", "nats_ca", "nats_cert", "nats_key")
_BASE_URLS = ("ilink_base_url", "cdn_base_url")


def read_settings(environ: Mapping[str, str], *, adapter: bool = False) -> Settings:
    """The settings in `environ`; a variable that is empty counts as absent. `adapter`: with what an adapter needs.

    Raises SettingsError("invalid_settings"), whose text names every variable at fault, one per line.
    """
    faults: list[str] = []
    values: dict[str, Any] = {}
    for field, kind in _field_types().items():
        variable = variable_of(field)
        try:
            raw = _raw_value(field, environ)
            if raw:
                values[field] = _parse_value(field, kind, raw)
        except ValueError as exc:
            faults.append(f"{variable}: {exc}")
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


def _field_types() -> dict[str, Any]:
    hints = get_type_hints(Settings, include_extras=True)
    return {field: hints[field] for field in Settings.__struct_fields__}


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
    if field == "token_key":
        return tuple(_token_key(part) for part in _split_list(raw))
    info = msgspec.inspect.type_info(kind)
    plain: Any = _split_list(raw) if isinstance(info, msgspec.inspect.VarTupleType) else raw
    try:
        value = msgspec.convert(plain, kind, strict=False)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("not finite")
    except (msgspec.ValidationError, ValueError) as exc:
        raise ValueError(f"expected {_describe_type(info)}{_describe_value(field, raw)}") from exc
    _check_value(field, value)
    if field in _FILES:
        return str(Path(value).expanduser())
    return value.rstrip("/") if field in _BASE_URLS else value


def _check_value(field: str, value: Any) -> None:
    """What a type cannot say. Raises ValueError."""
    match field:
        case "nats_url":
            if not value:
                raise ValueError("expected at least one server")
            if not all(_is_server(url) for url in value):  # a URL may hold a password: it is never shown
                raise ValueError("expected nats://host:port, tls://, ws:// or wss://, several separated by commas")
        case "allowed_hosts":
            for host in value:
                if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+)(:\d{1,5})?", host):
                    raise ValueError(f"expected host or host:port, several separated by commas, got {host!r}")
        case "console_token":
            if len(value) < SHORTEST_TOKEN:
                raise ValueError(f"expected {SHORTEST_TOKEN} characters or more (openssl rand -hex 16)")
        case "http_addr" | "console_addr":
            try:
                split_addr(value)
            except ValueError:
                raise ValueError(f"expected host:port, got {value!r}") from None
        case "ilink_base_url" | "cdn_base_url":
            if not _is_base_url(value):
                raise ValueError("expected https://host[/path] without query or password")
        case _ if field in _FILES:
            if not Path(value).expanduser().is_file():
                raise ValueError(f"expected a file, there is none at {value!r}")


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        return parts.scheme in ("nats", "tls", "ws", "wss") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    return (
        parts.scheme in ("https", "http")
        and bool(parts.hostname)
        and not (parts.query or parts.fragment or "@" in url)
    )


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
    if 0 < settings.sends_per_window <= settings.reserve_sends:
        yield (
            f"{PREFIX}RESERVE_SENDS: expected fewer than {PREFIX}SENDS_PER_WINDOW ({settings.sends_per_window}),"
            f" got {settings.reserve_sends}"
        )
    if settings.console_addr and not settings.console_token:
        yield f"{PREFIX}CONSOLE_TOKEN: expected a value, since {PREFIX}CONSOLE_ADDR has one"
    given = {name.removesuffix("_FILE") for name, value in environ.items() if value.strip()}
    for one, other in (("NATS_CERT", "NATS_KEY"), ("NATS_KEY", "NATS_CERT"), ("NATS_PASSWORD", "NATS_USER")):
        if one in given and other not in given:
            yield f"{other}: expected a value, since {one} has one"
    asks = next((field for field in ("nats_ca", "nats_cert", "nats_tls_first") if getattr(settings, field)), "")
    if asks and any(url.startswith("ws:") for url in settings.nats_url):
        yield f"NATS_URL: expected wss:// instead of ws://, which has no TLS, since {variable_of(asks)} asks for it"


_SERVICE_LINK = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://.*")


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """Names that start like ours and are none, most likely typing errors.

    Not those that Kubernetes sets for a Service named `wechat-nats…`: WECHAT_NATS_PORT=tcp://… and its like.
    """
    known = {variable_of(field) for field in Settings.__struct_fields__}
    known |= {f"{variable_of(field)}_FILE" for field in SECRETS}
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in known:
            continue
        if _SERVICE_LINK.fullmatch(name) or (name.endswith("_PORT") and _SERVICE_URL.fullmatch(environ[name])):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        yield f"{name}: no such setting" + (f", did you mean {near[0]}?" if near else "")


def _split_list(raw: str) -> list[str]:
    return [part.strip() for part in raw.split(",") if part.strip()]


def _token_key(part: str) -> bytes:
    try:
        key = base64.b64decode(part, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise ValueError("expected base64 of 32 bytes (openssl rand -base64 32), several separated by commas")
    return key


def _describe_value(field: str, raw: str) -> str:
    return "" if field in SECRETS or field == "nats_url" else f", got {raw[:100]!r}"


def _describe_type(info: msgspec.inspect.Type) -> str:
    """A type in words."""
    match info:
        case msgspec.inspect.LiteralType(values=values):
            return "one of " + ", ".join(str(value) for value in values)
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.IntType():
            return "a whole number" + _describe_bounds(info)
        case msgspec.inspect.FloatType():
            return "a number" + _describe_bounds(info)
        case msgspec.inspect.StrType(pattern=str(pattern)):
            return "text that matches " + pattern.replace(r"\Z", "$")
        case _:
            return "text"


def _describe_bounds(info: msgspec.inspect.IntType | msgspec.inspect.FloatType) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most"}
    bounds = [f"{word} {getattr(info, key):g}" for key, word in words.items() if getattr(info, key) is not None]
    return "".join(f", {bound}" for bound in bounds)
