"""The simulator's own HTTP API: `POST /_sim/<method>` with the arguments as JSON, or `GET` for methods that only
read."""

import asyncio
import base64
import inspect
import io
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web
from msgspec import Meta

from adapter.simulator import reading
from adapter.simulator.faults import FaultRule
from adapter.simulator.records import Json, SimulatorError

READS = (
    "bots calls faults inbound media now online phone polls qrcodes requests sends settings stats typing violations"
)
ACTS = (
    "add_bot add_bots advance clear_faults configure confirm cut_polls expire flood inject inject_many "
    "kill_token redirect repeat replay require_verify revive_token say say_kind say_media scan set_fault"
)
KeyForm = Literal["usual", "hex", "raw_base64", "hex_base64", "none"]
Url = Literal["both", "full", "param"]
NotNegative = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
"""Number of objects made in one call. The server answers no other request during the call."""


class Admin:
    """Maps paths to methods of the simulator. A call that is invalid gets HTTP 400 and `{"error": …}`."""

    def __init__(self, simulator: Any) -> None:
        """`simulator` is the Simulator whose methods are called; its module imports this one."""
        self._simulator = simulator
        self._methods: dict[str, Callable[..., Any]] = {
            name: getattr(self, f"_{name}", None) or getattr(simulator, name)
            for name in (*READS.split(), *ACTS.split())
        }

    async def handle(self, request: web.Request) -> web.Response:
        name = request.match_info["call"].strip("/")
        if name not in self._methods:
            return reply({"error": "not found", "get": READS.split(), "post": ACTS.split()}, status=404)
        if request.method == "GET" and name not in READS.split():
            return reply({"error": f"{name} is called by POST"}, status=405)
        try:
            result = reading.call(self._methods[name], await self._arguments(request))
            if inspect.isawaitable(result):
                result = await result
        except (SimulatorError, ValueError, TypeError, RecursionError) as exc:
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

    def _add_bots(self, count: Count) -> Any:
        return self._simulator.add_bots(count)

    def _say(self, to: str, text: str, overrides: Json | None = None) -> Any:
        return self._simulator.say(to, text, **(overrides or {}))

    def _say_kind(
        self,
        to: str,
        kind: str,
        text: str = "hello",
        of: str | None = None,
        part: str | None = None,
        nth: NotNegative = 0,
        on: Literal["text", "image", "voice", "voice_transcript", "file", "video"] = "text",
        key_form: KeyForm = "usual",
        url: Url = "both",
        overrides: Json | None = None,
    ) -> Any:
        how: Json = {"of": of, "part": part, "nth": nth, "on": on, "key_form": key_form, "url": url}
        return self._simulator.say_kind(to, kind, text, **how, **(overrides or {}))

    async def _say_media(
        self,
        to: str,
        kind: str,
        content: str | None = None,
        sample: str | None = None,
        size: NotNegative | None = None,
        key_form: KeyForm = "usual",
        url: Url = "both",
        fields: Json | None = None,
    ) -> Any:
        decoded = None if content is None else base64.b64decode(content, validate=True)
        how: Json = {"sample": sample, "size": size, "key_form": key_form}
        sealed = await asyncio.to_thread(self._simulator.media.seal, kind, decoded, **how)
        return self._simulator.say_media(to, kind, sealed, url=url, **(fields or {}))

    def _inject_many(self, to: str, messages: list[Json], fill: bool = True) -> Any:
        return self._simulator.inject_many(to, messages, fill=fill)

    async def _media(self, reference: str, raw: bool = False) -> Any:
        """`raw` returns the bytes themselves."""
        content = await asyncio.to_thread(self._simulator.media_content, reference)
        if raw:
            return web.Response(body=io.BytesIO(content), content_type="application/octet-stream")
        return {"content": base64.b64encode(content).decode()}

    def _set_fault(self, **rule: Any) -> Any:
        return self._simulator.set_fault(reading.read(rule, FaultRule))

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

    def _replay(self, bot: str, last: NotNegative = 1) -> Json:
        return self._counted("replayed", self._simulator.replay(bot, last))

    def _flood(self, to: str, messages: Count = 1000, size: Count = 10_000) -> Json:
        return self._counted("bytes", self._simulator.flood(to, messages, size))


def reply(value: Any, *, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")
