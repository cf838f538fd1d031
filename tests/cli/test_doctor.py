"""`doctor`: every fault has a sentence that says what to do, and `--fix` does it."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from adapter.bridge.entries import Entry, Secrets, encode_end, encode_entry
from adapter.bridge.persons import seal_state
from adapter.bridge.record import PersonState
from adapter.cli import doctor, permission_checks
from adapter.cli.bus import BusConnection, connected_bus
from adapter.cli.embedded import EmbeddedNats
from adapter.contract.messages import BindingHealth, BindingInfo, BotStatus
from adapter.contract.names import LAYOUT_KEY, to_subject_token
from adapter.contract.records import Binding, Lease, PersonKey, ReaderRecord
from adapter.jetstream.buckets import KvBucket
from adapter.jetstream.history import StreamHistory
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.settings import read_settings
from adapter.tools.seal import Sealer, cursor_context
from tests.bus.guarded import Guarded, guarded
from tests.cli.conftest import Command, Result
from tests.cli.process import TOKEN_KEY, started
from tests.cli.standin import answering

CONSUMERS = True


def states(result: Result) -> dict[str, str]:
    return {row["check"]: row["state"] for row in result.rows}


async def test_an_empty_server_lacks_everything(cli: Command, server: EmbeddedNats) -> None:
    result = await cli("doctor", "--json")
    assert result.code == 1
    found = states(result)
    assert (found["nats"], found["jetstream"], found["adapters"]) == ("ok", "ok", "fail")
    assert (found["WECHAT_IN"], found["KV_wechat_bindings"]) == ("fail", "fail")


async def test_fix_creates_what_is_missing_and_says_so(cli: Command, server: EmbeddedNats) -> None:
    result = await cli("doctor", "--fix")
    assert "creating stream WECHAT_IN" in result.out
    found = states(await cli("doctor", "--json"))
    assert found["streams"] == "ok"
    assert [check for check, state in found.items() if state == "fail"] == ["adapters"]


async def test_with_an_adapter_all_is_well(cli: Command, bus: BusConnection) -> None:
    async with answering(bus) as adapter:
        adapter.bindings = [BindingInfo(sandbox="s1", bot="b")]
        await bus.store(f"$KV.{bus.names.bindings}.b", b"{}", {})
        result = await cli("doctor")
    assert result.code == 0
    assert "fail" not in result.out
    assert re.search(r"\bnats-server [0-9]+\.[0-9]+\.[0-9]+, 127\.0\.0\.1:", result.out)
    assert "1 running, version 0.1.0" in result.out
    assert "32 of standin" in result.out
    assert "1 polling" in result.out


async def test_warnings_do_not_fail(cli: Command, bus: BusConnection) -> None:
    await bus.nc.jetstream().publish(bus.names.dead_letters("WECHAT_OUT"), b"x")
    async with answering(bus) as adapter:
        adapter.bindings = [BindingInfo(sandbox="s1", bot="b", state="needs_login")]
        await bus.store(f"$KV.{bus.names.bindings}.b", b"{}", {})
        result = await cli("doctor", "--json")
    assert result.code == 0
    assert (states(result)["bindings"], states(result)["dead letters"]) == ("warn", "warn")


@pytest.mark.parametrize(("version", "state"), [("2.4.9", "ok"), ("2.10.0", "ok"), ("2.4.6", "warn")])
async def test_the_version_that_adapters_declare_is_shown_and_an_old_one_is_a_warning(
    cli: Command, bus: BusConnection, version: str, state: str
) -> None:
    """The bindings are looked at all the same."""
    async with answering(bus) as adapter:
        adapter.metadata = {"ilink_version": version}
        result = await cli("doctor", "--json")
    found = said(result, "adapters")
    assert (found[0], f"declare plugin version {version} to iLink" in found[1]) == (state, True)
    assert ("WECHAT_NATS_ILINK_VERSION" in found[1]) == (state == "warn")
    assert states(result)["bindings"] == "ok"


@pytest.mark.parametrize(
    ("capacities", "state", "sentence"),
    [
        (
            (10, 10),
            "warn",
            "10 bindings; the replicas that remain if one ends hold 10: add a replica, or raise WECHAT",
        ),
        (
            (12, 10),
            "warn",
            "10 bindings; the replicas that remain if one ends hold 10: add a replica, or raise WECHAT",
        ),
        ((12, 12), "ok", "10 bindings; the replicas that remain if one ends hold 12"),
        (
            (5, 5, 7),
            "warn",
            "10 bindings; the replicas that remain if one ends hold 10: add a replica, or raise WECHAT",
        ),
        ((12,), "ok", "10 bindings of 12; nobody serves them if this replica ends"),
    ],
)
async def test_it_warns_before_nobody_has_room_for_the_bots_of_a_dead_replica(
    cli: Command, bus: BusConnection, capacities: tuple[int, ...], state: str, sentence: str
) -> None:
    async with answering(bus) as adapter:
        adapter.capacities = capacities
        adapter.bindings = [BindingInfo(sandbox="s1", bot=f"b{number}@im.bot") for number in range(10)]
        for info in adapter.bindings:
            await bus.store(f"$KV.{bus.names.bindings}.{to_subject_token(info.bot)}", b"{}", {})
        result = await cli("doctor", "--json")
    found = said(result, "capacity")
    assert found[0] == state
    assert found[1].startswith(sentence)


@pytest.mark.parametrize(
    ("status", "code", "state"),
    [
        ("not_polled", 1, "fail"),
        ("failing", 1, "fail"),
        ("stale", 0, "warn"),
        ("paused", 0, "warn"),
        ("retrying", 0, "ok"),
    ],
)
async def test_bots_in_trouble_are_counted_and_those_that_nobody_polls_fail(
    cli: Command, bus: BusConnection, status: BotStatus, code: int, state: str
) -> None:
    async with answering(bus) as adapter:
        health = BindingHealth(status=status)
        adapter.bindings = [BindingInfo(sandbox="s1", bot=f"b{number}@im.bot", health=health) for number in range(5)]
        for info in adapter.bindings:
            await bus.store(f"$KV.{bus.names.bindings}.{to_subject_token(info.bot)}", b"{}", {})
        result = await cli("doctor", "--json")
    assert (result.code, states(result)["bindings"]) == (code, state)
    (said,) = [row["say"] for row in result.rows if row["check"] == "bindings"]
    assert said.startswith(f"5 {status}")


async def test_bindings_that_the_bucket_has_lost_fail(cli: Command, bus: BusConnection) -> None:
    """--fix has nothing that it could put there."""
    async with answering(bus) as adapter:
        adapter.bindings = [BindingInfo(sandbox="s1", bot=bot) for bot in ("a", "b", "c")]
        await bus.store(f"$KV.{bus.names.bindings}.a", b"{}", {})
        for result in (await cli("doctor", "--json"), await cli("doctor", "--fix", "--json")):
            (said,) = [row["say"] for row in result.rows if row["check"] == "bindings"]
            assert said == "2 that adapters know are not in KV_wechat_bindings: restore it from the backup."
            assert result.code == 1


async def test_partitions_that_nobody_renews_fail(
    cli: Command, bus: BusConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner of one is dead, the key of another was deleted. One that was just released is about to be taken."""
    monkeypatch.setattr(doctor, "SILENT_S", 0.5)
    leases = KvBucket(bus.connection, bus.names.leases)
    async with answering(bus) as adapter:
        await leases.write("8", None, None)
        for _ in range(2):  # an adapter's answer is waited for for longer than that
            await adapter.renew(*({*range(bus.names.partitions)} - {3, 7, 8}))
            await leases.write("7", msgspec.json.encode(Lease(former=("standin-0",))), None)
            result = await cli("doctor", "--json")
    state, words = said(result, "partitions")
    assert (result.code, state) == (1, "fail")
    assert re.match(r"Nobody renews 3 \([0-9]+ s ago\), 8 \(never\): .*; 1 of nobody yet, 29 of standin\.", words), (
        words
    )


