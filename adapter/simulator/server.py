"""The HTTP server of the iLink API: paths, authentication, transport faults, and the writing of answers."""

import re
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from adapter.simulator import answers
from adapter.simulator.answers import HttpAnswer, json_answer
from adapter.simulator.endpoints import Call, Endpoints, malformed
from adapter.simulator.faults import FaultRule
from adapter.simulator.login import QrLogins
from adapter.simulator.outbox import stale_body, text_of
from adapter.simulator.parameters import GARBLED
from adapter.simulator.records import Json
from adapter.simulator.watch import ClientWatch
from adapter.simulator.world import Bot, World

LOGIN_METHODS = {"get_bot_qrcode": ("GET", "POST"), "get_qrcode_status": ("GET",)}
PLAIN = {"ret": 0, "msgs": [], "get_updates_buf": ""}


class Visit(Struct):
    """One request in progress. `user` is the user that it concerns, for faults that strike one user; `second` says
    that it came to the second listener; `edge` is the rule (fault `F2`) that cuts the poll if it waits in vain;
    `late` is the fault that strikes after processing."""

    request: web.Request
    endpoint: str
    bot: Bot | None
    body: Json | None
    start_ms: float
    user: str = ""
    second: bool = False
    edge: FaultRule | None = None
    late: FaultRule | None = None

    @property
    def bot_id(self) -> str:
        return self.bot.id if self.bot else ""


def endpoint_of(path: str) -> str:
    """`getupdates` for `//ilink/bot/getupdates/`, and "" for a path outside iLink."""
    plain = re.sub("/+", "/", path).strip("/")
    return plain.removeprefix("ilink/bot/") if plain.startswith("ilink/bot/") else ""


async def read_bytes(request: web.Request) -> bytes:
    """The body of the request. A body that cannot be decompressed is returned as bytes that are no JSON."""
    try:
        return await request.read()
    except web.RequestPayloadError:
        return b"\0"


def read_json(raw: bytes) -> Json | None:
    """The JSON object in `raw`, or None. Integers keep all their digits; an empty body is no object."""
    try:
        value: Any = without_nulls(msgspec.json.decode(raw))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def without_nulls(value: Any) -> Any:
    """Drops fields that are null: in JSON that mirrors protobuf, null means unset."""
    if isinstance(value, dict):
        return {name: without_nulls(field) for name, field in value.items() if field is not None}
    if isinstance(value, list):
        return [without_nulls(element) for element in value]
    return value


def read_body(endpoint: str, raw: bytes) -> Json | None:
    """Like `read_json`, but a QR code may be requested without a body."""
    return {} if endpoint in LOGIN_METHODS and not raw else read_json(raw)


