"""The simulator's own API over HTTP: `POST /_sim/<method>` with the arguments as JSON, or `GET` to look."""

import asyncio
import base64
import inspect
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from adapter.simulator.faults import FaultRule
from adapter.simulator.records import Json, SimulatorError

if TYPE_CHECKING:
    from adapter.simulator.simulator import Simulator

READS = (
    "bots calls faults inbound media now online phone polls qrcodes requests sends settings stats typing violations"
)
ACTS = (
    "add_bot add_bots advance clear_faults configure confirm cut_polls expire flood inject inject_many "
    "kill_token redirect repeat replay require_verify revive_token say say_kind say_media scan set_fault"
)


class Admin:
    """Maps paths to methods of the simulator. Answers 400 with `{"error": …}` for what cannot be."""

    def __init__(self, simulator: "Simulator") -> None:
        self._simulator = simulator
        self._methods: dict[str, Callable[..., Any]] = {
            name: getattr(self, f"_{name}", None) or getattr(simulator, name)
            for name in (*READS.split(), *ACTS.split())
        }

    async def handle(self, request: web.Request) -> web.Response:
        name = request.match_info["call"].strip("/")
        if name not in self._methods or (request.method == "GET" and name not in READS.split()):
            return reply({"error": "not found", "get": READS.split(), "post": ACTS.split()}, status=404)
        try:
            result = self._methods[name](**await self._arguments(request))
            if inspect.isawaitable(result):
                result = await result
        except (SimulatorError, ValueError, TypeError) as exc:
            return reply({"error": str(exc)}, status=400)
        if isinstance(result, web.Response):
            return result
        return reply({"ok": True} if result is None else result)

    async def _arguments(self, request: web.Request) -> Json:
        if request.method == "GET":
            return dict(request.query)
        raw = await request.read()
        arguments = msgspec.json.decode(raw) if raw else {}
        if not isinstance(arguments, dict):
            raise SimulatorError("the arguments must be a JSON object")
        return arguments

    def _say(self, to: str, text: str, overrides: Json | None = None) -> Any:
        return self._simulator.say(to, text, **(overrides or {}))

    def _say_kind(self, to: str, kind: str, overrides: Json | None = None, **how: Any) -> Any:
        return self._simulator.say_kind(to, kind, **how, **(overrides or {}))

    async def _say_media(
        self,
        to: str,
        kind: str,
        content: str | None = None,
        fields: Json | None = None,
        url: str = "both",
        **how: Any,
    ) -> Any:
        decoded = None if content is None else base64.b64decode(content, validate=True)
        sealed = await asyncio.to_thread(self._simulator.media.seal, kind, decoded, **how)
        return self._simulator.say_media(to, kind, sealed, url=url, **(fields or {}))

    async def _media(self, reference: str, raw: str = "") -> Any:
        """With `raw`, the bytes themselves."""
        content = await asyncio.to_thread(self._simulator.media_content, reference)
        if raw:
            return web.Response(body=io.BytesIO(content), content_type="application/octet-stream")
        return {"content": base64.b64encode(content).decode()}

    def _set_fault(self, **rule: Any) -> Any:
        return self._simulator.set_fault(msgspec.convert(rule, FaultRule))

    def _now(self) -> Json:
        return {"now_ms": self._simulator.now_ms}

    def _advance(self, seconds: float) -> Json:
        return {"now_ms": self._simulator.advance(seconds)}

    def _settings(self, bot: str | None = None) -> Any:
        world = self._simulator.world
        return world.settings_of(world.find(bot) if bot else None)

    def _counted(self, name: str, count: int) -> Json:
        return {name: count}

    def _clear_faults(self, fault: str | None = None, rule_id: int | None = None) -> Json:
        return self._counted("cleared", self._simulator.clear_faults(fault, rule_id))

    def _cut_polls(self, bot: str | None = None) -> Json:
        return self._counted("cut", self._simulator.cut_polls(bot))

    def _replay(self, bot: str, last: int = 1) -> Json:
        return self._counted("replayed", self._simulator.replay(bot, last))

    def _flood(self, to: str, messages: int = 1000, size: int = 10_000) -> Json:
        return self._counted("bytes", self._simulator.flood(to, messages, size))


def reply(value: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")