async def test_an_operators_own_limit_is_a_warning_until_fixed(cli: Command, bus: BusConnection) -> None:
    config = (await bus.api_request(f"STREAM.INFO.{bus.names.stream_in}"))["config"]
    await bus.api_request(f"STREAM.UPDATE.{bus.names.stream_in}", config | {"max_msgs_per_subject": 5})
    async with answering(bus):
        result = await cli("doctor", "--json")
        assert (result.code, states(result)["WECHAT_IN"]) == (0, "warn")
        result = await cli("doctor", "--fix")
        assert "changing WECHAT_IN: max_msgs_per_subject from 5 to 10000" in result.out
        assert (result.code, states(await cli("doctor", "--json"))["streams"]) == (0, "ok")


# whose settings count -------------------------------------------------------------------------------------

SMALL = 10_000


async def crowded(bus: BusConnection) -> dict[str, object]:
    """A hundred messages in the inbox, which are twice as large as SMALL; its configuration."""
    for number in range(100):
        await bus.nc.jetstream().publish(bus.names.inbox("s1", "p"), b"x" * 150 + str(number).encode())
    return await config_of(bus)


async def config_of(bus: BusConnection) -> dict[str, object]:
    config: dict[str, object] = (await bus.api_request(f"STREAM.INFO.{bus.names.stream_in}"))["config"]
    return config


