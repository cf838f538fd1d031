"""Every setting, its variable and what it means, and how they are read from a mapping such as the environment.

`read_settings` reports all faults at once. Nothing here reads `os.environ`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from adapter.errors import SettingsError

PREFIX = "WECHAT_NATS_"
SECRETS = frozenset({"nats_password", "nats_token", "token_key", "console_token"})
"""Fields that are also read from the file named by `<variable>_FILE`, and whose values are never shown."""

CREDENTIALS = (
    "nats_creds",
    "nats_nkey",
    "nats_user",
    "nats_password",
    "nats_token",
    "nats_ca",
    "nats_cert",
    "nats_key",
)
"""The fields by which a NATS server knows its client, and the client its server."""
GROUPS = {
    "nats_url": "Connections",
    "sends_per_window": "For the platform: what users and sandboxes get",
    "token_key": "For operators: keys, room, replicas and what is shown of them",
    "allowed_hosts": "For tests, the simulator and `--embedded`",
}
"""Who turns which settings: the first field of each group, and its title in the reference."""
NEWEST_ILINK_VERSION = "2.4.9"
"""Of Tencent's plugin openclaw-weixin, 2026-09-17 (docs/reference/ilink-protocol.md, "Version timeline")."""
_PASSWORD = re.compile(r"//[^/@,\s]*@")
AtLeast0 = Annotated[int, Meta(ge=0)]
AtLeast1 = Annotated[int, Meta(ge=1)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How one replica runs. Made by `read_settings`; a test may build it directly."""

    # connections ---------------------------------------------------------------------------------------

    nats_url: tuple[str, ...] = ("nats://127.0.0.1:4222",)
    """NATS servers, separated by commas; `tls://` in one turns TLS on for all."""

    nats_creds: str = ""
    """Credentials file (JWT and seed) for NATS."""

    nats_nkey: str = ""
    """File with the NKey seed for NATS."""

    nats_user: str = ""
    """User name for NATS."""

    nats_password: str = ""
    """Password for NATS; secret."""

    nats_token: str = ""
    """Token for NATS; secret."""

    nats_ca: str = ""
    """File with the certificates (PEM) that sign the NATS server's; turns TLS on."""

    nats_cert: str = ""
    """Client certificate file (PEM) for NATS; needs `NATS_KEY`."""

    nats_key: str = ""
    """Private key file (PEM) of the client certificate; needs `NATS_CERT`."""

    nats_tls_first: bool = False
    """Encrypt from the first byte: for a server whose `tls` block says `handshake_first`."""

    nats_inbox_prefix: Annotated[str, Meta(pattern=r"^_INBOX[A-Za-z0-9_-]{0,80}\Z")] = "_INBOX"
    """Where answers come back. With permissions each role has a place of its own, such as `_INBOX_adapter`."""

    prefix: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,31}\Z")] = "wechat"
    """First token of every subject, prefix of streams and buckets. Another prefix is another, empty bus."""

    ilink_base_url: str = "https://ilinkai.weixin.qq.com"
    """iLink API base, used where a binding names none, and for QR codes."""

    cdn_base_url: str = "https://novac2c.cdn.weixin.qq.com/c2c"
    """Base of iLink's media URLs."""

    ilink_version: str = NEWEST_ILINK_VERSION
    """Version of Tencent's plugin openclaw-weixin that each request declares (`channel_version`,
    `iLink-App-ClientVersion`). WeChat refuses the QR codes of versions that it calls old: raise it then."""

    ilink_agent: str = ""
    """`bot_agent` of each request, for Tencent's statistics, such as `MyPlatform/1.0 (team@example.org)`; empty:
    `wechat-nats/` and its version."""

    ilink_route_tag: str = ""
    """Header `SKRouteTag` of each request, if Tencent gave you one; empty: it is not sent."""

    # platform ------------------------------------------------------------------------------------------

    sends_per_window: Annotated[int, Meta(ge=0, le=32)] = 10
    """Sends after an inbound message before commands are parked, 32 at most; 0: do not count. Clients measured
    that iLink refuses the eleventh (-2): do not raise it above 10."""

    window_hours: Annotated[float, Meta(gt=0, le=96)] = 23.0
    """Hours after an inbound message in which sends are tried. iLink closes at 24, the rest is safety: more is for
    `acceptance --late` alone."""

    park_hours: Annotated[float, Meta(gt=0)] = 72.0
    """Hours that a parked command may wait for its user; longer: refused as `expired`."""

    send_gap_ms: AtLeast0 = 1500
    """Least pause between two sends to one user, in milliseconds. Shorter provokes iLink's throttling (-2)."""

    send_timeout_s: Annotated[float, Meta(gt=0)] = 15.0
    """Seconds that a send waits for iLink's answer. It is repeated once, as soon as iLink answers somebody; then its
    command ends as `uncertain`."""

    part_chars: Annotated[int, Meta(ge=100, le=16384)] = 1800
    """Longest text that is sent as one message, in characters. Longer ones are sent in parts, ten at most, and each
    costs a send. Phones are reported to cut texts near 2,000 characters although iLink accepted them."""

    part_bytes: Annotated[int, Meta(ge=400, le=16384)] = 16384
    """The same in bytes of UTF-8: what iLink accepts. 2000 if a phone cuts Chinese texts near 680 characters."""

    merge_chars: AtLeast0 = 3000
    """Parked texts of one user are sent as one message up to so many characters, if one part may have as many; 0:
    each on its own."""

    media_max_bytes: Annotated[int, Meta(ge=1)] = 104857600
    """Largest media, in bytes, both ways. A larger one of a user is named and not fetched, one of a sandbox
    refused."""

    media_hours: Annotated[float, Meta(ge=1)] = 168.0
    """Hours that media are kept in the object store."""

    in_max_per_person: AtLeast1 = 10000
    """Answers of iLink with messages that are kept per person; the oldest go first. Most bring one message."""

    in_max_age_h: Annotated[float, Meta(gt=0)] = 72.0
    """Hours that inbound messages are kept for `next` and replay: at least an hour more than
    `WECHAT_NATS_WINDOW_HOURS`."""

    out_max_per_sandbox: AtLeast1 = 10000
    """Unsent commands kept per sandbox; one more is refused to its publisher."""

    language: Literal["zh", "en"] = "en"
    """Language of what the agent's side itself tells persons: that something failed, the help, the welcome. Unset:
    Chinese if `LC_ALL`, `LC_MESSAGES` or `LANG` says so, else English."""

    # operators -----------------------------------------------------------------------------------------

    token_key: tuple[Annotated[bytes, Meta(min_length=32, max_length=32)], ...] = ()
    """Keys that seal bot tokens at rest, separated by commas: 32 bytes each, in base64. The first seals, all open.

    Secret. An adapter needs one (`openssl rand -base64 32`). Of other commands, `doctor`, `dead show` and
    `export` open with it what is sealed.
    """

    replicas: Literal[1, 3, 5] = 1
    """Copies of streams and buckets in the NATS cluster. With 1, a lost NATS disk loses messages."""

    partitions: Annotated[int, Meta(ge=1, le=32)] = 32
    """Parts that the sandboxes are cut into; each has one owner, so as many replicas have work. `--embedded`, `start`
    and `demo` have 1. It is changed by `doctor --fix`, while no adapter runs and no command waits."""

    in_max_bytes: Annotated[int, Meta(ge=-1)] = 10737418240
    """Size of the inbound stream in bytes; the oldest messages go first. -1: as large as the server allows.

    Commands have half of it in a stream of their own, dead letters a tenth.
    """

    media_store_bytes: Annotated[int, Meta(ge=-1)] = 10737418240
    """Size of the object store in bytes. -1: as large as the server allows."""

    capacity: AtLeast1 = 10000
    """Bindings that this replica serves at most; the rest waits for another replica."""

    lease_s: Annotated[float, Meta(ge=0.5)] = 4.0
    """Seconds of silence after which a replica loses its partitions to the others."""

    drain_s: Annotated[float, Meta(ge=0)] = 50.0
    """Longest time between SIGTERM and exit, in seconds; longer than a long poll, so that no poll has to be cut."""

    http_addr: str = "127.0.0.1:9464"
    """`host:port` of `/metrics`, `/livez`, `/readyz`, `/startupz`; no host: all interfaces, port 0: any free one."""

    console_addr: str = ""
    """`host:port` of the console, a page for operators; empty: there is none. Keep it on loopback or behind TLS."""

    console_token: str = ""
    """What the console asks for: 16 characters or more; secret."""

    log: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""

    # tests and the simulator ---------------------------------------------------------------------------

    allowed_hosts: tuple[str, ...] = ()
    """Extra `host` or `host:port` that may be called, also by plain http and on loopback: for simulator and tests."""

    data_dir: Annotated[str, Meta(min_length=1)] = "./data"
    """Where `--embedded` keeps its JetStream."""

    def __repr__(self) -> str:
        """All fields, except that secrets that are set read `***`: a repr ends in logs and tracebacks."""
        shown = ", ".join(
            f"{name}={'***' if name in SECRETS and value else _PASSWORD.sub('//***@', repr(value))}"
            for name, value in ((name, getattr(self, name)) for name in self.__struct_fields__)
        )
        return f"Settings({shown})"


def variable_of(field: str) -> str:
    """The environment variable of a field of `Settings`."""
    return field.upper() if field.startswith("nats_") else PREFIX + field.upper()


def split_addr(addr: str) -> tuple[str, int]:
    """Host and port of `host:port`, `:port` or `[v6]:port`. Raises ValueError."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9_.-]*)):(\d{1,5})", addr)
    if match is None or int(match[3]) > 65535:
        raise ValueError(f"expected host:port, got {addr!r}")
    return match[1] or match[2] or "", int(match[3])


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
