"""iLink by scripts: what it answers to polls, sends, typing and logins."""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from adapter.errors import Refused, Uncertain
from adapter.ilink import network
from adapter.ilink.client import OnSuccess
from adapter.ports import Accepted, Account, Content, Polled, QrCode, Scan, ScanStatus, Uploaded
from adapter.tools.timing import ChangeSignal
from tests.fakes.clock import EPOCH_MS, FakeClock


def raw_message(number: int, *items: dict[str, Any], **fields: Any) -> bytes:
    """A message as iLink sends it, like no other number's; a field that is None is left out."""
    made = {
        "message_id": 7497484083968569000 + number,
        "client_id": f"wx-{number}",
        "seq": number,
        "from_user_id": "u1@im.wechat",
        "create_time_ms": EPOCH_MS + number,
        "message_type": 1,
        "context_token": f"token-{number}",
        "item_list": list(items),
    } | fields
    return msgspec.json.encode({key: value for key, value in made.items() if value is not None})


def batch(*messages: bytes, cursor: str | None = "b", hold_ms: int = 35_000) -> Polled:
    """An answer to a poll."""
    return Polled(list(messages), cursor, hold_ms)


BASE_URL = "https://ilinkai.weixin.qq.com"


class Sent(NamedTuple):
    """A request to sendmessage."""

    bot: str
    user: str
    text: str
    client_id: str
    context_token: str
    at_s: float
    media: Uploaded | None = None


class Shown(NamedTuple):
    """A request to sendtyping."""

    user: str
    on: bool
    ticket: str
    at_s: float


Step = Exception | Polled | Accepted | None


class FakeChat:
    """Implements Chat by scripts. Without one, polls wait for ever and sends are accepted."""

    def __init__(self, clock: FakeClock) -> None:
        self.polls: deque[Step | Callable[[], Step]] = deque()
        self.sends: deque[Step] = deque()
        self.sends_to: dict[str, deque[Step]] = {}
        """Scripts of single users."""
        self.asked: list[str] = []
        """The cursors of the polls."""
        self.holds: list[int] = []
        self.tokens: list[str] = []
        """The token of each poll."""
        self.polled_at: list[float] = []
        self.sent: list[Sent] = []
        self.notified: list[bool] = []
        self.notify_fails: Exception | None = None
        self.poll_is_stale = False
        """Whether a poll that begins is answered with -14."""
        self.notify_took_s = 0.0
        self.polling = 0
        """Polls that are out now."""
        self.took_s = 0.0
        """How long a send takes."""
        self.hold_sends: dict[str, asyncio.Event] = {}
        """Sends to these users get no answer before the event."""
        self.overlaps = 0
        """Sends of one conversation that were out at once: must stay 0."""
        self.taken: dict[str, Sent] = {}
        """What the phone shows, or may show where there was no answer: each client_id once."""
        self.on_send: Callable[[Sent], Awaitable[None]] | None = None
        self.tickets: deque[Exception | str] = deque()
        """Answers to getconfig; without one a new ticket each."""
        self.tickets_asked: list[tuple[str, float]] = []
        """The context token and the time of each getconfig."""
        self.ticket_took_s = 0.0
        self.typing: list[Shown] = []
        self.typing_answers: deque[Exception | bool] = deque()
        """Answers to sendtyping, False: -2; without one it is done."""
        self.reading: set[str] = set()
        """Bots whose answer has come, and is not read yet."""
        self._clock = clock
        self._out: set[tuple[str, ...]] = set()

    def is_connecting(self, bot: str) -> bool:
        return False

    def has_answer(self, bot: str) -> bool:
        return bot in self.reading

    async def poll(self, account: Account, cursor: str, hold_ms: int) -> Polled | None:
        assert not self.polling, "two polls at once"
        self.asked.append(cursor)
        self.holds.append(hold_ms)
        self.tokens.append(account.token)
        self.polled_at.append(self._clock.monotonic())
        self.polling += 1
        try:
            await asyncio.sleep(0.05)
            if not self.polls:
                await asyncio.Event().wait()
            step = self.polls.popleft()
            answer = step() if callable(step) else step
            if isinstance(answer, Exception):
                raise answer
            if answer is None:
                await asyncio.sleep(hold_ms / 1000)
            assert not isinstance(answer, Accepted)
            return answer
        finally:
            self.polling -= 1

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
        if check is not None:
            check()
        text, media = (content, None) if isinstance(content, str) else ("", content)
        now = self._clock.monotonic()
        return await self._send(Sent(account.bot, user, text, client_id, context_token, now, media))

    def conversation_of(self, sent: Sent) -> tuple[str, ...]:
        """Within which no two sends may be out at once."""
        return sent.bot, sent.user

    async def _send(self, sent: Sent) -> Accepted:
        user, chat = sent.user, self.conversation_of(sent)
        self.overlaps += chat in self._out
        self._out.add(chat)
        self.sent.append(sent)
        try:
            if self.on_send is not None:
                await self.on_send(sent)
            await asyncio.sleep(self.took_s)
            if hold := self.hold_sends.get(user):
                await hold.wait()
        except asyncio.CancelledError:
            self.taken.setdefault(sent.client_id, sent)
            raise
        finally:
            self._out.discard(chat)
        script = self.sends_to.get(user) or self.sends
        answer = script.popleft() if script else Accepted(f"m{len(self.sent)}", 0, None, "")
        if not isinstance(answer, Exception) or isinstance(answer, Uncertain):
            self.taken.setdefault(sent.client_id, sent)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Accepted)
        return answer

    async def typing_ticket(self, account: Account, user: str, context_token: str) -> str:
        self.tickets_asked.append((context_token, self._clock.monotonic()))
        await asyncio.sleep(self.ticket_took_s)
        answer = self.tickets.popleft() if self.tickets else f"ticket-{len(self.tickets_asked)}"
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def show_typing(self, account: Account, user: str, ticket: str, *, on: bool) -> None:
        self.typing.append(Shown(user, on, ticket, self._clock.monotonic()))
        await asyncio.sleep(0)
        answer = self.typing_answers.popleft() if self.typing_answers else True
        if isinstance(answer, Exception):
            raise answer
        if not answer:
            raise Refused("typing", "iLink answered -2", ret=-2)

    async def notify(self, account: Account, *, start: bool) -> None:
        self.notified.append(start)
        await asyncio.sleep(self.notify_took_s)
        if self.notify_fails is not None:
            raise self.notify_fails

    def check_base_url(self, url: str) -> str:
        return network.check_url(url, ("127.0.0.1:8080",))

    def host_of(self, base_url: str) -> str:
        return urlsplit(base_url or "https://ilink").netloc

    @property
    def texts(self) -> list[str]:
        return [sent.text for sent in self.sent]


