"""iLink's API calls: builds requests and reads answers by `protocol`, and sends them by a transport.

`ILink` implements ports.Chat and ports.Logins, which pollers, conversations and logins call. A call does four things:
build a `Request` (`protocol`), check the base URL (`urls`), exchange it (`HotCalls` for the three frequent endpoints
without a proxy, else `PlainCalls`), and read the `Reply` (`protocol`). Every call is counted once with its outcome.

Errors say what the caller may do. Temporary: nothing was taken, try again. Uncertain: a send may have been taken.
SessionExpired: the token is refused (-14). Throttled: -2. Refused: do not try again. Only a send can be Uncertain;
the other calls may always be repeated, and a poll without an answer in time is None.

The client never retries a call (only the QR code is asked for with GET if POST is refused), never waits for the send
window, and never logs tokens or texts.
"""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import structlog

from adapter.errors import AdapterError, LeaseLost, Refused, SessionExpired, Temporary, Throttled, Uncertain
from adapter.ilink import protocol, urls
from adapter.ilink.budget import GRACE_S, SMALL, ByteBudget
from adapter.ilink.hot_calls import HotCalls
from adapter.ilink.network import LookUpHost, Resolver, proxies, proxy_of, resolve_host
from adapter.ilink.plain_calls import PlainCalls
from adapter.ilink.protocol import Reply, Request
from adapter.ilink.tls import ResumingContext
from adapter.ilink.wire import THROTTLED
from adapter.kit.timing import complete_with_grace
from adapter.observability.metrics import Metrics
from adapter.ports import Accepted, Account, Content, MediaKind, Polled, QrCode, Scan

log = structlog.get_logger()

T = TypeVar("T")

HOT = ("getupdates", "sendmessage", "notifystart")
"""Frequent endpoints, which decide the cost of a platform: one for each idle bot, two for each message, and one
before the first poll of a bot that is taken over, whose connection the poll then uses."""
POLL_MARGIN_S = 7.0
"""Added to the server's hold. A shorter margin cuts polls that are about to bring an answer."""
UPLOAD_URL_S = 15.0
ASK_S = 10.0
"""The official client's timeout of getconfig, sendtyping and the notifications."""
QRCODE_S = 10.0


