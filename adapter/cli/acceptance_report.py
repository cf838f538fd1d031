"""The report of `acceptance`: what was seen, the settings that follow, what it says of the protocol page. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import msgspec

from adapter.cli.output import clock

Facts: TypeAlias = dict[str, Any]
"""What a step has seen, by name. Never an id, a token or a text of a person."""
PAGE = "docs/reference/ilink-protocol.md"
ACCEPTED = ("accepted", "accepted_unconfirmed")
"""Outcomes of a send for which `ret` was 0."""
SENDS, HOURS = 10, 24.0
"""The window as the page has it."""
MAX_BYTES = 16_384
"""Longest text that iLink accepts, as the page has it."""
NOT_SHOWN = ("markdown", "newline")
"""Steps whose text the phone does not show as written, as the page has it."""


VERDICTS = {True: "confirmed", False: "refuted", None: "measured"}


class Result(msgspec.Struct, frozen=True):
    """How a step went. refused: iLink did; held back: the adapter did not ask iLink."""

    title: str
    section: str
    """Of the protocol page, which it is about."""
    status: Literal["done", "skipped", "refused", "held back"]
    at_ms: int
    facts: Facts


class Report(msgspec.Struct, kw_only=True):
    """The state of an acceptance, which the next call goes on with."""

    sandbox: str
    version: str
    steps: dict[str, Result] = {}


def findings(steps: Mapping[str, Result]) -> Iterator[tuple[str, bool | None, str]]:
    """What done steps say of the page: section, whether it is confirmed (None: sources disagree), and words."""
    for name, step in steps.items():
        title, section, facts = step.title, step.section, step.facts
        for fact in [fact for fact, value in facts.items() if isinstance(value, bool)]:
            words = f"{title}, {fact.replace('_', ' ')}: {'yes' if facts[fact] else 'no'}"
            if "last" in facts:
                words += f", cut near {facts['last']:,} characters, {facts['last_bytes']:,} bytes"
            is_said = None if name.startswith("text-") else facts[fact] != (name in NOT_SHOWN)
            yield "Download" if fact == "arrived" else section, is_said, words
        for sent in facts.get("sends", ()):
            if sent["outcome"] == "accepted_unconfirmed" and "shown" in facts:
                yield "Success without a message id", not facts["shown"], f"{title}, `ret` 0 without an id"
        if name == "eleven":
            words = f"send number {min(facts['accepted'] + 1, 11)} was {_result(facts['sends'][0])}"
            yield section, facts["accepted"] == SENDS, f"{words}; the phone shows {facts['shown_sends']}"
        if name == "late":
            sent = facts["sends"][0]
            is_open = sent["outcome"] in ACCEPTED and facts["on_the_phone"] == "y"
            is_said = is_open == (facts["hours"] < HOURS)
            yield section, is_said, f"{facts['hours']} h after the last message a send was {_result(sent)}"


def settings(steps: Mapping[str, Result]) -> Iterator[tuple[str, object, str]]:
    """Settings that follow: name, value, reason."""
    facts = {name: step.facts for name, step in steps.items()}
    login = facts.get("login", {})
    is_old = login.get("asked_to_upgrade") == "y"
    if is_old or login.get("succeeded"):
        value = f"newer than {login['declared']}" if is_old else login["declared"]
        yield "WECHAT_NATS_ILINK_VERSION", value, f"The login ended: {login['status']}."
    texts = [facts[name] for name in facts if name.startswith("text-")]
    if texts := [text for text in texts if text["shown"] or text["last"]]:  # others were not cut, but lost
        chars, size, why = part_limits(texts)
        yield "WECHAT_NATS_PART_CHARS", chars, why
        yield "WECHAT_NATS_PART_BYTES", size, why
    if eleven := facts.get("eleven"):
        most = min(eleven["accepted"], eleven["shown_sends"])
    if eleven and most:  # 0 would be a setting without a limit
        yield "WECHAT_NATS_SENDS_PER_WINDOW", most, f"Of eleven sends {most} were accepted and shown."
    if late := facts.get("late"):
        is_early = late["sends"][0]["outcome"] != "accepted" and late["hours"] < HOURS
        why = f"A send {late['hours']} h after the last message was {late['sends'][0]['outcome']}."
        yield "WECHAT_NATS_WINDOW_HOURS", f"below {late['hours']}" if is_early else HOURS - 1, why


def part_limits(texts: list[Facts]) -> tuple[int, int, str]:
    """The longest part that the phone shows whole, in characters and in bytes, and the reason.

    A unit explains the cuts if no text was shown beyond the shortest of them. If both or none do, both limits count.
    """
    shown = [(t["chars"], t["bytes"]) if t["shown"] else (t["last"], t["last_bytes"]) for t in texts]
    cuts = [one for one, text in zip(shown, texts, strict=True) if not text["shown"]]
    if not cuts:
        return max(shown)[0], MAX_BYTES, "No text was cut."
    chars, size = (min(cut[unit] for cut in cuts) for unit in (0, 1))
    by_chars = all(one[0] <= chars + 10 for one in shown)  # ten characters lie between two numbers
    by_bytes = all(one[1] <= size + 20 for one in shown)
    if by_chars == by_bytes:
        return chars, size, "Texts were cut, by an unknown unit."
    unit = f"{chars:,} characters" if by_chars else f"{size:,} bytes"
    return chars if by_chars else size, MAX_BYTES if by_chars else size, f"Texts were cut at about {unit}."


def markdown(report: Report) -> str:
    """The report for people."""
    done = {name: step for name, step in report.steps.items() if step.status == "done"}
    return "\n".join(
        (
            f"# Acceptance of {report.sandbox}\n",
            f"wechat-nats {report.version}. Steps that are done: {len(done)}.\n",
            "| step | when | how | seen |\n|---|---|---|---|",
            *(f"| {s.title} | {clock(s.at_ms)} | {s.status} | {_words(s.facts)} |" for s in report.steps.values()),
            "\n## Settings that follow\n",
            "| setting | value | why |\n|---|---|---|",
            *(f"| `{name}` | {value} | {why} |" for name, value, why in settings(done)),
            "\n## Sections of the protocol page\n",
            *(
                f"- [{section}]({PAGE}#{section.lower().replace(' ', '-')}): **{VERDICTS[is_confirmed]}**: {words}."
                for section, is_confirmed, words in findings(done)
            ),
            "",
        )
    )


def _words(facts: Facts) -> str:
    told = [f"{name.replace('_', ' ')}: {value}" for name, value in facts.items() if name != "sends"]
    sends = facts.get("sends", ())
    told += [f"{_result(sent)}, ids: {sent['messages']}, {sent['took_ms']} ms" for sent in sends]
    return "; ".join(told).replace("|", "/").replace("True", "yes").replace("False", "no")


def _result(sent: Facts) -> str:
    """The end of a send, with what iLink said."""
    said = [f"{name} {sent[name]}" for name in ("reason", "ret", "errcode", "errmsg") if sent[name] not in ("", None)]
    return f"{sent['outcome']} ({', '.join(said)})" if said else str(sent["outcome"])
