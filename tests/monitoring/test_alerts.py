"""Every alert fires where it should and nowhere else, judged by promtool; every one has its page in the runbook."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from adapter.tools.metrics import Metrics
from tests.monitoring.tools import RULES, missing_in, need

JOB = 'namespace="wechat",job="wechat/wechat-nats"'
FIRST, SECOND = f'{JOB},instance="one"', f'{JOB},instance="two"'


class Case(NamedTuple):
    """Samples a minute apart, and what fires at a minute. `about` is the alert that the case was made for."""

    about: str
    says: str
    series: dict[str, str]
    at_min: int
    firing: set[str]


def gauge(name: str, values: str, target: str = FIRST, **labels: str) -> dict[str, str]:
    """A series of a metric of ours."""
    more = "".join(f',{label}="{value}"' for label, value in labels.items())
    return {f"wechat_adapter_{name}{{{target}{more}}}": values}


def bindings(**states: int) -> dict[str, str]:
    return {
        name: values
        for state, n in states.items()
        for name, values in gauge("bindings", f"{n}x800", state=state).items()
    }


def outcomes(**per_minute: float) -> dict[str, str]:
    """Commands that ended, by outcome."""
    made: dict[str, str] = {}
    for outcome, rate in per_minute.items():
        reason = "invalid" if outcome == "refused" else "none"
        made |= gauge("outbound_messages_total", f"0+{rate}x200", kind="text", outcome=outcome, reason=reason)
    return made


def answers(verb: str, **per_minute: int) -> dict[str, str]:
    """Requests of services that were answered, by outcome."""
    made: dict[str, str] = {}
    for outcome, rate in per_minute.items():
        made |= gauge("service_requests_total", f"0+{rate}x200", verb=verb, outcome=outcome)
    return made


def few(**each: int) -> dict[str, str]:
    """So many commands that end within a minute, and as many again a quarter of an hour later."""
    made: dict[str, str] = {}
    for outcome, n in each.items():
        made |= gauge("outbound_messages_total", f"0x15 {n}x14 {2 * n}x100", kind="text", outcome=outcome, reason="x")
    return made


def inbound(count: str, quick: str, failed: str = "0x800") -> dict[str, str]:
    """Messages stored, those of them within two seconds, and those that the stream refused."""
    return (
        gauge("inbound_publish_duration_seconds_count", count)
        | gauge("inbound_publish_duration_seconds_bucket", quick, le="2.0")
        | gauge("inbound_messages_total", failed, kind="text", outcome="publish_failed")
    )


def lag(late: float) -> dict[str, str]:
    """120 samples a minute, so many of them between 0.5 s and 1 s."""
    name = "event_loop_lag_seconds_bucket"
    return {
        **gauge(name, f"0+{120 - late}x60", le="0.5"),
        **gauge(name, "0+120x60", le="1.0"),
        **gauge(name, "0+120x60", le="+Inf"),
    }


def both(one: str, other: str, name: str) -> dict[str, str]:
    return gauge(name, one, FIRST) | gauge(name, other, SECOND)


def up(values: str, target: str = FIRST) -> dict[str, str]:
    return {f"up{{{target}}}": values}


def started(minute: float) -> dict[str, str]:
    """A replica that was started half a minute before this minute."""
    return {f"process_start_time_seconds{{{FIRST}}}": f"{60 * minute - 30:g}x100"}


def server_memory(prefix: str, values: str) -> dict[str, str]:
    return {f'{prefix}_varz_mem{{namespace="nats",job="nats",instance="nats-0"}}': values}


OTHER = 'namespace="wechat",job="database",instance="x"'
FOREIGN = 'namespace="wechat",job="chat",instance="x"'
BURNS = {"InboundBudgetBurnFast", "InboundBudgetBurnSlow"}
CASES = [
    Case("AdapterDown", "one of two is down", up("1x10 0x20") | up("1x30", SECOND), 17, {"AdapterDown"}),
    Case("AdapterDown", "it came back in time", up("1x10 0x3 1x20"), 17, set()),
    Case(
        "AdapterDown",
        "its job has another name, and once showed our metrics",
        up("1x10 0x20", FOREIGN) | gauge("build_info", "1x10 stale", FOREIGN),
        17,
        {"AdapterDown"},
    ),
    Case(
        "AdapterDown",
        "no target is left",
        up("1x10 stale") | gauge("build_info", "1x10 stale"),
        17,
        {"AdapterDown"},
    ),
    Case(
        "AdapterBusDisconnected",
        "one of two has no NATS",
        both("1x30", "1x5 0x20", "nats_connected"),
        9,
        {"AdapterBusDisconnected"},
    ),
    Case("AdapterBusDisconnected", "a short break", both("1x30", "1x5 0 1x20", "nats_connected"), 9, set()),
    Case("AdapterNotReady", "one of two", both("1x30", "1x5 0x20", "ready"), 8, {"AdapterNotReady"}),
    Case("AdapterNotReady", "a start", both("1x30", "0x2 1x20", "ready"), 3, set()),
    Case("PublishOld", "half a minute", both("0x30", "0x5 31x20", "nats_publish_oldest_seconds"), 6, {"PublishOld"}),
    Case("PublishOld", "a slow disk", gauge("nats_publish_oldest_seconds", "0x5 29x20"), 12, set()),
    Case("AgentsUnanswered", "next is 503", answers("next", ok=0, unavailable=60), 5, {"AgentsUnanswered"}),
    Case("AgentsUnanswered", "one in four", answers("next", ok=90, unavailable=30), 20, set()),
    Case("AgentsUnanswered", "one in two verbs", answers("send", ok=60, refused=90), 20, set()),
    Case(
        "PollsUnanswered",
        "none of a replica",
        gauge("newest_poll_age_seconds", "20x5 121x20"),
        6,
        {"PollsUnanswered"},
    ),
    Case("PollsUnanswered", "long polls", gauge("newest_poll_age_seconds", "45x30"), 25, set()),
    Case(
        "BotsUnowned", "one replica knows of some", both("0x30", "0x5 3x20", "bindings_unowned"), 12, {"BotsUnowned"}
    ),
    Case("BotsUnowned", "a takeover", both("0x30", "0x5 40x2 0x20", "bindings_unowned"), 12, set()),
    Case("PollStalled", "one bot hangs", gauge("oldest_poll_age_seconds", "40x5 181+60x20"), 12, {"PollStalled"}),
    Case("PollStalled", "long polls", gauge("oldest_poll_age_seconds", "45x30"), 25, set()),
    Case(
        "StreamsDegraded",
        "a server is lost, as both see",
        both("0x5 13x20", "0x5 13x20", "nats_streams_degraded"),
        12,
        {"StreamsDegraded"},
    ),
    Case("StreamsDegraded", "a server is restarted", gauge("nats_streams_degraded", "0x5 13x3 0x20"), 12, set()),
    Case("BotsFailing", "one of many", bindings(polling=99, retrying=1), 11, {"BotsFailing"}),
    Case(
        "BotsFailing",
        "iLink was away for a few minutes",
        gauge("bindings", "0x5 40x8 0x60", state="retrying") | bindings(polling=60),
        16,
        set(),
    ),
    Case("BotSessionsExpired", "one of many", bindings(polling=99, needs_login=1), 11, {"BotSessionsExpired"}),
    Case("BotSessionsExpired", "none", bindings(polling=100, needs_login=0), 30, set()),
    Case(
        "BotSessionsExpiredMany",
        "an eighth",
        bindings(polling=70, needs_login=10),
        11,
        {"BotSessionsExpired", "BotSessionsExpiredMany"},
    ),
    Case("BotSessionsExpiredMany", "two of two", bindings(polling=0, needs_login=2), 30, {"BotSessionsExpired"}),
    Case("BotSessionsExpiredMany", "a tenth", bindings(polling=90, needs_login=10), 30, {"BotSessionsExpired"}),
    Case(
        "InboundBudgetBurnFast",
        "a thirtieth is late",
        inbound("0+300x800", "0+290x800"),
        63,
        BURNS,
    ),
    Case("InboundBudgetBurnFast", "one in a thousand", inbound("0+1000x800", "0+999x800"), 63, set()),
    Case(
        "InboundBudgetBurnFast",
        "it was over half an hour ago",
        inbound("0+300x100", "0+200x10 2300+300x90"),
        60,
        set(),
    ),
    Case("InboundBudgetBurnFast", "three late ones, and little else", inbound("0+1x100", "0+0x3 1+1x97"), 20, set()),
    Case(
        "InboundBudgetBurnSlow",
        "one in two hundred, all day",
        inbound("0+1000x800", "0+995x800"),
        400,
        {"InboundBudgetBurnSlow"},
    ),
    Case("InboundBudgetBurnSlow", "one in five hundred", inbound("0+1000x800", "0+998x800"), 400, set()),
    Case("OutboundFailures", "a tenth is refused", outcomes(accepted=90, refused=10), 40, {"OutboundFailures"}),
    Case("OutboundFailures", "a twenty-fifth is refused", outcomes(accepted=96, refused=4), 60, set()),
    Case("OutboundFailures", "both of two commands", few(accepted=0, refused=2), 40, set()),
    Case("OutboundFailures", "a few of few, all the time", outcomes(accepted=0.3, refused=0.3), 60, set()),
    Case(
        "OutboundFailures",
        "repeats are no failures, and dilute none",
        outcomes(accepted=96, refused=4, duplicate=900),
        60,
        set(),
    ),
    Case(
        "OutboundUnconfirmed", "a tenth", outcomes(accepted=90, accepted_unconfirmed=10), 50, {"OutboundUnconfirmed"}
    ),
    Case("OutboundUnconfirmed", "a twenty-fifth", outcomes(accepted=96, accepted_unconfirmed=4), 90, set()),
    Case(
        "OutboundBacklogOld",
        "one replica's oldest grows older",
        both("0x40", "0+60x40", "outbound_oldest_pending_seconds"),
        12,
        {"OutboundBacklogOld"},
    ),
    Case("OutboundBacklogOld", "retries of a minute", gauge("outbound_oldest_pending_seconds", "60x40"), 30, set()),
    Case("BotsThrottled", "a quarter", bindings(polling=75, throttled=25), 16, {"BotsThrottled"}),
    Case("BotsThrottled", "four of nine", bindings(polling=5, throttled=4), 30, set()),
    Case("BotsThrottled", "a fifth", bindings(polling=80, throttled=20), 30, set()),
    Case("DeadLetters", "one", gauge("dead_letters_total", "0x5 1x30", stream="out"), 7, {"DeadLetters"}),
    Case("DeadLetters", "one, half an hour ago", gauge("dead_letters_total", "0x5 1x60", stream="out"), 40, set()),
    Case(
        "DeadLetters",
        "three, before the first scrape of a new replica",
        started(10) | gauge("dead_letters_total", "_x10 3x60", stream="out"),
        12,
        {"DeadLetters"},
    ),
    Case(
        "DeadLetters",
        "old ones of a replica that was not scraped for a while",
        started(-600) | gauge("dead_letters_total", "3x20 _x15 3x60", stream="out"),
        45,
        set(),
    ),
    Case("EventLoopSlow", "two in a hundred are late", lag(2.4), 20, {"EventLoopSlow"}),
    Case("EventLoopSlow", "one in two hundred", lag(0.6), 50, set()),
    Case(
        "CapacityNear",
        "the last tenth",
        bindings(polling=91) | gauge("bindings_capacity", "100x100"),
        31,
        {"CapacityNear"},
    ),
    Case(
        "CapacityNear",
        "the other replica has room",
        bindings(polling=90) | both("100x100", "100x100", "bindings_capacity"),
        60,
        set(),
    ),
    Case(
        "SpareCapacityLow",
        "the larger of two replicas must not end",
        bindings(polling=91) | both("100x100", "120x100", "bindings_capacity"),
        31,
        {"SpareCapacityLow"},
    ),
    Case("SpareCapacityLow", "alone", bindings(polling=50) | gauge("bindings_capacity", "100x100"), 60, set()),
    Case(
        "SchemaViolations", "one", gauge("schema_violations_total", "0x5 1x30", kind="svc"), 7, {"SchemaViolations"}
    ),
    Case("SchemaViolations", "one, long ago", gauge("schema_violations_total", "1x60", kind="svc"), 40, set()),
    Case(
        "StreamsDiffer",
        "altered, as one of two replicas has seen so far",
        both("0x30", "0x30", "nats_streams_missing") | both("1x30", "0x30", "nats_streams_altered"),
        3,
        {"StreamsDiffer"},
    ),
    Case(
        "StreamsDiffer",
        "deleted",
        gauge("nats_streams_missing", "2x30") | gauge("nats_streams_altered", "0x30"),
        3,
        {"StreamsDiffer"},
    ),
    Case(
        "StreamsDiffer",
        "made again at once",
        gauge("nats_streams_missing", "0 1 0x30") | gauge("nats_streams_altered", "0x30"),
        20,
        set(),
    ),
    Case(
        "EventsRefused",
        "one receipt",
        gauge("nats_publish_total", "0x5 1x30", stream="event", outcome="refused"),
        7,
        {"EventsRefused"},
    ),
    Case(
        "EventsRefused",
        "a full queue of commands, whose senders are told",
        gauge("nats_publish_total", "0+5x30", stream="out", outcome="refused"),
        20,
        set(),
    ),
    Case("NatsMemoryHigh", "as NATS's chart names it", server_memory("nats", "1e8x5 2e9x20"), 7, {"NatsMemoryHigh"}),
    Case("NatsMemoryHigh", "less than a gibibyte", server_memory("nats", "1e9x20"), 7, set()),
]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def promtool(*arguments: str | Path, given: bytes | None = None) -> str:
    """What it prints. Fails with that, if it finds something."""
    done = subprocess.run([need("promtool"), *arguments], input=given, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def judge(folder: Path, *tests: dict[str, Any]) -> None:
    """Has promtool evaluate the rules over samples a minute apart."""
    (folder / "tests.yaml").write_text(
        yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": list(tests)})
    )
    promtool("test", "rules", folder / "tests.yaml")


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """Exactly those that are expected: an alert that fires for another's trouble is a fault, too.

    One run for all cases, since promtool takes longer to start than to judge; it names those that fail.
    """
    judge(
        tmp_path,
        *(
            {
                "name": f"{case.about}: {case.says}",
                "interval": "1m",
                "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": f"{case.at_min}m",
                        "exp_samples": [
                            {"labels": f'{{alertname="Wechat{name}"}}', "value": 1} for name in sorted(case.firing)
                        ],
                    }
                ],
            }
            for case in CASES
        ),
    )


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    names = {alert["alert"].removeprefix("Wechat") for alert in alerts()}
    assert {case.about for case in CASES if case.about in case.firing} == names
    assert {case.about for case in CASES if case.about not in case.firing} == names


def test_an_alert_says_in_words_what_is_wrong_where(tmp_path: Path) -> None:
    judge(
        tmp_path,
        {
            "interval": "1m",
            "input_series": [
                {"series": f"wechat_adapter_bindings_unowned{{{FIRST}}}", "values": "3x20"},
                {"series": f"wechat_adapter_oldest_poll_age_seconds{{{FIRST}}}", "values": "250x20"},
            ],
            "alert_rule_test": [
                {
                    "alertname": f"Wechat{name}",
                    "eval_time": "10m",
                    "exp_alerts": [
                        {
                            "exp_labels": {
                                "namespace": "wechat",
                                "job": "wechat/wechat-nats",
                                "severity": "critical",
                            },
                            "exp_annotations": {
                                "summary": summary,
                                "description": description,
                                "runbook_url": f"helm/runbook.md#wechat{name.lower()}",
                            },
                        }
                    ],
                }
                for name, summary, description in (
                    (
                        "BotsUnowned",
                        "Bots are polled by nobody.",
                        "3 bindings of wechat/wechat-nats have no poller: beyond capacity, or of partitions without"
                        " an owner.",
                    ),
                    (
                        "PollStalled",
                        "A bot's polls do not come back.",
                        "A bot of wechat/wechat-nats was last answered by iLink 4m 10s ago.",
                    ),
                )
            ],
        },
    )


def test_the_rules_pass_the_linter() -> None:
    assert "SUCCESS" in promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)


def test_the_metrics_pass_the_linter() -> None:
    assert promtool("check", "metrics", given=Metrics().expose()[0]) == ""


def test_rules_ask_for_metrics_and_values_of_labels_that_there_are() -> None:
    """A misspelt name is an alert that never fires: the names in the cases above would be misspelt alike."""
    exposed = Metrics().expose()[0].decode()
    assert [missing for rule in rules() if (missing := missing_in(exposed, rule["expr"]))] == []


def test_every_alert_is_for_a_person() -> None:
    for alert in alerts():
        assert alert["alert"].startswith("Wechat")
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert alert["annotations"]["runbook_url"].partition("#")[2] == alert["alert"].lower()
