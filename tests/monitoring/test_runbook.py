"""The runbook has a page for every alert; what it and the other pages for operators tell to ask and to run exists."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from cyclopts import MissingArgumentError

from adapter.cli import build
from adapter.contract.names import Names
from adapter.jetstream import topology
from adapter.settings import Settings
from adapter.tools.metrics import Metrics
from tests.monitoring.test_alerts import alerts, promtool
from tests.monitoring.tools import ROOT, RUNBOOK, missing_in

PARTS = ("Meaning", "Impact", "Look", "Fix", "Escalate")


def sections() -> dict[str, str]:
    """By heading, what is below it."""
    parts = re.split(r"(?m)^#{2,4} (.+)$", RUNBOOK.read_text())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def queries() -> list[str]:
    return [query.strip() for query in blocks(RUNBOOK.read_text(), "promql")]


PAGES = (
    RUNBOOK,
    ROOT / "helm/wechat-nats/README.md",
    ROOT / "README.md",
    ROOT / "docs/tutorial.md",
    *sorted((ROOT / "docs/howto").glob("*.md")),
    ROOT / "helm/nats/README.md",
    ROOT / "schemas/examples/README.md",
)


def commands() -> list[str]:
    """Every command of ours, in blocks and in sentences, without a comment and what is the shell's."""
    text = "".join(page.read_text() for page in PAGES)
    lines = [re.split("[#&>]", line)[0].strip() for block in blocks(text, "sh") for line in block.splitlines()]
    quoted = [found.replace("\n", " ") for found in re.findall(r"`(wechat-nats [^`]+)`", text)]
    return sorted({line for line in [*lines, *quoted] if line.startswith("wechat-nats ")})


def test_every_alert_leads_to_its_page() -> None:
    anchors = {anchor(heading) for heading in sections()}
    for alert in alerts():
        assert alert["annotations"]["runbook_url"].partition("#")[2] in anchors


def test_every_page_says_what_to_look_at_and_what_to_do() -> None:
    found = sections()
    for alert in alerts():
        text = found[alert["alert"]]
        assert [part for part in PARTS if f"**{part}.**" not in text] == [], alert["alert"]
        assert len(blocks(text, "promql")) == 2, alert["alert"]
        assert len(blocks(text, "sh")) == 1, alert["alert"]


def test_there_is_no_page_for_an_alert_that_is_gone() -> None:
    names = {alert["alert"] for alert in alerts()}
    assert {heading for heading in sections() if heading.startswith("Wechat")} == names


def test_links_lead_somewhere() -> None:
    anchors = {anchor(heading) for heading in sections()}
    assert set(re.findall(r"\]\(#([^)]+)\)", RUNBOOK.read_text())) <= anchors


def test_queries_ask_for_metrics_that_there_are(tmp_path: Path) -> None:
    exposed = Metrics().expose()[0].decode()
    assert [missing for query in queries() if (missing := missing_in(exposed, query))] == []
    rules = [{"record": f"page:query{number}", "expr": query} for number, query in enumerate(queries())]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "runbook", "rules": rules}]}))
    promtool("check", "rules", tmp_path / "queries.yaml")


@pytest.mark.parametrize("line", commands())
def test_commands_are_ones_that_there_are(line: str) -> None:
    """Read as the command line is, with all its arguments; a sentence may leave those out that have to be there."""
    words = shlex.split(line.removesuffix(" again"))[1:]
    named = {"--help": "doctor", "unbind": "unbind s1", "login SANDBOX": "login s1"}
    words = named.get(" ".join(words), "").split() or words
    with contextlib.suppress(MissingArgumentError):
        build().parse_args(words, exit_on_error=False, print_error=False)


def test_settings_and_lines_of_the_log_are_called_by_their_names() -> None:
    text = RUNBOOK.read_text()
    known = {field.upper() for field in Settings.__struct_fields__}
    assert set(re.findall(r"WECHAT_NATS_([A-Z_]+)\b", text)) <= known
    source = "".join(path.read_text() for path in (ROOT / "adapter").rglob("*.py"))
    for event in re.findall(r"`([a-z_]+\.[a-z_]+)`", text):
        assert f'"{event}"' in source or event == "alerts.yaml", event


def test_dead_letters_are_kept_as_long_as_is_said() -> None:
    (dead,) = [each for each in topology.wanted_streams(Names(), Settings()) if each.name == Names().stream_dead]
    days = f"kept for {dead.config['max_age'] // (24 * 3600 * 10**9)} days"
    assert days in sections()["Read and retry dead letters"]
    assert days in (ROOT / "adapter/console/templates/dead.html").read_text()


def test_every_warning_in_the_log_is_explained() -> None:
    """By its name, or by the end of it."""
    sources = "".join(file.read_text() for file in (ROOT / "adapter").rglob("*.py") if "simulator" not in file.parts)
    events = set(re.findall(r'log\.(?:warning|error|exception)\(\s*"([a-z_]+\.[a-z_]+)"', sources))
    assert len(events) > 50
    text = RUNBOOK.read_text()
    ends = [word for row in re.findall(r"(?m)^\| (`.*?) \|", sections()["Read the log"]) for word in row.split(", ")]
    known = tuple(word.strip("`") for word in ends)
    assert not [event for event in events if f"`{event}`" not in text and not event.endswith(known)]


def test_the_page_of_the_log_explains_each_warning_and_no_other() -> None:
    """By the end of its name in the table of endings, or by its name in another section."""
    modules = (path.read_text() for path in (ROOT / "adapter").rglob("*.py") if "simulator" not in path.parts)
    calls = re.findall(r'(?:log\.(\w+)|log_once)\(\s*"([a-z_.]+)"', "\n".join(modules))
    events = {event for _, event in calls}
    warnings = {event for level, event in calls if level not in ("debug", "info")}
    rows = sections()["Read the log"].partition("| ends in |")[2].splitlines()[2:]
    endings = tuple(
        end for row in rows if row.startswith("|") for end in re.findall(r"`([\w.]+)`", row.split("|")[1])
    )
    assert len(endings) > 20
    assert [end for end in endings if not any(event.endswith(end) for event in events)] == []
    assert {event for event in warnings if not event.endswith(endings) and event not in RUNBOOK.read_text()} == set()
