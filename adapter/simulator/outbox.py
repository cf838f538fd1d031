"""Messages from bots to users: the answer of `sendmessage`, and the message on the phone."""

import itertools
import re
from collections import deque
from typing import Any

from msgspec import Struct

from adapter.simulator.faults import FaultRule
from adapter.simulator.media import MediaStore
from adapter.simulator.records import Json, Shown
from adapter.simulator.world import CLIENT_IDS_KEPT, Bot, WindowState, World

PAYLOADS = {
    1: "text_item",
    2: "image_item",
    3: "voice_item",
    4: "file_item",
    5: "video_item",
    11: "tool_call_start_item",
    12: "tool_call_result_item",
}
TOOL_CALLS = (11, 12)
CODE_OR_TAG = re.compile(
    r"(?P<code>^(?:[ ]|[-*+][ ]|[0-9]+[.)][ ])*(?P<fence>```+|~~~+).*?(?:^[ ]*(?P=fence)[`~ ]*$|\Z)"
    r"|(?<!`)(?P<marks>`+)(?!`)[^\n]*?(?<!`)(?P=marks)(?!`))|<[^\n]*",
    re.MULTILINE | re.DOTALL,
)
"""The phone takes each `<` outside code for the start of a tag, to the end of the line (T #245)."""
FIELDS = frozenset(
    {
        *("from_user_id", "to_user_id", "client_id", "message_type", "message_state"),
        *("item_list", "context_token", "run_id"),
    }
)
"""The fields that a sent message may have."""


class SendOutcome(Struct, kw_only=True):
    """The outcome of one send. `body` None means an empty body. `why` is that of `SendRecord`."""

    body: Json | None
    why: str
    message_id: str = ""

    @property
    def shown(self) -> bool:
        return self.why == "shown"


def refusal(code: int, why: str, errmsg: str | None = None, field: str = "ret") -> SendOutcome:
    body: Json = {field: code}
    if errmsg is not None:
        body["errmsg"] = errmsg
    return SendOutcome(body=body, why=why)


def stale_body(world: World, bot: Bot | None) -> Json:
    """The answer to a request whose token is unknown, missing or dead."""
    style = world.settings_of(bot).stale_style
    code = {"errcode": {"errcode": -14}, "ret": {"ret": -14}, "both": {"ret": -14, "errcode": -14}}[style]
    return {**code, "errmsg": "session timeout"}


def text_of(items: Any) -> str:
    """The texts of all items of a message, joined, or "" if no item has a text."""
    if not isinstance(items, list):
        return ""
    texts = [i["text_item"].get("text") for i in items if isinstance(i, dict) and _is_object(i, "text_item")]
    return "".join(text for text in texts if isinstance(text, str))


def _is_object(item: Json, key: str) -> bool:
    return isinstance(item.get(key), dict)


