"""Checks and records the headers of requests. A mistake becomes a violation; the answer stays the same."""

from collections import deque
from typing import Any

from aiohttp import web

from adapter.simulator import ids
from adapter.simulator.records import Json, RequestRecord
from adapter.simulator.world import Bot, World

REQUESTS_KEPT = 1_000
TOKENS_LISTED = 10


class ClientWatch:
    """The latest requests, and the checks of each request."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.requests: deque[RequestRecord] = deque(maxlen=REQUESTS_KEPT)
        self._last_uin = ""

    def record_request(self, request: web.Request, endpoint: str, bot: Bot | None, body: Json | None) -> None:
        """Checks and records one request of the API. `body` is None if there is none, or if it cannot be read."""
        headers = {k: v for k, v in request.headers.items() if k.lower() != "authorization"}
        at_ms = self._world.clock.exact_ms()
        self.requests.append(
            RequestRecord(
                endpoint=endpoint,
                bot=bot.id if bot else "",
                method=request.method,
                at_ms=at_ms,
                headers=headers,
            )
        )
        if bot is not None:
            self._count(bot, endpoint, at_ms)
        self._app_headers(request, endpoint, bot)
        if endpoint in ("get_bot_qrcode", "get_qrcode_status"):
            self._login(request, endpoint, bot)
        if request.method == "POST":
            self._uin(request, endpoint, bot)
            self._content(request, endpoint, bot, body)

    def _count(self, bot: Bot, endpoint: str, at_ms: float) -> None:
        bot.call_counts[endpoint] = bot.call_counts.get(endpoint, 0) + 1
        times = bot.calls.setdefault(endpoint, deque())
        times.append(at_ms)
        while len(times) > self._world.records_limit():
            times.popleft()

    def _app_headers(self, request: web.Request, endpoint: str, bot: Bot | None) -> None:
        app_id = request.headers.get("iLink-App-Id")
        if app_id is None:
            self._world.violate("missing_app_id", endpoint, bot)
        elif app_id != "bot":
            self._world.violate("wrong_app_id", endpoint, bot)
        version = request.headers.get("iLink-App-ClientVersion")
        if version is None:
            self._world.violate("missing_version", endpoint, bot)
        elif ids.read_version(version) is None:
            self._world.violate("wrong_version", endpoint, bot)

    def _uin(self, request: web.Request, endpoint: str, bot: Bot | None) -> None:
        uin = request.headers.get("X-WECHAT-UIN", "")
        if not uin:
            self._world.violate("missing_uin", endpoint, bot)
        elif ids.read_uin(uin) is None:
            self._world.violate("wrong_uin", endpoint, bot)
        if uin and uin == (bot.last_uin if bot else self._last_uin):
            self._world.violate("uin_unchanged", endpoint, bot)
        if bot is None:
            self._last_uin = uin
        else:
            bot.last_uin = uin

    def _content(self, request: web.Request, endpoint: str, bot: Bot | None, body: Json | None) -> None:
        if request.content_type != "application/json":
            self._world.violate("wrong_content_type", endpoint, bot)
        if body is None:
            return
        if endpoint == "get_bot_qrcode":
            tokens = body.get("local_token_list")
            if isinstance(tokens, list) and len(tokens) > TOKENS_LISTED:
                self._world.violate("too_many_tokens", endpoint, bot)
            return
        if endpoint == "getupdates" and "sync_buf" in body:
            self._world.violate("deprecated_sync_buf", endpoint, bot)
        self._base_info(body.get("base_info"), endpoint, bot)

    def _login(self, request: web.Request, endpoint: str, bot: Bot | None) -> None:
        """Checks a login request: no token, and the only known type of bot."""
        if "Authorization" in request.headers:
            self._world.violate("token_on_qrcode", endpoint, bot)
        if endpoint == "get_bot_qrcode" and request.query.get("bot_type") != "3":
            self._world.violate("wrong_bot_type", endpoint, bot)

    def _base_info(self, base_info: Any, endpoint: str, bot: Bot | None) -> None:
        """Checks `base_info`. `bot_agent` is optional."""
        if not isinstance(base_info, dict):
            self._world.violate("missing_base_info", endpoint, bot)
            return
        if not isinstance(base_info.get("channel_version"), str):
            self._world.violate("missing_channel_version", endpoint, bot)
        agent = base_info.get("bot_agent")
        if agent is not None and not ids.is_bot_agent(agent):
            self._world.violate("wrong_bot_agent", endpoint, bot)