async def messages_of(bus: BusConnection) -> int:
    return int((await bus.api_request(f"STREAM.INFO.{bus.names.stream_in}"))["state"]["messages"])


async def test_settings_of_a_shell_do_not_count_beside_the_layout_key(
    cli: Command, bus: BusConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await crowded(bus)
    monkeypatch.setenv("WECHAT_NATS_IN_MAX_BYTES", str(SMALL))
    assert states(await cli("doctor", "--json"))["streams"] == "ok"
    fixed = await cli("doctor", "--fix", "--allow-loss", "--json")
    assert said(fixed, "layout") == ("ok", "version 3, settings of the layout key, not those here"
        f" (WECHAT_NATS_IN_MAX_BYTES is {SMALL})")  # fmt: skip
    assert (await config_of(bus), await messages_of(bus)) == (before, 100)


async def test_nothing_is_lowered_unless_loss_is_allowed(
    cli: Command, bus: BusConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await crowded(bus)
    bindings = KvBucket(bus.connection, bus.names.bindings)
    layout = await bindings.get(LAYOUT_KEY)
    assert layout is not None
    await bindings.write(LAYOUT_KEY, None, layout.revision)
    monkeypatch.setenv("WECHAT_NATS_IN_MAX_BYTES", str(SMALL))
    assert said(await cli("doctor", "--json"), "layout")[1].startswith("version 3, settings of this shell.")
    refused = await cli("doctor", "--fix", "--json")
    words = re.findall(
        rf"Not changed without --allow-loss: WECHAT_IN: max_bytes from [0-9]+ to {SMALL}, with ([0-9]+) messages",
        refused.out,
    )
    assert (refused.code, len(words)) == (1, 1)
    assert (await config_of(bus), await messages_of(bus)) == (before, 100)
    lowered = await cli("doctor", "--fix", "--allow-loss")
    assert f"to {SMALL}, with {words[0]} messages at stake" in lowered.out
    assert abs(100 - await messages_of(bus) - int(words[0])) <= 1


async def test_the_number_of_partitions_changes_while_no_command_waits_and_no_adapter_runs(
    cli: Command, bus: BusConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell that does not say a number changes none."""
    stream = bus.names.stream_out
    advice = f"{stream} has 32 partitions, WECHAT_NATS_PARTITIONS is 8: set 32, or, once the stream is empty and"
    monkeypatch.setenv("WECHAT_NATS_PARTITIONS", "8")
    waiting = await bus.store(bus.names.out("s1"), b"{}", {})
    assert advice in said(await cli("doctor", "--json"), stream)[1]
    assert advice in (await cli("doctor", "--fix")).err
    await bus.delete_stored(stream, waiting.seq)
    async with answering(bus) as adapter:
        assert advice in (await cli("doctor", "--fix")).err
        adapter.capacities = ()  # none is left
    assert "partition(32,2)" in str(await bus.api_request(f"STREAM.INFO.{stream}"))
    assert f"changing {stream}: subject_transform" in (await cli("doctor", "--fix")).out
    monkeypatch.delenv("WECHAT_NATS_PARTITIONS")
    found = await cli("doctor", "--fix", "--json")
    assert (said(found, "layout"), states(found)["streams"]) == (
        ("ok", "version 3, settings of the layout key"),
        "ok",
    )
    assert "partition(8,2)" in str(await bus.api_request(f"STREAM.INFO.{stream}"))


async def test_a_program_does_not_change_streams_of_a_newer_layout(cli: Command, bus: BusConnection) -> None:
    await bus.store(f"$KV.{bus.names.bindings}.{LAYOUT_KEY}", b'{"version":4,"settings":{}}', {})
    assert said(await cli("doctor", "--json"), "layout")[0] == "fail"
    refused = await cli("doctor", "--fix")
    assert (refused.code, "use a newer program" in refused.err) == (1, True)


async def test_what_the_server_will_not_change_is_left_to_people(cli: Command, bus: BusConnection) -> None:
    """Retention cannot become a work queue again in place."""
    await bus.nc.jetstream().delete_stream(bus.names.stream_out)
    await bus.nc.jetstream().add_stream(name=bus.names.stream_out, subjects=[bus.names.out_plain, bus.names.out("*")])
    result = await cli("doctor", "--fix")
    assert result.code == 1
    assert "by hand" in result.err


async def test_an_unreachable_service_does_not_hide_the_rest(cli: Command, bus: BusConnection) -> None:
    async with answering(bus) as adapter:
        adapter.error = ("500", "Broken.")
        result = await cli("doctor", "--json")
    assert (result.code, states(result)["bindings"]) == (1, "fail")


class WithoutJetStream(EmbeddedNats):
    """A server that only passes messages on."""

    def _write_config(self) -> Path:
        config = super()._write_config()
        config.write_text(config.read_text().partition("jetstream {")[0])
        return config

    async def _wait_jetstream(self) -> None:
        return


async def test_a_server_without_jetstream_fails(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    async with WithoutJetStream() as server:
        monkeypatch.setenv("NATS_URL", server.url)
        result = await cli("doctor", "--json")
        assert (result.code, states(result)["jetstream"]) == (1, "fail")
        sent = await cli("send", "s1", "hi")
        assert (sent.code, "JetStream is not available" in sent.err) == (3, True)
        assert (await cli("dead", "ls")).code == 3


def adapter_environ(url: str) -> dict[str, str]:
    return {"NATS_URL": url, "WECHAT_NATS_HTTP_ADDR": "127.0.0.1:0", "WECHAT_NATS_TOKEN_KEY": TOKEN_KEY}


class Small(EmbeddedNats):
    """A server with less room than the streams reserve."""

    def _write_config(self) -> Path:
        config = super()._write_config()
        config.write_text(config.read_text().replace("jetstream {", "jetstream { max_file_store: 2GB,", 1))
        return config


async def test_streams_that_reserve_more_than_there_is_name_the_settings(
    cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Small() as server:
        monkeypatch.setenv("NATS_URL", server.url)
        fixed = await cli("doctor", "--fix")
        async with started("run", env=adapter_environ(server.url)) as process:
            _, ended = await process.communicate()
        assert (fixed.code, process.returncode) == (1, 2)
        for name in ("WECHAT_NATS_IN_MAX_BYTES", "WECHAT_NATS_MEDIA_STORE_BYTES", "max_file_store"):
            assert name in fixed.err
            assert name in ended.decode().splitlines()[-1]
        monkeypatch.setenv("WECHAT_NATS_IN_MAX_BYTES", "600000000")
        monkeypatch.setenv("WECHAT_NATS_MEDIA_STORE_BYTES", "1000000000")
        assert (await cli("doctor", "--fix")).err == ""


def enter(monkeypatch: pytest.MonkeyPatch, server: Guarded, who: str) -> None:
    """What this role finds in its environment."""
    monkeypatch.setenv("NATS_URL", server.url)
    for variable, value in server.users[who].environ.items():
        monkeypatch.setenv(variable, value)


def said(result: Result, check: str) -> tuple[str, str]:
    (row,) = [row for row in result.rows if row["check"] == check]
    return row["state"], row["say"]


async def test_a_server_that_asks_for_no_credentials_is_a_warning(cli: Command, server: EmbeddedNats) -> None:
    result = await cli("doctor", "--json")
    assert said(result, "permissions") == ("ok", "this user may do all that an adapter does")
    state, say = said(result, "strangers")
    assert state == "warn"
    assert "bind bots" in say


def without(*subjects: str) -> Callable[[str], str]:
    """The configuration without the first mention of each subject."""

    def edit(text: str) -> str:
        for subject in subjects:
            assert f'"{subject}"\n' in text
            text = text.replace(f'"{subject}"\n', "\n", 1)
        return text

    return edit


ROWS: list[tuple[str, str, Callable[[str], str], tuple[str, str], tuple[str, str]]] = [
    ("as-shipped", "adapter", str, ("ok", "all that an adapter does"), ("ok", "nobody gets in")),
    ("operator", "operator", str, ("ok", "an operator's"), ("ok", "nobody gets in")),
    (
        "untold",
        "adapter",
        without("$SYS.REQ.USER.INFO"),
        ("warn", "$SYS.REQ.USER.INFO"),
        ("ok", ""),
    ),
    ("acks-v1-alone", "adapter", without("$JS.ACK.*.*.WECHAT_OUT.>"), ("fail", "ACK.*.*.WECHAT_OUT.>:"), ("ok", "")),
    (
        "denied",
        "adapter",
        lambda text: text.replace("subscribe: { allow: [", 'subscribe: { deny: "wechat.svc.replay.*", allow: [', 1),
        ("fail", "may not subscribe wechat.svc.>:"),
        ("ok", ""),
    ),
    (
        "deaf",
        "adapter",
        without("_INBOX_operator.>", "_INBOX_platform.>"),
        ("fail", "inboxes"),
        ("ok", ""),
    ),
    (
        "other-accounts-unanswered",
        "adapter",
        without("_R_.>"),
        ("warn", "_R_.>"),
        ("ok", ""),
    ),
    (
        "open-to-strangers",
        "adapter",
        lambda text: text + "no_auth_user: operator\n",
        ("ok", ""),
        ("fail", "Without credentials one may publish wechat.svc.bindings.list, publish wechat.svc.replay,"),
    ),
    ("strangers-elsewhere", "adapter", lambda text: text + "no_auth_user: s1\n", ("ok", ""), ("ok", "not at this")),
]


@pytest.mark.parametrize(
    ("who", "edit", "permissions", "strangers"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
async def test_what_a_user_may_not_and_a_stranger_may_is_told(
    tmp_path: Path,
    who: str,
    edit: Callable[[str], str],
    permissions: tuple[str, str],
    strangers: tuple[str, str],
) -> None:
    async with guarded(tmp_path, edit=edit) as server:
        settings = read_settings({"NATS_URL": server.url, **server.users[who].environ})
        async with connected_bus(settings) as bus:
            checks = await permission_checks.check_permissions(bus)
    assert [check.check for check in checks] == ["permissions", "strangers"]
    for check, (state, words) in zip(checks, (permissions, strangers), strict=True):
        assert check.state == state, checks
        assert words in check.say, checks


async def test_a_foreign_inbox_is_what_doctor_tells_first(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without answers nothing else can be told, and JetStream is not at fault."""
    async with guarded(tmp_path) as server:
        enter(monkeypatch, server, "adapter")
        monkeypatch.delenv("NATS_INBOX_PREFIX")
        for arguments in (["--fix"], ["--sandbox", "s1"], []):
            result = await cli("doctor", *arguments, "--json")
            assert (result.code, states(result)) == (1, {"permissions": "fail"})
            assert "set NATS_INBOX_PREFIX" in said(result, "permissions")[1]


async def test_the_credentials_of_a_sandbox_can_be_checked(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generous(text: str) -> str:
        """s2 was given too much, by hand."""
        return text.replace('"wechat.in.s2"', '"wechat.in.*"', 1)

    async with guarded(tmp_path, edit=generous) as server:
        enter(monkeypatch, server, "s1")
        result = await cli("doctor", "--sandbox", "s1", "--json")
        assert (result.code, states(result)) == (0, {"own": "ok", "others": "ok"})
        result = await cli("doctor", "--sandbox", "s2", "--json")
        assert (result.code, states(result)["own"]) == (1, "fail")
        assert "may not publish wechat.svc.replay.s2" in said(result, "own")[1]
        enter(monkeypatch, server, "s2")
        result = await cli("doctor", "--sandbox", "s2", "--json")
        assert (result.code, states(result)) == (1, {"own": "ok", "others": "fail"})
        assert "It may subscribe wechat.in.*:" in said(result, "others")[1]


OLD, NEW = (base64.b64encode(bytes([number]) * 32).decode() for number in (1, 2))


async def bound(bus: BusConnection, *tokens: str, start_cursor: str | None = None) -> None:
    """Bindings as they lie in the bucket."""
    for number, token in enumerate(tokens):
        binding = Binding(sandbox=f"s{number}", bot=f"b{number}@im.bot", token=token, start_cursor=start_cursor)
        key = f"$KV.{bus.names.bindings}.{to_subject_token(binding.bot)}"
        await bus.nc.jetstream().publish(key, msgspec.json.encode(binding))


async def stored_bindings(bus: BusConnection) -> list[Binding]:
    connection = ManagedConnection(bus.settings, "test")
    await connection.adopt_client(bus.nc)
    found = StreamHistory(connection).read(f"KV_{bus.names.bindings}", f"$KV.{bus.names.bindings}.>")
    values = {stored.subject.rpartition(".")[2]: stored.data async for stored in found}
    return [msgspec.json.decode(value, type=Binding) for key, value in values.items() if key != LAYOUT_KEY]


def sealer(*keys: str) -> Sealer:
    return Sealer(tuple(base64.b64decode(key) for key in keys))


@pytest.mark.parametrize(
    ("keys", "how", "state", "word"),
    [
        (
            "",
            ["new"],
            "warn",
            "not set here, or damaged: without WECHAT_NATS_TOKEN_KEY it cannot be told",
        ),
        ("", [], "ok", "none yet"),
        (NEW, [], "ok", "none yet"),
        (NEW, ["new"], "ok", "1 sealed"),
        (NEW, ["new", "open"], "fail", "1 sealed with a key that is not set here"),
        (f"{NEW},{OLD}", ["new", "old"], "warn", "1 sealed with an older key"),
        (NEW, ["new", "old"], "fail", "1 sealed with a key that is not set here"),
    ],
    ids=["keyless", "keyless-none", "none", "sealed", "unsealed", "rotated", "lost"],
)
async def test_doctor_says_how_tokens_lie_in_the_bucket(
    cli: Command,
    bus: BusConnection,
    monkeypatch: pytest.MonkeyPatch,
    keys: str,
    how: list[str],
    state: str,
    word: str,
) -> None:
    kinds = {"open": "T", "new": sealer(NEW).seal("b0@im.bot", "T"), "old": sealer(OLD).seal("b1@im.bot", "T")}
    await bound(bus, *(kinds[one] for one in how))
    monkeypatch.setenv("WECHAT_NATS_TOKEN_KEY", keys)
    result = await cli("doctor", "--json")
    (row,) = [row for row in result.rows if row["check"] == "tokens"]
    assert row["state"] == state
    assert word in row["say"]


async def test_fix_seals_the_cursor_to_begin_at_too(
    cli: Command, bus: BusConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token stands in it."""
    start = sealer(OLD).seal(cursor_context("b0@im.bot"), "TOKEN-0 and more")
    await bound(bus, sealer(NEW).seal("b0@im.bot", "TOKEN-0"), start_cursor=start)
    monkeypatch.setenv("WECHAT_NATS_TOKEN_KEY", f"{NEW},{OLD}")
    assert "sealing 1 bot tokens" in (await cli("doctor", "--fix")).out
    (binding,) = await stored_bindings(bus)
    assert sealer(NEW).sealing_of(binding.start_cursor or "") == "sealed"
    assert sealer(NEW).open(cursor_context("b0@im.bot"), binding.start_cursor or "") == "TOKEN-0 and more"


ROTATION = [(OLD,), (OLD, NEW), (NEW, OLD), (NEW,)]
"""The keys of the adapters, step by step, as the runbook tells; before the last one `doctor --fix` seals anew."""


async def test_rotating_a_key_leaves_no_adapter_with_a_token_that_it_cannot_open(
    cli: Command, bus: BusConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of two neighbouring steps run side by side for a while, and each reads what the other wrote."""
    await bound(bus, *(sealer(OLD).seal(f"b{number}@im.bot", "TOKEN") for number in range(3)))
    for before, after in itertools.pairwise(ROTATION):
        if after == ROTATION[-1]:
            monkeypatch.setenv("WECHAT_NATS_TOKEN_KEY", ",".join(before))
            assert (await cli("doctor", "--fix")).out.count("sealing 2 bot tokens") == 1
        await bound(bus, sealer(*before).seal("b0@im.bot", "TOKEN"), sealer(*after).seal("b1@im.bot", "TOKEN"))
        for keys in (before, after):
            for binding in await stored_bindings(bus):
                assert sealer(*keys).open(binding.bot, binding.token) == "TOKEN", (before, after, keys)


async def restored(bus: BusConnection) -> tuple[int, int]:
    """An inbox that was put back: the last sequence of the one before, and of the one now."""
    names = bus.names
    was = (await bus.store(names.inbox("s1", "p"), b"{}", {})).seq
    config = (await bus.api_request(f"STREAM.INFO.{names.stream_in}"))["config"]
    await bus.api_request(f"STREAM.DELETE.{names.stream_in}")
    await bus.api_request(f"STREAM.CREATE.{names.stream_in}", config | {"first_seq": 100})
    last = (await bus.store(names.inbox("s1", "p"), b"{}", {})).seq
    assert last == 100
    return was, last


async def test_readers_above_a_restored_inbox_are_named_and_reset(cli: Command, bus: BusConnection) -> None:
    """A backup of WECHAT_IN is older than what agents have seen."""
    names = bus.names
    was, last = await restored(bus)
    for sandbox, reader in {
        "s1": ReaderRecord(handled=was, number=3),
        "s2": ReaderRecord(handled=last, reader=7),
    }.items():
        await bus.store(f"$KV.{names.readers}.{sandbox}", msgspec.json.encode(reader), {"Nats-TTL": "3600s"})
    stored = await bus.history.read_last(f"KV_{names.readers}", f"$KV.{names.readers}.s1")
    assert stored is not None
    assert (await say_of(cli, "readers")).startswith("s1: above the last sequence of WECHAT_IN, which was set back")
    assert "setting the readers of s1 to the last sequence of WECHAT_IN" in (await cli("doctor", "--fix")).out
    assert await say_of(cli, "readers") == "none is above the last sequence of WECHAT_IN"
    found = [one async for one in bus.history.read(f"KV_{names.readers}", f"$KV.{names.readers}.>")]
    assert [msgspec.json.decode(one.data, type=ReaderRecord) for one in found] == [
        ReaderRecord(handled=last, reader=7),
        ReaderRecord(handled=last, reader=stored.seq),
    ]
    assert found[1].headers["Nats-TTL"] == "3600s"


BOUND = PersonKey("s1", "0123456789abcdef", 5)


async def said_of_persons(cli: Command) -> list[tuple[str, str]]:
    rows = (await cli("doctor", "--json")).rows
    return [(str(row["state"]), str(row["say"])) for row in rows if row["check"] == "persons"]


async def bind_person(bus: BusConnection, key: PersonKey = BOUND) -> None:
    token = sealer(NEW).seal("b1@im.bot", "T")
    binding = Binding(sandbox=key.sandbox, bot="b1@im.bot", token=token, person=key.person, since=key.since)
    await bus.store(f"$KV.{bus.names.bindings}.b1", msgspec.json.encode(binding), {})


async def store_entry(bus: BusConnection, person: str, key: str = NEW) -> None:
    subject = bus.names.inbox("s1", person)
    data = encode_entry(Entry(since=5), Secrets(token="T"), subject, sealer(key))
    await bus.store(subject, data, {})


async def test_what_a_restore_left_of_persons_whom_no_binding_has_is_deleted(
    cli: Command, bus: BusConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a person's time stays: late writes meet it."""
    monkeypatch.setenv("WECHAT_NATS_TOKEN_KEY", NEW)
    await bind_person(bus)
    for person in (BOUND.person, "a" * 16, "a" * 16, "b" * 16, "c" * 16):
        await store_entry(bus, person)
    await bus.store(bus.names.inbox("s1", "c" * 16), encode_end(5), {})
    gone = "3 entries of 2 persons whom no binding has"
    told = ("warn", f"{gone}, as after a restore: --fix deletes them.")
    assert await said_of_persons(cli) == [("ok", "3 sealed"), told]
    assert f"deleting {gone}" in (await cli("doctor", "--fix")).out
    assert await said_of_persons(cli) == [("ok", "1 sealed")]
    left = [one.subject[-16:] async for one in bus.history.read(bus.names.stream_in, bus.names.inbox("s1"))]
    assert left == [BOUND.person, "c" * 16, "c" * 16]


@pytest.mark.parametrize("is_unreadable", [False, True], ids=["lost", "unreadable"])
async def test_nobodys_entries_are_deleted_while_their_bindings_are_lost(
    cli: Command, bus: BusConnection, is_unreadable: bool
) -> None:
    """`--fix` has made the bucket anew, or does not know what it holds."""
    if is_unreadable:
        await bus.store(f"$KV.{bus.names.bindings}.b1", b"{}", {})
    await store_entry(bus, BOUND.person)
    assert "deleting" not in (await cli("doctor", "--fix")).out
    assert (await bus.nc.jetstream().stream_info(bus.names.stream_in)).state.messages == 1


@pytest.mark.parametrize(
    ("keys", "state", "word"),
    [
        (f"{NEW},{OLD}", "warn", "2 sealed with an older key, 1 sealed: keep the older key until there are none"),
        (NEW, "fail", "2 sealed with a key that is not set here, or damaged, 1 sealed: set that key too"),
        ("", "warn", "without WECHAT_NATS_TOKEN_KEY it cannot be told"),
    ],
    ids=["rotated", "lost", "keyless"],
)
async def test_doctor_counts_the_persons_who_need_another_key(
    cli: Command, bus: BusConnection, monkeypatch: pytest.MonkeyPatch, keys: str, state: str, word: str
) -> None:
    """By their newest entry or their record: both are opened when the person is taken."""
    await bind_person(bus)
    for person, by in ((BOUND.person, OLD), (BOUND.person, NEW), ("a" * 16, OLD), ("b" * 16, NEW)):
        await store_entry(bus, person, by)
    key = PersonKey("s1", "b" * 16, 5)
    record = seal_state(key, "u1@im.wechat", PersonState(), sealer(OLD))
    await bus.store(f"$KV.{bus.names.persons}.{key.key}", record, {})
    monkeypatch.setenv("WECHAT_NATS_TOKEN_KEY", keys)
    found, _ = await said_of_persons(cli)
    assert found[0] == state
    assert word in found[1]


async def say_of(cli: Command, check: str) -> str:
    (said,) = [str(row["say"]) for row in (await cli("doctor", "--json")).rows if row["check"] == check]
    return said