class Outbox:
    """Judges sends in the order in which they arrive. The phone shows them in the same order."""

    def __init__(self, world: World, media: MediaStore) -> None:
        self._world = world
        self._media = media

    def send(self, bot: Bot, message: Json) -> SendOutcome:
        """Does everything of `sendmessage` between reading the request and writing the answer."""
        user = str(message.get("to_user_id") or "")
        self._note_careless(bot, message)
        verdict = (
            self._fault_verdict(bot, user)
            or self._malformed_verdict(bot, message)
            or self._unknown_peer(bot, user)
            or self._not_started(bot)
            or self._duplicate(bot, user, message)
            or self._window_closed(bot, user)
            or self._context_refused(bot, user, message)
            or self._accept(bot, user, message)
        )
        self._count(verdict)
        return verdict

    def release(self, bot: Bot, user: str, message: Json, message_id: str) -> None:
        """Shows a message on the phone now."""
        items = [self._as_shown(bot, item) for item in message.get("item_list") or []]
        views = (self._media.view(bot, item) for item in items)
        shown = Shown(
            bot=bot.id,
            client_id=str(message.get("client_id") or ""),
            message_id=message_id,
            text=text_of(items),
            items=items,
            at_ms=self._world.clock.exact_ms(),
            media=[view for view in views if view is not None],
        )
        phone = self._world.phones.setdefault(user, deque())
        phone.append(shown)
        while len(phone) > self._world.share(self._world.settings.sends_per_bot, least=200):
            phone.popleft()
        self._world.counts["shown"] += 1
        for hear in self._world.listeners:
            hear(user, shown)

    def _as_shown(self, bot: Bot, item: Json) -> Json:
        """The item on the phone, which may hide a part of its text, and cut it (`cut_chars`, `cut_bytes`)."""
        text, settings = text_of([item]), self._world.settings_of(bot)
        shown = CODE_OR_TAG.sub(lambda found: found["code"] or "", text) if "<" in text else text
        shown = shown[: settings.cut_chars or None].encode()[: settings.cut_bytes or None].decode(errors="ignore")
        return item if shown == text else {**item, "text_item": {**item["text_item"], "text": shown}}

    def _note_careless(self, bot: Bot, message: Json) -> None:
        """Records violations, whatever the answer is."""
        items = message.get("item_list")
        faults = {
            "missing_client_id": not message.get("client_id"),
            "several_items": isinstance(items, list) and len(items) > 1,
            "wrong_message_type": message.get("message_type") != 2,
            "wrong_message_state": message.get("message_state") != 2,
            "wrong_from_user_id": message.get("from_user_id") != "",
            "message_fields": not FIELDS.issuperset(message),
        }
        for kind in (kind for kind, found in faults.items() if found):
            self._world.violate(kind, "sendmessage", bot)

    def _fault_verdict(self, bot: Bot, user: str) -> SendOutcome | None:
        """Faults `F11` and `F12`: -2 or another code, for a reason that the client cannot see."""
        if rule := self._world.faults.strike("F11", "sendmessage", bot.id, user):
            texts = rule.params.get("errmsgs") or [rule.params.get("errmsg", "prepare failed")]
            code, field = int(rule.params.get("code", -2)), str(rule.params.get("field", "ret"))
            return refusal(code, "F11", texts[(rule.struck - 1) % len(texts)], field)
        now_ms = self._world.clock.now_ms()
        for rule in self._world.faults.find("F12", "sendmessage", bot.id, user):
            if until_ms := rule.state.get(user):
                if now_ms < until_ms:
                    return self._penalise(rule, user)
                del rule.state[user]
                return None
        begun = self._world.faults.strike(
            "F12", "sendmessage", bot.id, user, lambda rule: self._is_burst(bot, user, rule)
        )
        return self._penalise(begun, user) if begun else None

    def _is_burst(self, bot: Bot, user: str, rule: FaultRule) -> bool:
        """Whether the number of sends within `burst_s` has reached the burst of the rule."""
        since_ms = self._world.clock.exact_ms() - float(rule.params.get("burst_s", 1)) * 1000
        recent = itertools.takewhile(lambda send: send.start_ms >= since_ms, reversed(bot.sends))
        return sum(send.shown and send.user == user for send in recent) >= int(rule.params.get("burst", 0))

    def _penalise(self, rule: FaultRule, user: str) -> SendOutcome:
        """Every attempt restarts the penalty, so it ends only after a pause."""
        penalty_ms = float(rule.params.get("penalty_s", 3600)) * 1000
        rule.state[user] = self._world.clock.now_ms() + penalty_ms
        return refusal(-2, "F12", rule.params.get("errmsg", "rate limited"))

    def _malformed_verdict(self, bot: Bot, message: Json) -> SendOutcome | None:
        items, settings = message.get("item_list"), self._world.settings_of(bot)
        if not isinstance(items, list) or not items:
            return self._incomplete_verdict(bot, "empty_item_list")
        if len(items) > 1 and settings.several_items == "refused":
            return refusal(-2, "several_items", "unknown error")
        for item in items:
            kind = item.get("type") if isinstance(item, dict) else None
            payload = PAYLOADS.get(kind) if type(kind) is int else None
            if payload is None or not _is_object(item, payload):
                return self._incomplete_verdict(bot, "malformed_item")
            text = item["text_item"].get("text") if kind == 1 else None
            if kind == 1 and (not isinstance(text, str) or (not text and settings.incomplete_sends == "-14")):
                return self._incomplete_verdict(bot, "malformed_item")
        if len(text_of(items).encode()) > settings.max_text_bytes:
            return refusal(-2, "text_too_long", "prepare failed")
        return None

    def _incomplete_verdict(self, bot: Bot, why: str) -> SendOutcome:
        """-2, or the answer to a dead token, as one project saw it while the session lived."""
        if self._world.settings_of(bot).incomplete_sends == "-14":
            return SendOutcome(body=stale_body(self._world, bot), why=why)
        return refusal(-2, why, "unknown error")

    def _unknown_peer(self, bot: Bot, user: str) -> SendOutcome | None:
        """-3 if no user has this id in exactly this spelling. A known user who never wrote only lacks a window."""
        known = user in bot.windows or user == bot.user or user in self._world.by_user
        if not user.endswith("@im.wechat") or not known:
            return refusal(-3, "bad_user_id")
        return None

    def _not_started(self, bot: Bot) -> SendOutcome | None:
        if self._world.settings_of(bot).require_notifystart and not bot.online:
            return refusal(-2, "not_started", "prepare failed")
        return None

    def _duplicate(self, bot: Bot, user: str, message: Json) -> SendOutcome | None:
        """Success for a repeated message, which the phone does not show again."""
        client_id = str(message.get("client_id") or "")
        first_id = bot.window(user).client_ids.get(client_id) if client_id else None
        if first_id is None:
            return None
        if self._world.settings_of(bot).duplicate_counts:
            if closed := self._window_closed(bot, user):
                return closed
            bot.window(user).sent += 1
        return self._success(bot, "duplicate", first_id)

    def _window_closed(self, bot: Bot, user: str) -> SendOutcome | None:
        settings, window = self._world.settings_of(bot), bot.window(user)
        if window.opened_ms is None:
            self._world.violate("send_before_inbound", "sendmessage", bot)
            return refusal(-2, "no_conversation", "prepare failed")
        if self._world.clock.now_ms() - window.opened_ms > settings.window_hours * 3_600_000:
            self._world.violate("send_outside_window", "sendmessage", bot)
            return refusal(-2, "window_closed", "prepare failed")
        if settings.quota and window.sent >= settings.quota:
            self._world.violate("quota_exceeded", "sendmessage", bot)
            return refusal(-2, "quota", "prepare failed")
        return None

    def _context_refused(self, bot: Bot, user: str, message: Json) -> SendOutcome | None:
        settings, window = self._world.settings_of(bot), bot.window(user)
        token = str(message.get("context_token") or "")
        if settings.context_check == "ignored":
            return None
        if not token:
            self._world.violate("missing_context_token", "sendmessage", bot)
            return self._tokenless_verdict(settings.tokenless)
        if self._world.is_void(token):
            return refusal(-2, "context_token", "prepare failed")
        issued_ms = window.context_tokens.get(token)
        fresh = issued_ms is not None and self._world.clock.now_ms() - issued_ms <= 86_400_000
        latest = next(reversed(window.context_tokens), None)
        if settings.context_check == "must_be_latest" and token != latest:
            return refusal(-2, "context_token", "prepare failed")
        if settings.context_check == "must_match_any_issued_within_24h" and not fresh:
            return refusal(-2, "context_token", "prepare failed")
        return None

    def _tokenless_verdict(self, mode: str) -> SendOutcome | None:
        if mode == "refuse":
            return refusal(-2, "tokenless", "prepare failed")
        return SendOutcome(body={}, why="tokenless") if mode == "drop" else None

    def _accept(self, bot: Bot, user: str, message: Json) -> SendOutcome:
        """Uses up one send of the window, and decides whether the phone shows the message."""
        window, settings = bot.window(user), self._world.settings_of(bot)
        window.sent += 1
        message_id = self._message_id(bot, message)
        hidden = TOOL_CALLS if settings.tool_calls == "hidden" else ()
        if any(item["type"] in hidden for item in message["item_list"]):
            return SendOutcome(body=None, why="tool_call")
        if any(item["type"] == 3 for item in message["item_list"]) and settings.voice_sends != "shown":
            self._remember(window, message, message_id)
            return self._success(bot, "voice", message_id)
        if self._is_silenced(bot, window, message):
            return self._success(bot, "strict_client_id", message_id)
        if dropped := self._dropped_verdict(bot, user, message, message_id):
            return dropped
        self._remember(window, message, message_id)
        if late := self._world.faults.strike("F15", "sendmessage", bot.id, user):
            delay_s = float(late.params.get("delay_s", 60))
            self._world.clock.schedule(delay_s, lambda: self.release(bot, user, message, message_id))
            return self._success(bot, "F15", message_id)
        self.release(bot, user, message, message_id)
        return self._success(bot, "shown", message_id)

    def _message_id(self, bot: Bot, message: Json) -> str:
        """The id of the message: a new one, or the client's own."""
        own = str(message.get("message_id") or "")
        if self._world.settings_of(bot).client_message_id == "kept" and own.isascii() and own.isdigit():
            return own
        return str(next(self._world.message_ids))

    def _success(self, bot: Bot, why: str, message_id: str) -> SendOutcome:
        body: Json = {"message_id": self._world.answered_id(message_id, bot)}
        style = self._world.settings_of(bot).send_ret_style
        # changes every two answers, so that ids of both types come with and without it
        if style == "zero" or (style == "alternate" and bot.ids_answered % 4 < 2):
            body = {"ret": 0} | body
        return SendOutcome(body=body, why=why, message_id=message_id)

    def _is_silenced(self, bot: Bot, window: WindowState, message: Json) -> bool:
        token = str(message.get("context_token") or "")
        if self._world.settings_of(bot).strict_client_id and token in window.silenced:
            return True
        if not message.get("client_id"):
            window.silenced.add(token)
        return False

    def _dropped_verdict(self, bot: Bot, user: str, message: Json, message_id: str) -> SendOutcome | None:
        """Faults `F13` and `F14`: success without an id. By default the phone does not show the message."""
        for fault in ("F13", "F14"):
            if rule := self._world.faults.strike(fault, "sendmessage", bot.id, user):
                if rule.params.get("shown", False):
                    self._remember(bot.window(user), message, message_id)  # on the phone, it is never shown again
                    self.release(bot, user, message, message_id)
                empty: Json | None = None if rule.params.get("body") == "empty" else {}
                return SendOutcome(body={"ret": 0} if fault == "F13" else empty, why=fault)
        return None

    def _remember(self, window: WindowState, message: Json, message_id: str) -> None:
        if client_id := str(message.get("client_id") or ""):
            window.client_ids[client_id] = message_id
            while len(window.client_ids) > self._world.share(CLIENT_IDS_KEPT, least=200):
                window.client_ids.popitem(last=False)

    def _count(self, verdict: SendOutcome) -> None:
        refused = bool(verdict.body and (verdict.body.get("ret") or verdict.body.get("errcode")))
        if verdict.why == "duplicate":
            self._world.counts["duplicates_suppressed"] += 1
        elif refused:
            self._world.counts["refused"] += 1
        elif not verdict.shown:
            self._world.counts["dropped"] += 1
