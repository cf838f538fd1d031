"""The bus as commands see it: a connection with a deadline, requests with an answer, stored publishes.

Everything here ends in `Failed` with a sentence; nothing waits for ever.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from nats.errors import ConnectionClosedError
from nats.errors import Error as NatsError

from adapter.agent.connection import ANSWER_S, Connection
from adapter.cli.exits import NO, UNREACHABLE, Failed
from adapter.errors import UNDECODABLE, BusRefused, Refused, SettingsError, Temporary
from adapter.jetstream.api_replies import NO_STREAM
from adapter.jetstream.client import BusClient
from adapter.jetstream.history import StreamHistory
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.ports import PubAck, StoredMessage
from adapter.settings import CREDENTIALS, Settings, read_settings

BROKE = "The connection to NATS broke: try again."

URL_FILE = "nats.url"
"""In the data folder of `run --embedded`: where its server listens, with the token that it asks for."""

SELECTED = "@selected"
"""Instead of a name: the context that `nats context select` has chosen."""
SERVER = "nats://127.0.0.1:4222"
"""That of a context without a URL, as `nats` has it."""
IDENTITIES = ("user", "creds", "nkey", "token")
"""The first one that a context has counts."""
FIELDS = ("url", "password", "ca", "cert", "key", "tls_first", "inbox_prefix")
UNSUPPORTED = ("user_jwt", "nsc", "socks_proxy", "jetstream_domain", "jetstream_api_prefix")

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")


class BusConnection(Connection):
    """A connection, and what commands do over it."""

    def __init__(self, nc: BusClient, settings: Settings) -> None:
        self._set_up(settings, nc, "wechat-nats cli", "credentials that may, see helm/nats/")
        self.connection = ManagedConnection(settings, "cli")
        """The same connection, for the adapter's code that reads streams and buckets."""
        self.history = StreamHistory(self.connection)

    async def check_subscribed(self, *subjects: str) -> None:
        """Returns once the subscriptions made so far are in force. Raises Failed if the server forbids one of
        `subjects`, or the inbox for answers."""
        try:
            answers = await self.nc.subscribe(self.nc.new_inbox())
            await self.nc.flush()
            await answers.unsubscribe()
        except (NatsError, TimeoutError):
            raise Failed(UNREACHABLE, BROKE) from None
        self.raise_if_forbidden(*subjects)

    def raise_if_forbidden(self, *subjects: str) -> None:
        """Raises Failed if the server has forbidden this user one of `subjects`, a subject below one, or the inbox
        for answers."""
        prefix = self.settings.nats_inbox_prefix
        for does, subject in self.forbidden:
            if does == "subscription" and subject.startswith(f"{prefix.lower()}."):
                raise Failed(
                    NO,
                    f"This user may not hear answers on {prefix}.>: set NATS_INBOX_PREFIX to what its role has"
                    " (_INBOX_adapter, _INBOX_operator, _INBOX_SANDBOX, …).",
                )
        try:
            if subjects:
                super().raise_if_forbidden(*subjects)
        except Refused as exc:
            raise Failed(NO, exc.detail) from None

    async def ask(
        self, verb: str, payload: bytes, headers: dict[str, str] | None = None, timeout_s: float = ANSWER_S
    ) -> tuple[bytes, dict[str, Any]]:
        """As that of agents, but raises Failed."""
        try:
            return await super().ask(verb, payload, headers, timeout_s)
        except (Refused, Temporary) as exc:
            raise Failed(NO if exc.reason in ("refused", "not_found") else UNREACHABLE, exc.detail) from None

    async def request_service(
        self, verb: str, request: msgspec.Struct, answer: type[S], timeout_s: float = ANSWER_S
    ) -> S:
        """A request to an adapter. Raises Failed."""
        data, _ = await self.ask(verb, msgspec.json.encode(request), timeout_s=timeout_s)
        return decode_answer(data, answer)

    async def store(self, subject: str, payload: bytes, headers: dict[str, str]) -> PubAck:
        """As that of agents, but raises Failed."""
        if len(payload) + sum(len(k) + len(v) + 4 for k, v in headers.items()) + 16 > self.nc.max_payload:
            raise Failed(NO, f"The message is larger than the {self.nc.max_payload} bytes that this server takes.")
        try:
            return await super().store(subject, payload, headers)
        except BusRefused as exc:
            why = f"too many messages wait on {subject}; try later" if exc.is_full else f"error {exc.detail}"
            raise Failed(NO, f"Not stored: {why}.") from None
        except (Temporary, NatsError) as exc:
            self.raise_if_forbidden(subject)
            said = f"The bus did not confirm {subject}: unclear whether it is stored, repeat with the same id."
            if isinstance(exc, Temporary) and exc.reason == "no_stream":
                fix = "start an adapter once, or run `wechat-nats doctor --fix`"
                said = f"{exc.detail[:-1]}: {fix}. Or JetStream is not available on this server or for this user."
            raise Failed(UNREACHABLE, said) from None

    async def read_stored(self, stream: str, subject: str, *, keep: Callable[[StoredMessage], T | None]) -> list[T]:
        """Reads what a stream holds under a subject, oldest first. Returns what `keep` makes of each message, except
        None. Raises Failed."""
        await self.api_request(f"STREAM.INFO.{stream}")  # without a stream, a direct get has no answer

        async def read() -> list[T]:
            found = self.history.read(stream, subject)
            return [kept async for stored in found if (kept := keep(stored)) is not None]

        return await self.ask_jetstream(f"DIRECT.GET.{stream}", read())

    async def get_stored(self, stream: str, seq: int) -> StoredMessage | None:
        """One message; None: there is none. Raises Failed."""
        await self.api_request(f"STREAM.INFO.{stream}")
        return await self.ask_jetstream(f"DIRECT.GET.{stream}", self.history.get(stream, seq))

    async def delete_stored(self, stream: str, seq: int) -> bool:
        """False: there is no such message. Raises Failed."""
        if await self.get_stored(stream, seq) is None:
            return False
        await self.ask_jetstream(f"STREAM.MSG.DELETE.{stream}", self.history.delete(stream, seq))
        return True

    async def api_request(self, verb: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """JetStream's answer to `$JS.API.<verb>`. Raises Failed, also for an error of JetStream's."""
        return await self.ask_jetstream(verb, self.connection.api_request(verb, body))

    async def ask_jetstream(self, verb: str, asking: Coroutine[Any, Any, T]) -> T:
        """Awaits `asking`, a request over `connection` for `$JS.API.<verb>`. Raises Failed."""
        subject = f"$JS.API.{verb}"
        try:
            return await self.unless_forbidden(subject, asking)
        except BusRefused as exc:
            if exc.code == NO_STREAM:
                stream = verb.rpartition(".")[2]
                said = f"There is no stream {stream}: start an adapter once, or run `wechat-nats doctor --fix`."
                raise Failed(UNREACHABLE, said) from None
            raise Failed(NO, f"{verb}: error {exc.detail}.") from None
        except Temporary as exc:
            self.raise_if_forbidden(subject)
            said = f"No answer to {verb} ({exc.detail or exc.reason}): is JetStream enabled, may this user ask?"
            raise Failed(UNREACHABLE, said) from None


def decode_answer(data: bytes, kind: type[S]) -> S:
    """An adapter's answer. Raises Failed."""
    try:
        return msgspec.json.decode(data, type=kind)
    except UNDECODABLE:
        raise Failed(NO, "The adapter's answer cannot be read: are both of the same version?") from None


def settings_here(*, adapter: bool = False) -> Settings:
    """The settings of this process and of the context that NATS_CONTEXT names. If they name no server, that of `run
    --embedded` is used, if its data folder is here. `adapter`: with what an adapter needs. Raises SettingsError."""
    environ = with_context(os.environ)
    settings = read_settings(environ, adapter=adapter)
    if "NATS_URL" in environ or any(getattr(settings, field) for field in CREDENTIALS):
        return settings
    try:
        url = (Path(settings.data_dir) / URL_FILE).read_text(encoding="utf-8")
    except OSError:
        return settings
    return read_settings({**environ, "NATS_URL": url})


def with_context(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ`, with what the context of the command `nats` that NATS_CONTEXT names says of variables that are not
    set. Raises SettingsError, whose text holds no secret."""
    given = {name: value for name, value in environ.items() if value.strip()}
    if not (name := given.get("NATS_CONTEXT", "").strip()):
        return given
    home = Path(given.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "nats"
    try:
        name = (home / "context.txt").read_text(encoding="utf-8").strip() if name == SELECTED else name
        context = msgspec.json.decode((home / "context" / f"{name}.json").read_bytes(), type=dict[str, Any])
    except OSError as exc:
        known = ", ".join(sorted(file.stem for file in (home / "context").glob("*.json"))) or "none"
        said = f"NATS_CONTEXT: cannot read {exc.filename}: {exc.strerror}; contexts: {known}."
        raise SettingsError("nats_context", said) from None
    except UNDECODABLE:
        raise SettingsError("nats_context", f"NATS_CONTEXT: the context {name} is no JSON object.") from None
    if unusable := [field for field in UNSUPPORTED if context.get(field)]:
        said = (
            f"NATS_CONTEXT: the context {name} has {', '.join(unusable)}, which is not supported: use creds, or nkey."
        )
        raise SettingsError("nats_context", said)
    identity = next((field for field in IDENTITIES if context.get(field)), "")
    found = {f"NATS_{field.upper()}": context[field] for field in (*FIELDS, identity) if context.get(field)}
    texts = {name: "true" if value is True else str(value) for name, value in found.items()}
    return {"NATS_URL": SERVER, **texts, **given}


@contextlib.asynccontextmanager
async def connected_bus(settings: Settings | None = None, *, lasting: bool = False) -> AsyncIterator[BusConnection]:
    """A bus for the duration of the block. A `lasting` one reconnects after a break. Raises Failed, SettingsError."""
    settings = settings or settings_here()
    bus = BusConnection(BusClient(), settings)
    try:
        await bus.__aenter__()
    except Temporary as exc:
        raise Failed(UNREACHABLE, exc.detail) from None
    bus.complaints.clear()
    bus.nc.options["allow_reconnect"] = lasting
    try:
        await bus.connection.adopt_client(bus.nc)
        yield bus
    except ConnectionClosedError as exc:
        raise Failed(UNREACHABLE, BROKE) from exc
    finally:
        await bus.__aexit__()
