"""iLink's API calls: builds requests and reads answers by `protocol`, and sends them over the pool's connections.

`ILink` implements ports.Chat and ports.Logins, which pollers, senders and logins call. A call does four things:
build an `IlinkRequest` (`protocol`), check the base URL (`network`), exchange it (`connection`), and read the
`IlinkReply` (`protocol`). Every call is counted once with its outcome.

Errors say what the caller may do. Temporary: nothing was taken, try again. Uncertain: a send may have been taken.
SessionExpired: the token is refused (-14). Throttled: -2, -12, -13. Refused: do not try again. Only a send can be
Uncertain; the other calls may always be repeated, and a poll without an answer in time is None.

The client never retries a call, never waits for the send window, and never logs tokens or texts.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import TypeAlias, TypeVar
from urllib.parse import urlsplit

import structlog

from adapter.errors import AdapterError, LeaseLost, Refused, SessionExpired, Temporary, Throttled, Uncertain
from adapter.ilink import network, protocol
from adapter.ilink.connection import ConnectionPool
from adapter.ilink.network import LookUpHost, Resolver, ResumingContext
from adapter.ilink.protocol import Declared, IlinkReply, IlinkRequest, Upload
from adapter.ilink.wire import THROTTLED
from adapter.ports import HOLD_MS, Accepted, Account, Content, Polled, QrCode, Scan
from adapter.tools.concurrency import FairSlots
from adapter.tools.metrics import LONG_POLLS, Metrics

log = structlog.get_logger()

T = TypeVar("T")
OnSuccess: TypeAlias = Callable[[str, bool, float], None]
"""Is told the base URL of a request, whether it is a send, and how many seconds ago it began."""

POLL_MARGIN_S = 7.0
"""Added to the server's hold. A shorter margin cuts polls that are about to bring an answer."""
UPLOAD_URL_S = 15.0
ASK_S = 10.0
"""The official client's timeout of getconfig, sendtyping, the notifications and get_bot_qrcode."""
SMALL = 65_536
"""Largest answer to a poll that is read at once; nearly all are smaller."""
READ_BYTES_PER_S = 16 << 20
"""Of larger ones of a host, one after the other. Without it, a hundred bots of a hostile server took 1.5 GiB and
delayed the messages of others by three seconds: reading 8 MiB takes 50 to 100 ms of the event loop."""
LARGE_HOSTS = 2
"""Hosts whose large answers are read at the same time; more take turns. With one turn for all, the answers of a
hostile server delayed those of iLink by half a minute."""
_NOBODY = Account("", "", "")
"""For calls without a bot."""


@contextlib.contextmanager
def answered(status: int) -> Iterator[None]:
    """Gives the errors of reading an answer its HTTP status."""
    try:
        yield
    except AdapterError as exc:
        exc.http_status = status
        raise


class CountedCall:
    """Counts a call with its outcome, and its duration unless iLink holds it. `on_success` gets its seconds."""

    __slots__ = ("_endpoint", "_metrics", "_on_success", "_started")

    def __init__(self, metrics: Metrics, endpoint: str, on_success: Callable[[float], None] | None = None) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._on_success = on_success

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if exc is not None and (isinstance(exc, LeaseLost) or not isinstance(exc, (AdapterError, TimeoutError))):
            return  # no request was made, or it was cancelled
        outcome, took_s = "ok" if exc is None else _outcome_label(exc), time.monotonic() - self._started
        self._metrics.upstream_requests.labels(self._endpoint, outcome).inc()
        if self._endpoint not in LONG_POLLS:
            self._metrics.upstream_request_duration.labels(self._endpoint).observe(took_s)
        if exc is None and self._on_success is not None:
            self._on_success(took_s)


