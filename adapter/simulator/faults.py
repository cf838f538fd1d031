"""The fault rules in force, and the choice of the rule that strikes a request."""

import random
from collections.abc import Callable
from typing import Annotated, Any

from msgspec import Meta, Struct, field

from adapter.simulator import parameters

LOGIN = frozenset({"get_bot_qrcode", "get_qrcode_status"})
API = frozenset(
    {
        *("getupdates", "sendmessage", "getuploadurl", "getconfig", "sendtyping"),
        *("msg/notifystart", "msg/notifystop"),
    }
)
DOWNLOAD = frozenset({"cdn/download"})
CDN = DOWNLOAD | {"cdn/upload"}
FAULTS: dict[str, tuple[frozenset[str], int | None]] = {
    "F1": (API | LOGIN, None),
    "F2": (frozenset({"getupdates", "get_qrcode_status"}), None),
    "F3": (API | LOGIN, None),
    "F4": (API | LOGIN | DOWNLOAD, None),
    "F5": (API | LOGIN | CDN, None),
    "F6": (API | LOGIN | CDN, None),
    "F8": (API, 1),
    "F9": (API, None),
    "F10": (frozenset({"sendmessage"}), None),
    "F11": (frozenset({"sendmessage"}), None),
    "F12": (frozenset({"sendmessage"}), 1),
    "F13": (frozenset({"sendmessage"}), None),
    "F14": (frozenset({"sendmessage"}), None),
    "F15": (frozenset({"sendmessage"}), None),
    "F16": (frozenset({"inject"}), None),
    "F18": (frozenset({"getupdates"}), 1),
    "F19": (frozenset({"getupdates"}), None),
    "F20": (frozenset({"getupdates"}), None),
    "F21": (frozenset({"getupdates"}), None),
    "F23": (frozenset({"get_qrcode_status"}), None),
    "F24": (frozenset({"cdn/upload"}), None),
    "F25": (DOWNLOAD, None),
    "F26": (frozenset({"getconfig"}), None),
    "F27": (frozenset({"get_qrcode_status"}), None),
}
"""The endpoints that a fault can strike, and its default count, by fault id."""


EDGE_MS = 16_000
"""Time after which the edge of some hosts cuts a poll (fault `F2`)."""


class FaultRule(Struct, kw_only=True, forbid_unknown_fields=True):
    """A rule strikes requests that match `endpoint`, `bot` and `user` (None matches any). It strikes `count` times
    (None: the default in FAULTS; -1: without limit), each time with `probability`. README.md lists the `params`."""

    fault: str
    endpoint: str | None = None
    bot: str | None = None
    user: str | None = None
    probability: Annotated[float, Meta(ge=0, le=1)] = 1.0
    count: Annotated[int, Meta(ge=-1)] | None = None
    params: dict[str, Any] = field(default_factory=dict)
    id: int = 0
    struck: int = 0
    """Number of times that the rule has struck."""
    state: dict[str, float] = field(default_factory=dict)
    """State of a fault that keeps one (fault `F12`), by user."""


def edge_s(rule: FaultRule) -> float:
    """Time that the edge lets a poll wait (fault `F2`)."""
    return float(rule.params.get("after_ms", EDGE_MS)) / 1000


class Faults:
    """The rules in force, oldest first. Chance comes from the simulator's seeded generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rules: list[FaultRule] = []
        self._rng = rng
        self._last_id = 0

    def check(self, rule: FaultRule) -> None:
        """Raises ValueError for a rule that could never strike as written."""
        if rule.fault not in FAULTS:
            raise ValueError(f"unknown fault {rule.fault}, there are {', '.join(FAULTS)}")
        endpoints, _ = FAULTS[rule.fault]
        if rule.endpoint is not None and rule.endpoint not in endpoints:
            raise ValueError(f"{rule.fault} strikes {', '.join(sorted(endpoints))} only")
        reached = endpoints if rule.endpoint is None else {rule.endpoint}
        if rule.bot is not None and LOGIN.issuperset(reached):
            raise ValueError("a login has no bot yet; give the user who scans")
        if rule.user is not None and reached == {"get_bot_qrcode"}:
            raise ValueError("nobody has scanned a code that is only asked for")
        parameters.check(rule.fault, rule.params)

    def add(self, rule: FaultRule) -> FaultRule:
        """Puts a checked rule in force."""
        _, count = FAULTS[rule.fault]
        if rule.count is None:
            rule.count = -1 if count is None else count
        self._last_id += 1
        rule.id = self._last_id
        self.rules.append(rule)
        return rule

    def remove(self, rule_id: int | None = None, fault: str | None = None) -> int:
        """Removes one rule, all rules of one fault, or all rules. Returns the number of removed rules."""
        kept = [
            rule
            for rule in self.rules
            if (rule_id is not None and rule.id != rule_id) or (fault is not None and rule.fault != fault)
        ]
        removed = len(self.rules) - len(kept)
        self.rules = kept
        return removed

    def strike(
        self,
        fault: str,
        endpoint: str,
        bot: str,
        user: str = "",
        fits: Callable[[FaultRule], bool] = lambda rule: True,
    ) -> FaultRule | None:
        """Returns the rule by which `fault` strikes now, and counts the strike; None if no rule strikes. A rule that
        `fits` rejects is skipped and not counted."""
        for rule in self.rules:
            if rule.fault == fault and rule.count != 0 and fits(rule) and self._strikes(rule, endpoint, bot, user):
                rule.struck += 1
                if rule.count is not None and rule.count > 0:
                    rule.count -= 1
                return rule
        return None

    def give_back(self, rule: FaultRule) -> None:
        """Takes back one count: the request that `rule` was chosen for was spared after all."""
        rule.struck -= 1
        if rule.count is not None and rule.count >= 0:
            rule.count += 1

    def find(self, fault: str, endpoint: str, bot: str, user: str = "") -> list[FaultRule]:
        """The rules that match, whatever is left of their counts. Does not count, and does not draw chance."""
        return [r for r in self.rules if r.fault == fault and self._matches(r, endpoint, bot, user)]

    def _strikes(self, rule: FaultRule, endpoint: str, bot: str, user: str) -> bool:
        if not self._matches(rule, endpoint, bot, user):
            return False
        return rule.probability >= 1 or self._rng.random() < rule.probability

    def _matches(self, rule: FaultRule, endpoint: str, bot: str, user: str) -> bool:
        endpoints, _ = FAULTS[rule.fault]
        return (
            endpoint in endpoints
            and rule.endpoint in (None, endpoint)
            and rule.bot in (None, bot)
            and rule.user in (None, user)
        )
