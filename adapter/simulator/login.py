"""The QR login on the server's side: a state machine that the phone drives.

docs/reference/ilink-protocol.md, "Login", describes the states.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from adapter.simulator import ids
from adapter.simulator.answers import HttpAnswer, gateway_timeout, json_answer
from adapter.simulator.faults import FaultRule, edge_s
from adapter.simulator.records import Json, QrRecord, SimulatorError
from adapter.simulator.world import Bot, World

RESTING = frozenset({"wait", "scaned", "need_verifycode"})
"""Statuses that are told once. A later poll is held until the status changes."""
CODES_KEPT = 10_000
QR_URL = "https://liteapp.weixin.qq.com/q/sim"
UPGRADE = "Please upgrade WeChat interface version in OpenClaw / 请在OpenClaw中升级微信接口版本"
"""What the phone shows where the client's version is too old."""


@dataclass(slots=True, eq=False)
class Qr:
    """One code. `told` is the status of the last answer that was written whole; a poll is held while the client
    cannot know another one."""

    code: str
    created_ms: int
    tokens: list[str]
    is_outdated: bool = False
    """The phone refuses its client's version."""
    status: str = "wait"
    told: str = "wait"
    user: str = ""
    verify_code: str = ""
    verify_code_for_scan: str = ""
    wrong_codes: int = 0
    redirected: bool = False
    bot: Bot | None = None
    polls: int = 0
    waiting: "set[asyncio.Future[None]]" = field(default_factory=set)

    def change(self, status: str) -> None:
        self.status = status
        self.wake()

    def wake(self) -> None:
        for future in self.waiting:
            if not future.done():
                future.set_result(None)

    def record(self) -> QrRecord:
        return QrRecord(
            qrcode=self.code,
            status="scaned_but_redirect" if self.redirected and self.status in RESTING else self.status,
            user=self.user,
            bot=self.bot.id if self.bot else "",
            created_ms=self.created_ms,
            polls=self.polls,
            phone=UPGRADE if self.is_outdated and self.user else "",
        )


