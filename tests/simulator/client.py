"""A plain iLink client for these tests: what the protocol file says, and no more."""

import base64
import itertools
import random
from typing import Any

import httpx

from adapter.simulator import BotRecord, Simulator, SimulatorSettings

Json = dict[str, Any]
BASE_INFO = {"channel_version": "2.4.9"}
FAST = SimulatorSettings(hold_ms=30, qr_hold_ms=30, overlap_grace_ms=5, token_death_delay_s=0, seed=1)
"""Holds of milliseconds, for tests that want an empty answer soon."""
LONG = SimulatorSettings(hold_ms=60_000, qr_hold_ms=60_000, overlap_grace_ms=5, token_death_delay_s=0, seed=1)
"""Holds that only news or `advance` end."""


def headers(token: str | None = None) -> dict[str, str]:
    """All headers of a POST."""
    uin = base64.b64encode(str(random.getrandbits(32)).encode()).decode()
    sent = {
        "Content-Type": "application/json",
        "AuthorizationType": "ilink_bot_token",
        "X-WECHAT-UIN": uin,
        "iLink-App-Id": "bot",
        "iLink-App-ClientVersion": "132105",
    }
    if token is not None:
        sent["Authorization"] = f"Bearer {token}"
    return sent


class Client:
    """One bot's client; keeps its cursor only when told to (`follow`)."""

    def __init__(self, sim: Simulator, bot: BotRecord, http: httpx.AsyncClient) -> None:
        self.sim = sim
        self.bot = bot
        self.http = http
        self.cursor = ""
        self._numbers = itertools.count()

    async def post(self, endpoint: str, body: Json, **kwargs: Any) -> httpx.Response:
        url = f"{self.sim.url}/ilink/bot/{endpoint}"
        kwargs.setdefault("headers", headers(self.bot.token))
        return await self.http.post(url, json={**body, "base_info": BASE_INFO}, **kwargs)

    async def call(self, endpoint: str, body: Json | None = None) -> Json:
        response = await self.post(endpoint, body or {})
        answer = response.json()
        assert isinstance(answer, dict)
        return answer

    async def poll(self, cursor: str = "") -> Json:
        return await self.call("getupdates", {"get_updates_buf": cursor})

    async def follow(self) -> list[Json]:
        """The messages after the own cursor, which moves on."""
        answer = await self.poll(self.cursor)
        self.cursor = answer.get("get_updates_buf") or self.cursor
        messages = answer.get("msgs", [])
        assert isinstance(messages, list)
        return messages

    def message(self, text: str = "hi", **changes: Any) -> Json:
        """The official set of fields, with the newest context token; a field given as None is left out."""
        inbound = self.sim.inbound(self.bot.bot)
        message = {
            "from_user_id": "",
            "to_user_id": self.bot.user,
            "client_id": f"test-{next(self._numbers)}",
            "message_type": 2,
            "message_state": 2,
            "item_list": [{"type": 1, "text_item": {"text": text}}],
            "context_token": inbound[-1].context_token if inbound else "none",
        } | changes
        return {key: value for key, value in message.items() if value is not None}

    async def send(self, text: str = "hi", **changes: Any) -> Json:
        return await self.call("sendmessage", {"msg": self.message(text, **changes)})

    def phone(self) -> list[str]:
        return [shown.text for shown in self.sim.phone(self.bot.user)]


def texts(messages: list[Json]) -> list[str]:
    return [message["item_list"][0]["text_item"]["text"] for message in messages]


def ids(messages: list[Json]) -> list[str]:
    return [str(message["message_id"]) for message in messages]