class ILink:
    """Implements ports.Chat and ports.Logins."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        default_base_url: str,
        allowed_hosts: tuple[str, ...],
        send_timeout_s: float,
        on_success: OnSuccess = lambda *_: None,
        declared: Declared = protocol.NEWEST,
        poll_margin_s: float = POLL_MARGIN_S,
        look_up: LookUpHost = network.resolve_host,
    ) -> None:
        """`on_success` is told of each request that iLink has answered with success."""
        self._metrics = metrics
        self._on_success = on_success
        self._default_base_url = default_base_url
        self._allowed_hosts = allowed_hosts
        self._declared = declared
        self._poll_margin_s = poll_margin_s
        self._send_timeout_s = send_timeout_s
        resolver = Resolver(allowed_hosts + network.proxies(), look_up=look_up)
        self._pool = ConnectionPool(tls=ResumingContext(), resolver=resolver)
        self._large = FairSlots(LARGE_HOSTS, share=1)
        """Held for its host while a large answer is read."""
        self._large_of: set[str] = set()
        """Bots whose large answer is being read, or waits for that."""
        self._connecting: set[str] = set()

    def check_base_url(self, url: str) -> str:
        return network.check_url(url, self._allowed_hosts)

    def host_of(self, base_url: str) -> str:
        return urlsplit(base_url or self._default_base_url).netloc

    def redirect_base_url(self, host: str, base_url: str) -> str:
        return network.redirect_url(host, base_url or self._default_base_url, self._allowed_hosts)

    def is_connecting(self, bot: str) -> bool:
        return bot in self._connecting

    def has_answer(self, bot: str) -> bool:
        return bot in self._large_of

    async def poll(self, account: Account, cursor: str, hold_ms: int) -> Polled | None:
        request = protocol.updates_request(account.token, cursor, self._declared)
        started = time.monotonic()
        timeout_s, on_connected = hold_ms / 1000 + self._poll_margin_s, partial(self._connecting.discard, account.bot)
        self._connecting.add(account.bot)
        try:
            with self._counted(account, "getupdates"):
                # the answer is in no variable of this frame, since an error keeps it
                return await self._read_updates(
                    await self._exchange(account, request, timeout_s, on_connected), account, started
                )
        except TimeoutError:
            return None
        except AdapterError as exc:
            _forget_frames(exc)
            if isinstance(exc, Uncertain):
                raise Temporary(exc.reason, exc.detail) from exc
            raise
        finally:
            on_connected()
            self._large_of.discard(account.bot)

    async def _read_updates(self, reply: IlinkReply, account: Account, started: float) -> Polled:
        """Reads the large answers of a host one after the other, and leaves time for others in between."""
        polled_s = time.monotonic() - started
        with contextlib.suppress(protocol.Oversized):
            return protocol.read_updates(protocol.unpack(reply, SMALL), polled_s=polled_s)
        self._large_of.add(account.bot)
        async with self._large.slot(self.host_of(account.base_url)):
            size = len(reply.body)
            try:
                reply = protocol.unpack(reply, protocol.ANSWER_BYTES)
                size = len(reply.body)
                return protocol.read_updates(reply, polled_s=polled_s)
            finally:
                await asyncio.sleep(size / READ_BYTES_PER_S)

    async def send(
        self,
        account: Account,
        *,
        user: str,
        client_id: str,
        context_token: str,
        content: Content,
        check: Callable[[], None] | None = None,
    ) -> Accepted:
        item = protocol.text_item(content) if isinstance(content, str) else protocol.media_item(content)
        request = protocol.message_request(
            account.token, self._declared, item, user=user, client_id=client_id, context_token=context_token
        )
        try:
            with self._counted(account, "sendmessage"):
                reply = await self._exchange(account, request, self._send_timeout_s, check)
                with answered(reply.status):
                    return protocol.read_sent(protocol.unpack(reply, request.largest))
        except TimeoutError as exc:
            raise Uncertain("timeout", f"no answer within {self._send_timeout_s:g} s") from exc

    async def upload_url(self, account: Account, upload: Upload, cdn_base_url: str) -> str:
        """getuploadurl, which may always be repeated. Raises SessionExpired, Refused("media"), Temporary."""
        request = protocol.upload_request(account.token, self._declared, upload)
        read = partial(protocol.read_upload_url, cdn_base_url=cdn_base_url, filekey=upload.filekey)
        return await self._call_repeatable(account, request, read, UPLOAD_URL_S)

    async def notify(self, account: Account, *, start: bool) -> None:
        """notifystart or notifystop."""
        request = protocol.notify_request(account.token, self._declared, start=start)
        await self._call_repeatable(account, request, protocol.read_notified)

    async def typing_ticket(self, account: Account, user: str, context_token: str) -> str:
        """getconfig."""
        request = protocol.config_request(account.token, self._declared, user=user, context_token=context_token)
        return await self._call_repeatable(account, request, protocol.read_ticket)

    async def show_typing(self, account: Account, user: str, ticket: str, *, on: bool) -> None:
        """sendtyping."""
        request = protocol.typing_request(account.token, self._declared, user=user, ticket=ticket, on=on)
        await self._call_repeatable(account, request, protocol.read_typing)

    async def fetch_code(self, tokens: Sequence[str]) -> QrCode:
        """Requests a code, always from the default base URL (docs/reference/ilink-protocol.md, "Hosts")."""
        request = protocol.qrcode_request(self._declared, tokens)
        try:
            return await self._call_repeatable(_NOBODY, request, protocol.read_qrcode)
        except AdapterError as exc:
            retry_after_s = exc.retry_after_s if isinstance(exc, Temporary) else None
            raise Temporary(exc.reason, f"iLink gave no QR code: {exc.detail}.", retry_after_s=retry_after_s) from exc

    async def read_code(self, handle: str, base_url: str, verify_code: str) -> Scan | None:
        """None: a timeout, a network or gateway error, or an unreadable answer."""
        request = protocol.qrcode_status_request(self._declared, handle, verify_code)
        timeout_s = HOLD_MS / 1000 + self._poll_margin_s
        account = _NOBODY._replace(base_url=base_url)
        try:
            return await self._call_repeatable(account, request, protocol.read_qrcode_status, timeout_s)
        except Temporary as exc:
            log.debug("login.unanswered", reason=exc.reason)
            return None

    async def _call_repeatable(
        self, account: Account, request: IlinkRequest, read: Callable[[IlinkReply], T], timeout_s: float = ASK_S
    ) -> T:
        """A call that may be repeated, so that a missing answer is Temporary, too. Raises what `read` raises."""
        try:
            with self._counted(account, request.endpoint):
                reply = await self._exchange(account, request, timeout_s)
                with answered(reply.status):
                    return read(protocol.unpack(reply, request.largest))
        except TimeoutError as exc:
            raise Temporary("timeout", f"no answer within {timeout_s:g} s") from exc
        except Uncertain as exc:
            raise Temporary("network", exc.detail) from exc

    async def close(self) -> None:
        """Closes all connections."""
        await self._pool.close()

    def _counted(self, account: Account, endpoint: str) -> CountedCall:
        base_url, is_send = account.base_url or self._default_base_url, endpoint == "sendmessage"
        return CountedCall(self._metrics, endpoint, partial(self._on_success, base_url, is_send))

    def _exchange(
        self, account: Account, request: IlinkRequest, timeout_s: float, check: Callable[[], None] | None = None
    ) -> Coroutine[None, None, IlinkReply]:
        """The answer, packed. `check` is called right before the request is written.

        Raises TimeoutError (silence), Temporary (not sent), Uncertain (sent; "network": the connection was lost,
        "unreadable": no valid HTTP), Refused("url").
        """
        checked = network.check_url(account.base_url or self._default_base_url, self._allowed_hosts)
        return self._pool.exchange(checked, request, timeout_s, check)


def _forget_frames(exc: BaseException | None) -> None:
    """Clears the local variables of the frames that an exception came through, such as a large answer."""
    while exc is not None:
        traceback.clear_frames(exc.__traceback__)
        exc = exc.__cause__ or exc.__context__


def _outcome_label(exc: AdapterError | TimeoutError) -> str:
    match exc:
        case TimeoutError():
            return "timeout"
        case SessionExpired():
            return "ret_14"
        case Refused() if "HTTP 4" in exc.detail:
            return "http_4xx"
        case Throttled():
            return "ret_2"
        case Refused() if exc.ret in THROTTLED or exc.errcode in THROTTLED:
            return "ret_2"
        case Refused(reason="corrupt" | "too_large"):
            return "unreadable"
        case Refused():
            return "ret_other"
        case _ if exc.reason in ("ret_2", "ret_other", "http_4xx", "http_5xx", "timeout", "unreadable"):
            return exc.reason
        case _:
            return "network"