class ChatOfReplica:
    """The chat as one replica reaches it, which is told what was answered with success."""

    def __init__(self, chat: FakeChat, clock: FakeClock, on_success: OnSuccess) -> None:
        self._chat, self._clock, self._on_success = chat, clock, on_success

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._chat, name)
        if not inspect.iscoroutinefunction(call):
            return call

        async def told(account: Account, *args: Any, **kwargs: Any) -> Any:
            began, base_url = self._clock.monotonic(), account.base_url or BASE_URL
            answer = await call(account, *args, **kwargs)
            if name != "poll" or answer is not None:
                self._on_success(base_url, name == "send", self._clock.monotonic() - began)
            return answer

        return told


class Asked(NamedTuple):
    """A request about a QR code."""

    handle: str
    base_url: str
    digits: str
    at_s: float


class FakeLogins:
    """Implements Logins. What a phone does is put into `scans`, by the handle: q1, q2 …; each answer once."""

    def __init__(self, clock: FakeClock) -> None:
        self.codes: deque[Exception | QrCode] = deque()
        """Answers to the wish for a code; without one, there is always another."""
        self.scans: dict[str, deque[Scan | Exception | None]] = defaultdict(deque)
        self.asked: list[Asked] = []
        self.fetched_at: list[float] = []
        self.tokens: list[list[str]] = []
        """The list of tokens of each wish for a code."""
        self.out: set[str] = set()
        """Handles that are asked about now."""
        self.hold_s = 30.0
        self.fetch_s = 0.01
        self.notify_fails: Exception | None = None
        self._clock = clock
        self._numbers = itertools.count(1)
        self._news = ChangeSignal()

    def happens(self, handle: str, *answers: Scan | ScanStatus | Exception | None) -> None:
        """The next answers about a code; None: nobody answers, at once."""
        self.scans[handle] += [Scan(answer) if isinstance(answer, str) else answer for answer in answers]
        self._news.notify_all()

    async def notify(self, account: Account, *, start: bool) -> None:
        if self.notify_fails is not None:
            raise self.notify_fails

    async def fetch_code(self, tokens: Sequence[str]) -> QrCode:
        self.tokens.append(list(tokens))
        self.fetched_at.append(self._clock.monotonic())
        await asyncio.sleep(self.fetch_s)
        answer = (
            self.codes.popleft() if self.codes else QrCode(handle := f"q{next(self._numbers)}", f"https://q/{handle}")
        )
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def read_code(self, handle: str, base_url: str, verify_code: str) -> Scan | None:
        assert handle not in self.out, "one code is asked about twice at once"
        self.asked.append(Asked(handle, base_url, verify_code, self._clock.monotonic()))
        self.out.add(handle)
        try:
            await asyncio.sleep(0.01)
            await self._news.wait_until(lambda: bool(self.scans[handle]), self.hold_s)
            answer = self.scans[handle].popleft() if self.scans[handle] else Scan("wait")
        finally:
            self.out.discard(handle)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def redirect_base_url(self, host: str, base_url: str) -> str:
        return network.redirect_url(host, base_url, ())

    def check_base_url(self, url: str) -> str:
        return network.check_url(url, ())

    def host_of(self, base_url: str) -> str:
        return urlsplit(base_url or "https://ilink").netloc


class Wire(asyncio.Transport):
    """What asyncio gives a protocol to write to; takes everything."""

    closing = False

    def write(self, data: object) -> None: ...

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True