class QrLogins:
    """All codes. The phone calls `scan`, `confirm` and the like; the client calls `create` and `status`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.codes: dict[str, Qr] = {}
        self.closing = False

    def create(self, tokens: list[str], version: str) -> Json:
        """`version`: `iLink-App-ClientVersion` of the client, or ""."""
        world = self._world
        if tokens and world.settings.listed_tokens == "refused":
            return {"ret": -2}
        oldest = world.settings.oldest_version
        is_outdated = bool(oldest) and (ids.read_version(version) or ()) < tuple(map(int, oldest.split(".")))
        qr = Qr(ids.new_qrcode(world.rng), world.clock.now_ms(), tokens, is_outdated)
        self.codes[qr.code] = qr
        while len(self.codes) > CODES_KEPT:
            self.codes.pop(next(iter(self.codes)))
        world.clock.schedule(world.settings.qr_ttl_s, lambda: self._expire_if_over(qr))
        return {
            "ret": 0,
            "qrcode": qr.code,
            "qrcode_img_content": f"{QR_URL}?qrcode={qr.code}",
        }

    async def status(
        self, code: str, verify_code: str, urls: tuple[str, str], *, second: bool, edge: FaultRule | None = None
    ) -> HttpAnswer:
        """Waits for a change, or until the hold is over. `urls` are the base URLs of the first and the second host;
        `second` says that the second was asked; `edge` is the rule (fault `F2`) that cuts a poll without news."""
        qr = self.codes.get(code)
        if qr is None:
            return json_answer({"ret": 0, "status": "expired"})
        qr.polls += 1
        if struck := self._fault_answer(qr, verify_code):
            return json_answer(struck)
        if verify_code and qr.status == "need_verifycode":
            self._check(qr, verify_code)
        elif not await self._wait_for_news(qr, second=second, edge=edge) and edge is not None:
            return gateway_timeout(edge)
        if qr.redirected and not second:
            return json_answer(self._redirect(qr, urls[1]))
        return self._answer_status(qr, urls[1] if second else urls[0])

    def user(self, code: str) -> str:
        """The user who scanned the code, or "" if nobody has or the code is unknown."""
        return self.codes[code].user if code in self.codes else ""

    def scan(self, code: str, user: str | None = None) -> QrRecord:
        """The phone scans. One code serves one user, who may scan it again without effect. A user whose bot's token
        is listed needs no new bot."""
        qr = self._live_code(code)
        if qr.user and qr.user != user:
            raise SimulatorError("somebody else has scanned this code")
        if qr.user:
            return qr.record()
        qr.user = user or ids.new_user(self._world.rng)
        if qr.is_outdated:
            return qr.record()
        bound = self._world.by_user.get(qr.user)
        if bound is not None and not bound.dead and bound.token in qr.tokens:
            qr.change("binded_redirect")
        elif qr.verify_code_for_scan:
            qr.verify_code, qr.verify_code_for_scan = qr.verify_code_for_scan, ""
            qr.change("need_verifycode")
        else:
            qr.change("scaned")
        return qr.record()

    def require_verify(self, code: str, verify_code: str) -> QrRecord:
        """The phone shows digits that the client must send. Before a scan, the scan asks for them."""
        qr = self._live_code(code)
        if qr.status == "wait":
            qr.verify_code_for_scan = verify_code
        else:
            qr.verify_code = verify_code
            qr.change("need_verifycode")
        return qr.record()

    def confirm(self, code: str, user: str | None = None) -> QrRecord:
        """The user agrees on the phone, which scans first if needed. The simulator makes a new bot."""
        qr = self._live_code(code)
        if not qr.user:
            self.scan(code, user)
        elif user is not None and user != qr.user:
            raise SimulatorError("somebody else has scanned this code")
        if qr.status != "scaned":
            if qr.status == "binded_redirect" or qr.is_outdated:
                return qr.record()
            raise SimulatorError(f"cannot confirm while the status is {qr.status}")
        qr.bot = self._world.add_bot(qr.user)
        qr.change("confirmed")
        return qr.record()

    def expire(self, code: str) -> QrRecord:
        qr = self._find(code)
        qr.change("expired")
        return qr.record()

    def redirect(self, code: str) -> QrRecord:
        """The first host sends the client to the second one from now on."""
        qr = self._live_code(code)
        qr.redirected = True
        qr.wake()
        return qr.record()

    def close(self) -> None:
        """Answers every waiting poll with the present status."""
        self.closing = True
        for qr in self.codes.values():
            qr.wake()

    def _find(self, code: str) -> Qr:
        if code not in self.codes:
            raise SimulatorError("no such QR code")
        return self.codes[code]

    def _live_code(self, code: str) -> Qr:
        qr = self._find(code)
        if qr.status in ("expired", "confirmed", "verify_code_blocked"):
            raise SimulatorError(f"the code is {qr.status}")
        return qr

    def _expire_if_over(self, qr: Qr) -> None:
        if qr.status not in ("confirmed", "binded_redirect"):
            qr.change("expired")

    async def _wait_for_news(self, qr: Qr, *, second: bool, edge: FaultRule | None) -> bool:
        """Waits for a change of the status; returns False if the hold is over first. `told` alone is not enough: with
        two polls, the answer to the first sets it, and the second has not heard the status either."""
        clock, began = self._world.clock, qr.status
        hold_s = self._world.settings.qr_hold_ms / 1000
        deadline_s = clock.elapsed_s() + (hold_s if edge is None else min(hold_s, edge_s(edge)))
        while qr.status in RESTING and qr.status == qr.told == began and (second or not qr.redirected):
            if self.closing or (left_s := deadline_s - clock.elapsed_s()) <= 0:
                return False
            woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            qr.waiting.add(woken)
            try:
                await clock.wait(woken, left_s)
            finally:
                qr.waiting.discard(woken)
        return True

    def _check(self, qr: Qr, verify_code: str) -> None:
        if verify_code == qr.verify_code:
            qr.change("scaned")
        else:
            self._refuse_code(qr)

    def _refuse_code(self, qr: Qr) -> None:
        qr.wrong_codes += 1
        if qr.wrong_codes >= self._world.settings.verify_attempts:
            qr.change("verify_code_blocked")

    def _answer_status(self, qr: Qr, base_url: str) -> HttpAnswer:
        """The present status, which counts as told once the answer is written."""
        status = qr.status

        def settle(written: bool, outcome: str) -> None:
            if written:
                qr.told = status

        answer = json_answer(self._credentials(qr, base_url) if qr.bot else {"ret": 0, "status": status})
        answer.settle = settle
        return answer

    def _redirect(self, qr: Qr, second_url: str) -> Json:
        answer: Json = {"ret": 0, "status": "scaned_but_redirect"}
        host: str | None = second_url.partition("://")[2]
        if rule := self._strike("F23", qr, lambda rule: "redirect_host" in rule.params):
            host = rule.params["redirect_host"]
        if host is None:
            qr.redirected = False
        else:
            answer["redirect_host"] = host
        return answer

    def _credentials(self, qr: Qr, base_url: str) -> Json:
        if qr.bot is None:
            raise SimulatorError("not confirmed")
        answer: Json = {
            "ret": 0,
            "status": "confirmed",
            "bot_token": qr.bot.token,
            "ilink_bot_id": qr.bot.id,
            "ilink_user_id": qr.bot.user,
            "baseurl": base_url,
        }
        if rule := self._strike("F23", qr, lambda rule: "baseurl" in rule.params):
            answer["baseurl"] = rule.params["baseurl"]
        if self._strike("F27", qr, lambda rule: rule.params["kind"] == "no_bot_id"):
            del answer["ilink_bot_id"]
        return answer

    def _fault_answer(self, qr: Qr, verify_code: str) -> Json | None:
        """The answer of fault `F27`, by `kind`: `expired`, `blocked`, `wrong_code`. `_credentials` handles
        `no_bot_id`."""
        demanded = bool(verify_code) and qr.status == "need_verifycode"
        kinds = ("expired", "blocked", "wrong_code") if demanded else ("expired", "blocked")
        rule = self._strike("F27", qr, lambda rule: rule.params["kind"] in kinds)
        if rule is None:
            return None
        match rule.params["kind"]:
            case "wrong_code":
                self._refuse_code(qr)
            case "expired":
                qr.change("expired")
            case "blocked":
                qr.change("verify_code_blocked")
        return {"ret": 0, "status": qr.status}

    def _strike(self, fault: str, qr: Qr, fits: Callable[[FaultRule], bool]) -> FaultRule | None:
        return self._world.faults.strike(fault, "get_qrcode_status", "", qr.user, fits)