class ILink:
    """Implements ports.Chat and ports.Logins."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        default_base_url: str,
        allowed_hosts: tuple[str, ...],
        send_timeout_s: float,
        poll_margin_s: float = POLL_MARGIN_S,
        look_up: LookUpHost = resolve_host,
    ) -> None:
        self._metrics = metrics
        self._polled = metrics.upstream_requests.labels(endpoint="getupdates", outcome="ok")
        self._sent = metrics.upstream_requests.labels(endpoint="sendmessage", outcome="ok")
        self._sending = metrics.upstream_request_duration.labels(endpoint="sendmessage")
        self._default_base_url = default_base_url
        self._allowed_hosts = allowed_hosts
        self._poll_margin_s = poll_margin_s
        self._send_timeout_s = send_timeout_s
        self._budget = ByteBudget()
        resolver, tls = Resolver(allowed_hosts + proxies(), look_up=look_up), ResumingContext()
        self._hot = HotCalls(tls=tls, budget=self._budget, resolver=resolver)
        self._plain = PlainCalls(tls=tls, budget=self._budget, resolver=resolver)
        self._fresh_connection_bots: set[str] = set()
        """Bots whose connections seem dead; their next call uses a new one."""

    def check_base_url(self, url: str) -> str:
        return urls.check_url(url, self._allowed_hosts)

    async def poll(self, account: Account, cursor: str, hold_ms: int) -> Polled | None:
        request = protocol.updates_request(account.token, cursor, random.getrandbits(32))
        started = time.monotonic()
        try:
            reply = await self._post(account, request, hold_ms / 1000 + self._poll_margin_s)
            polled_s = time.monotonic() - started
            if len(reply.body) <= SMALL and protocol.is_read_at_once(reply):
                polled = protocol.read_updates(reply, polled_s=polled_s)
            else:
                box = [reply]
                del reply  # otherwise a stored exception would keep the large answer in memory
                polled = await self._read_updates_in_thread(box, polled_s)
        except TimeoutError:
            self._count_request("getupdates", "timeout")
            return None
        except AdapterError as exc:
            self._count_request("getupdates", _outcome_label(exc))
            _forget_frames(exc)
            if isinstance(exc, Uncertain):
                raise Temporary(exc.reason, exc.detail) from exc
            raise
        self._polled.inc()
        return polled

    async def _read_updates_in_thread(self, box: list[Reply], polled_s: float) -> Polled:
        """Takes the reply out of the box, and reads it in a thread. Goes on for a moment when it is cancelled."""
        reply = box.pop()
        share, reply = reply.share, reply._replace(share=None)
        try:
            reading = self._budget.run_in_thread(protocol.read_updates, reply, polled_s=polled_s)
            return (await complete_with_grace(reading, GRACE_S))._replace(share=share)
        except BaseException:
            if share is not None:
                share.release()
            raise

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
        request = protocol.message_request(
            account.token,
            random.getrandbits(32),
            protocol.text_item(content) if isinstance(content, str) else protocol.media_item(content),
            user=user,
            client_id=client_id,
            context_token=context_token,
        )
        started = time.monotonic()
        try:
            accepted = protocol.read_sent(await self._post(account, request, self._send_timeout_s, check))
        except TimeoutError as exc:
            self._count_request("sendmessage", "timeout")
            raise Uncertain("timeout", f"no answer within {self._send_timeout_s:g} s") from exc
        except LeaseLost:  # from `check`: no request was made
            raise
        except AdapterError as exc:
            self._count_request("sendmessage", _outcome_label(exc))
            raise
        finally:
            self._sending.observe(time.monotonic() - started)
        self._sent.inc()
        return accepted

    async def upload_url(
        self,
        account: Account,
        *,
        user: str,
        kind: MediaKind,
        size: int,
        md5: str,
        filekey: str,
        key: bytes,
        cdn_base_url: str,
    ) -> str:
        """getuploadurl, which may always be repeated. Raises SessionExpired, Refused("media"), Temporary."""
        request = protocol.upload_request(
            account.token,
            random.getrandbits(32),
            user=user,
            kind=kind,
            size=size,
            md5=md5,
            filekey=filekey,
            key=key,
        )
        read = partial(protocol.read_upload_url, cdn_base_url=cdn_base_url, filekey=filekey)
        return await self._call_repeatable(account, request, read, UPLOAD_URL_S)

    async def notify(self, account: Account, *, start: bool) -> None:
        """notifystart or notifystop."""
        request = protocol.notify_request(account.token, random.getrandbits(32), start=start)
        await self._call_repeatable(account, request, protocol.read_notified)

    async def typing_ticket(self, account: Account, user: str, context_token: str) -> str:
        """getconfig."""
        request = protocol.config_request(
            account.token, random.getrandbits(32), user=user, context_token=context_token
        )
        return await self._call_repeatable(account, request, protocol.read_ticket)

    async def show_typing(self, account: Account, user: str, ticket: str, *, on: bool) -> None:
        """sendtyping."""
        request = protocol.typing_request(account.token, random.getrandbits(32), user=user, ticket=ticket, on=on)
        await self._call_repeatable(account, request, protocol.read_typing)

    async def _call_repeatable(
        self, account: Account, request: Request, read: Callable[[Reply], T], timeout_s: float = ASK_S
    ) -> T:
        """A call that may be repeated, so that a missing answer is Temporary, too. Raises what `read` raises."""
        endpoint, started = request.endpoint, time.monotonic()
        try:
            answer = read(await self._post(account, request, timeout_s))
        except TimeoutError as exc:
            self._count_request(endpoint, "timeout")
            raise Temporary("timeout", f"no answer within {timeout_s:g} s") from exc
        except Uncertain as exc:
            self._count_request(endpoint, "network")
            raise Temporary("network", exc.detail) from exc
        except AdapterError as exc:
            self._count_request(endpoint, _outcome_label(exc))
            raise
        finally:
            self._metrics.upstream_request_duration.labels(endpoint=endpoint).observe(time.monotonic() - started)
        self._count_request(endpoint, "ok")
        return answer

    async def fetch_code(self, tokens: Sequence[str]) -> QrCode:
        """Requests a code, always from the default base URL (docs/reference/ilink-protocol.md, "Hosts")."""
        request = protocol.qrcode_request(random.getrandbits(32), tokens)
        started = time.monotonic()
        try:
            reply = await self._exchange(self._default_base_url, request, QRCODE_S)
            if reply.status in protocol.NO_POST:
                reply = await self._exchange(self._default_base_url, protocol.qrcode_get_request(), QRCODE_S)
            code = protocol.read_qrcode(reply)
        except TimeoutError:
            self._count_request("get_bot_qrcode", "timeout")
            raise Temporary("timeout", f"iLink gave no QR code within {QRCODE_S:g} s.") from None
        except AdapterError as exc:
            self._count_request("get_bot_qrcode", _outcome_label(exc))
            retry_after_s = exc.retry_after_s if isinstance(exc, Temporary) else None
            raise Temporary(exc.reason, f"iLink gave no QR code: {exc.detail}.", retry_after_s=retry_after_s) from exc
        finally:
            self._metrics.upstream_request_duration.labels(endpoint="get_bot_qrcode").observe(
                time.monotonic() - started
            )
        self._count_request("get_bot_qrcode", "ok")
        return code

    async def read_code(self, handle: str, base_url: str, verify_code: str) -> Scan | None:
        """None: a timeout, a network or gateway error, or an unreadable answer."""
        request = protocol.qrcode_status_request(handle, verify_code)
        timeout_s = protocol.HOLD_MS / 1000 + self._poll_margin_s
        try:
            scan = protocol.read_qrcode_status(await self._exchange(base_url, request, timeout_s))
        except TimeoutError:
            self._count_request("get_qrcode_status", "timeout")
            return None
        except (Temporary, Uncertain) as exc:
            self._count_request("get_qrcode_status", _outcome_label(exc))
            log.debug("login.unanswered", reason=exc.reason)
            return None
        self._count_request("get_qrcode_status", "ok")
        return scan

    def redirect_base_url(self, host: str, base_url: str) -> str:
        return urls.redirect_url(host, base_url or self._default_base_url, self._allowed_hosts)

    async def recycle(self, bot: str) -> None:
        """Makes the bot's next call resolve and connect again."""
        self._fresh_connection_bots.add(bot)

    async def close(self) -> None:
        """Closes all connections."""
        await self._hot.close()
        await self._plain.close()
        self._budget.close()

    async def _post(
        self, account: Account, request: Request, timeout_s: float, check: Callable[[], None] | None = None
    ) -> Reply:
        """Raises TimeoutError, Temporary (not sent), Uncertain (sent), Refused("url")."""
        fresh = account.bot in self._fresh_connection_bots
        self._fresh_connection_bots.discard(account.bot)
        reply = await self._exchange(account.base_url, request, timeout_s, fresh=fresh, check=check)
        return reply._replace(secrets=request.secrets)

    async def _exchange(
        self,
        base_url: str,
        request: Request,
        timeout_s: float,
        *,
        fresh: bool = False,
        check: Callable[[], None] | None = None,
    ) -> Reply:
        checked = self.check_base_url(base_url or self._default_base_url)
        is_hot = request.endpoint in HOT and not proxy_of(checked)
        transport = self._hot if is_hot else self._plain
        return await transport.exchange(checked, request, timeout_s, fresh=fresh, check=check)

    def _count_request(self, endpoint: str, outcome: str) -> None:
        self._metrics.upstream_requests.child(endpoint, outcome).inc()


def _forget_frames(exc: BaseException | None) -> None:
    """Clears the local variables of the frames that an exception came through, such as a large answer."""
    while exc is not None:
        traceback.clear_frames(exc.__traceback__)
        exc = exc.__cause__ or exc.__context__


def _outcome_label(exc: AdapterError) -> str:
    match exc:
        case SessionExpired():
            return "http_4xx" if exc.detail.startswith("HTTP 4") else "ret_14"
        case Throttled():
            return "ret_2"
        case Refused() if THROTTLED in (exc.ret, exc.errcode):
            return "ret_2"
        case Refused():
            return "http_4xx" if exc.detail.startswith("HTTP 4") else "ret_other"
        case _ if exc.reason in ("ret_2", "ret_other", "http_4xx", "http_5xx", "network", "unreadable"):
            return exc.reason
        case _:
            return "network"