class Server:
    """Answers the paths below `/ilink/bot/`, and 404 for any other."""

    def __init__(self, world: World, endpoints: Endpoints, logins: QrLogins, watch: ClientWatch) -> None:
        self._world = world
        self._endpoints = endpoints
        self._logins = logins
        self._watch = watch
        self.urls: tuple[str, str] = ("", "")
        """Base URLs of the first and the second listener."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        return await self._handle(request, second=False)

    async def handle_second(self, request: web.Request) -> web.StreamResponse:
        """Handles a request to the listener for redirected logins."""
        return await self._handle(request, second=True)

    async def _handle(self, request: web.Request, *, second: bool) -> web.StreamResponse:
        endpoint = endpoint_of(request.path)
        if endpoint not in self._endpoints.table and endpoint not in LOGIN_METHODS:
            return web.json_response({"error": "not found"}, status=404)
        start_ms = self._world.clock.exact_ms()
        bot = self._bot(request)
        body = read_body(endpoint, await read_bytes(request)) if request.method == "POST" else {}
        self._watch.record_request(request, endpoint, bot, body)
        visit = Visit(request, endpoint, bot, body, start_ms, second=second)
        visit.user = self._user(visit)
        answer = await self._fault_answer(visit)
        if answer is None:
            answer = await self._process(visit)
            if visit.edge is not None and answer.outcome != "F2":
                self._world.faults.give_back(visit.edge)
        return await self._deliver(visit, answer)

    def _bot(self, request: web.Request) -> Bot | None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        return self._world.by_token.get(token.strip()) if scheme == "Bearer" else None

    def _user(self, visit: Visit) -> str:
        if visit.endpoint in LOGIN_METHODS:
            return self._logins.user(visit.request.query.get("qrcode", ""))
        body = visit.body or {}
        message = body.get("msg")
        place = message if isinstance(message, dict) else body
        named = place.get("to_user_id") or body.get("ilink_user_id")
        return str(named or (visit.bot.user if visit.bot else ""))

    async def _process(self, visit: Visit) -> HttpAnswer:
        """Processes a request without regard to faults."""
        endpoint, bot = visit.endpoint, visit.bot
        if visit.request.method not in LOGIN_METHODS.get(endpoint, ("POST",)):
            answer = malformed(self._world, endpoint, bot, "wrong method")
            answer.status = 405 if answer.status == 400 else answer.status
            return answer
        if endpoint in LOGIN_METHODS:
            return await self._login(visit)
        if bot is None or self._is_stale(visit, bot):
            return self._stale_answer(visit)
        call = Call(endpoint, bot, visit.body or {}, visit.start_ms, visit.edge)
        if visit.body is None:
            return self._endpoints.malformed(call, "invalid json")
        return await self._endpoints.table[endpoint](call)

    async def _login(self, visit: Visit) -> HttpAnswer:
        query = visit.request.query
        if visit.body is None:
            return malformed(self._world, visit.endpoint, visit.bot, "invalid json")
        if visit.endpoint == "get_bot_qrcode":
            tokens = visit.body.get("local_token_list")
            version = visit.request.headers.get("iLink-App-ClientVersion", "")
            return json_answer(self._logins.create(list(tokens) if isinstance(tokens, list) else [], version))
        if not (code := query.get("qrcode")):
            return malformed(self._world, visit.endpoint, visit.bot, "qrcode required")
        verify_code = query.get("verify_code", "")
        return await self._logins.status(code, verify_code, self.urls, second=visit.second, edge=visit.edge)

    def _is_stale(self, visit: Visit, bot: Bot) -> bool:
        """Whether the token is dead, its headers are missing, or a fault `F8` to `F10` strikes."""
        world, headers = self._world, visit.request.headers
        world.bury_idle(bot)
        if bot.dead:
            return True
        if headers.get("AuthorizationType") != "ilink_bot_token":
            world.violate("missing_authorization_type", visit.endpoint, bot)
            if world.settings_of(bot).require_authorization_type:
                return True
        app_headers = "iLink-App-Id" in headers and "iLink-App-ClientVersion" in headers
        if world.settings_of(bot).strict_headers and not app_headers:
            return True

        def fits(rule: FaultRule) -> bool:
            message = (visit.body or {}).get("msg")
            said = text_of(message.get("item_list")) if isinstance(message, dict) else ""
            return str(rule.params.get("text", "")) in said

        faults = ("F8", "F9", "F10")
        return any(world.faults.strike(fault, visit.endpoint, bot.id, visit.user, fits) for fault in faults)

    def _stale_answer(self, visit: Visit) -> HttpAnswer:
        """-14. Counts the answer with the bot, and records a violation if the client goes on calling."""
        bot = visit.bot
        if bot is None:
            self._world.violate("unknown_token", visit.endpoint, None)
            return json_answer(stale_body(self._world, None))
        if bot.dead and bot.stale_answers:
            self._world.violate("call_after_minus_14", visit.endpoint, bot, f"call {bot.stale_answers + 1}")
        bot.stale_answers += 1
        answer = json_answer(stale_body(self._world, bot))
        call = Call(visit.endpoint, bot, visit.body or {}, visit.start_ms)
        self._endpoints.record_unprocessed(call, answer, "stale")
        return answer

    async def _fault_answer(self, visit: Visit) -> HttpAnswer | None:
        """The answer of a fault `F1` to `F6` that strikes before processing. Later faults are in `visit`."""
        for fault in ("F1", "F2", "F3", "F4", "F5", "F6"):
            rule = self._world.faults.strike(fault, visit.endpoint, visit.bot_id, visit.user)
            if rule is None:
                continue
            if fault == "F2":
                visit.edge = rule
                return None
            late = rule.params.get("processed", False) or rule.params.get("when") == "after"
            if fault == "F4" or late:
                visit.late = rule
                return None
            answer = self._broken_answer(visit, rule)
            await self._pause(rule, answer)
            return None if fault == "F5" and "hang_ms" in rule.params else answer
        return None

    async def _pause(self, rule: FaultRule, answer: HttpAnswer) -> None:
        """Waits before a fault strikes: `after_ms`, or `hang_ms` of `F5`."""
        pause_ms = float(rule.params.get("after_ms", 0))
        try:
            if rule.fault == "F5":
                await answers.stay_silent(rule, self._world.clock)
            elif pause_ms:
                await self._world.clock.sleep(pause_ms / 1000)
        except BaseException:  # the client hung up
            answer.settle(False, "disconnected")
            raise
        if rule.fault == "F5":
            answer.settle(False, "F5")

    def _broken_answer(self, visit: Visit, rule: FaultRule) -> HttpAnswer:
        """The answer that a fault gives instead of processing."""
        if rule.fault == "F1":
            default = self._world.rng.choice((500, 502, 503, 504))
            answer = answers.error_page(rule, int(rule.params.get("status", default)))
        else:
            answer = json_answer(PLAIN)
            answer.outcome, answer.cut = rule.fault, rule.fault == "F6"
            if rule.fault == "F3":
                answers.garble(answer, self._kind(rule))
        if visit.bot is not None:
            call = Call(visit.endpoint, visit.bot, visit.body or {}, visit.start_ms)
            self._endpoints.record_unprocessed(call, answer, rule.fault)
        return answer

    def _kind(self, rule: FaultRule) -> str:
        return str(rule.params.get("kind") or self._world.rng.choice(GARBLED))

    async def _deliver(self, visit: Visit, answer: HttpAnswer) -> web.StreamResponse:
        """Writes the answer, or what a late fault leaves of it, and calls its `settle`."""
        rule, request = visit.late, visit.request
        answer.content_type = answer.content_type or self._world.settings_of(visit.bot).json_type
        try:
            if rule is not None and rule.fault == "F5":
                await answers.stay_silent(rule, self._world.clock)
            if rule is not None and rule.fault == "F3":
                answers.garble(answer, self._kind(rule))
            if answer.cut or (rule is not None and rule.fault == "F6"):
                answers.reset_connection(request)
                consumed = rule is not None and bool(rule.params.get("consumed", False))
                answer.settle(consumed, "F6" if rule is not None else answer.outcome)
                return web.Response()
            if rule is not None and rule.fault == "F4":
                response = await answers.dribble(request, answer, rule, self._world.clock)
            else:
                response = await answers.write(request, answer)
        except ConnectionError:
            answer.settle(False, "disconnected")
            return web.Response()
        except BaseException:
            answer.settle(False, "disconnected")
            raise
        answer.settle(True, answer.outcome)
        return response
