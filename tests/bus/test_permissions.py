"""Who may do what, on real servers with the configurations and JWTs that are shipped.

Each role tries every row of `roles.py`, what it may and what it may not; a witness without limits sees what arrives
beside the adapter.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from nats.aio.msg import Msg
from structlog.testing import capture_logs

from adapter.contract.names import H_NAME, H_UPLOAD
from adapter.jetstream import topology
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.services.media import PIECE_MAX
from adapter.settings import Settings, read_settings
from adapter.tools.accounts import grants
from adapter.tools.permissions import covers, streams
from tests.asyncapi import channels
from tests.bus import roles
from tests.bus.guarded import NAMES, NEW_ACKS, TEMPLATES, WITNESS, Guarded, Player, guarded
from tests.bus.roles import COLUMNS, ROWS, SANDBOX, Row
from tests.bus.test_tls import linked
from tests.e2e.waiting import until

OWN, OTHER, UNTRUSTED = "s1", "s2", "u1"
REFUSED = re.compile(r'permissions violation for (publish|subscription) to "([^"]+)"')
LAST = "the.last.try"
UNSEEN = ("$JS.", "$SYS.", "_INBOX", "_R_.", "$SRV.")
"""What is handled by the server itself, or stays in the account of the role: nothing for the witness to see."""


@pytest.fixture(params=(*TEMPLATES, NEW_ACKS))
async def server(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Guarded]:
    async with guarded(tmp_path, request.param) as made:
        yield made


async def with_streams(server: Guarded) -> Player:
    """Makes the streams; returns the witness."""
    witness = await server.connect(WITNESS)
    connection = ManagedConnection(Settings(), "test")
    await connection.adopt_client(witness.nc)
    for wanted in topology.wanted_streams(NAMES, Settings(in_max_bytes=-1, media_store_bytes=-1)):
        await topology.create_stream(connection, wanted)
    return witness


def concrete(row: Row, column: str) -> str:
    return row.subject.replace(SANDBOX, {"other": OTHER, "untrusted": UNTRUSTED}.get(column, OWN))


def player_of(column: str) -> str:
    return {"own": OWN, "other": OWN, "untrusted": UNTRUSTED}.get(column, column)


def rows_of(column: str, does: str) -> list[Row]:
    """Those that say something of a column: another's subjects are those that name a sandbox."""
    return [row for row in ROWS if row.does == does and (column != "other" or SANDBOX in row.subject)]


async def refusals(player: Player) -> set[str]:
    """The subjects that the server has refused of what was tried until now: errors come in the order of the tries."""
    await player.nc.publish(LAST, b"")
    await until(lambda: any(LAST in text for text in player.refusals), "all is tried")
    found = {match[2] for text in player.refusals if (match := REFUSED.search(text))}
    player.refusals.clear()
    return found - {LAST}


def test_the_streams_are_those_of_the_adapter() -> None:
    wanted = {stream.name for stream in topology.wanted_streams(NAMES, Settings())}
    assert set(streams(NAMES)) == set(roles.STREAMS) == wanted


def test_the_table_in_the_readme_is_this_one() -> None:
    """`make generate` writes it anew."""
    assert roles.README.read_text() == roles.rendered()


def test_every_subject_of_the_contract_has_a_row() -> None:
    fields = {"sandbox": SANDBOX, "command": "c", "sequence": "1"}
    said = {channel.subject.format(**fields) for channel in channels(NAMES)}
    assert said - {row.subject for row in roles.SUBJECTS} == set()


@pytest.mark.parametrize("column", [column for column in COLUMNS if column != "other"])
def test_every_grant_has_a_row_that_uses_it(column: str) -> None:
    """One that no row tries would be seen by nobody."""
    role = "sandbox" if column == "own" else column
    may = grants(NAMES, role, player_of(column))  # type: ignore[arg-type]
    for does, patterns in (("publish", may.publish), ("subscribe", may.subscribe)):
        tried = [concrete(row, column) for row in rows_of(column, does) if row.may(column)]
        assert [pattern for pattern in patterns if not any(covers(pattern, subject) for subject in tried)] == []


async def test_each_role_publishes_what_it_may_and_nothing_else(server: Guarded) -> None:
    """What is refused does not arrive; what is not refused does, also out of another account."""
    witness = await with_streams(server)
    seen: list[tuple[str, bytes]] = []

    async def see(msg: Msg) -> None:
        if "Nats-Stream" not in (msg.headers or {}):  # what the server republishes comes of what was published
            seen.append((msg.subject, msg.data))

    await witness.nc.subscribe(">", cb=see)
    await witness.nc.flush()
    for column in COLUMNS:
        player = await server.connect(player_of(column))
        rows = rows_of(column, "publish")
        mark = f"from {column}".encode()
        for row in rows:
            await player.nc.publish(concrete(row, column), mark)
        refused = await refusals(player)
        may = {concrete(row, column) for row in rows if row.may(column)}
        tried = {concrete(row, column) for row in rows}
        assert refused == {subject.lower() for subject in tried - may}, column
        visible = {subject for subject in may if not subject.startswith(UNSEEN)}
        await until(lambda: visible <= {s for s, data in seen if data == mark}, f"{column} is heard")  # noqa: B023
        assert {s for s, data in seen if data == mark} <= may, column


async def test_no_wildcard_and_no_similar_name_opens_another_sandbox(server: Guarded) -> None:
    """Names that begin with its own, tokens more or less, and what stands for many."""
    s1 = await server.connect(OWN)
    mine = [*grants(NAMES, "sandbox", OWN).publish, *grants(NAMES, "sandbox", OWN).subscribe]
    for token in ("*", ">", "s10", "s", "S1", "s1.s2", "s2.s1", "_", "{{tag(sandbox)}}"):
        tried = set()
        for subject in mine:
            if subject.startswith("_INBOX_") and not token.isalnum():
                continue  # no wildcard stands for a part of a token, and what is below its inbox is its own
            similar = subject.replace(OWN, token) if token != ">" else subject.partition(OWN)[0] + ">"
            if not any(covers(pattern, similar) for pattern in mine):  # what is below its events is its own
                tried.add(similar)
        for attempt in (s1.nc.subscribe, s1.nc.publish):
            for subject in tried:
                await attempt(subject)
            assert await refusals(s1) == {subject.lower() for subject in tried}
        assert len(tried) > len(mine) // 2


async def test_each_role_may_subscribe_to_its_subjects_and_nothing_else(server: Guarded) -> None:
    witness = await server.connect(WITNESS)
    for column in COLUMNS:
        player = await server.connect(player_of(column))
        received: list[str] = []

        async def on_message(msg: Msg, received: list[str] = received) -> None:
            received.append(msg.subject)

        rows = rows_of(column, "subscribe")
        for row in rows:
            await player.nc.subscribe(concrete(row, column), cb=on_message)
        may = {concrete(row, column) for row in rows if row.may(column)}
        tried = {concrete(row, column) for row in rows}
        assert await refusals(player) == {subject.lower() for subject in tried - may}, column
        published = [re.sub(r">$", "x.y", subject).replace("*", OTHER) for subject in tried if subject[0] not in ">*"]
        for subject in published:
            await witness.nc.publish(subject, b"x")
        await witness.nc.flush()
        outside = {f"_INBOX_{player_of(column)}.x.y"} if column not in ("adapter", "operator", "platform") else set()
        expected = {subject for subject in published if any(_matches(pattern, subject) for pattern in may)} - outside
        await until(lambda: expected <= set(received), f"{column} hears {expected}")  # noqa: B023
        await player.nc.flush()
        assert set(received) == expected, column


def _matches(pattern: str, subject: str) -> bool:
    tokens = [re.escape(token) for token in pattern.split(".")]
    return bool(re.fullmatch(r"\.".join(tokens).replace(r"\*", r"[^.]+").replace(">", ".+"), subject))


async def test_what_the_server_forbids_is_a_warning_in_the_log(tmp_path: Path) -> None:
    """An adapter with a foreign inbox hears no answer: nothing else says why."""
    async with guarded(tmp_path) as server:
        settings = read_settings({"NATS_URL": server.url, **server.users["adapter"].environ})
        foreign = msgspec.structs.replace(settings, nats_inbox_prefix="_INBOX")
        with capture_logs() as logs:
            async with linked(foreign) as connection:
                await until(lambda: "may not subscribe _inbox." in connection.down_reason, "it is told")
                assert "set NATS_INBOX_PREFIX" in connection.down_reason
                assert not connection.is_connected
            async with linked(settings) as connection:
                await (await connection.wait_connected(30)).publish("not.ours", b"")
                await until(lambda: any("not.ours" in str(line.get("detail")) for line in logs), "it is told")
        logged = {(line["event"], line["log_level"]) for line in logs if line["log_level"] != "info"}
        assert logged >= {("bus.unreachable", "warning"), ("bus.error", "warning")}


async def test_a_message_of_a_sandbox_is_no_larger_than_a_piece_of_media(server: Guarded) -> None:
    """The others have what the server allows: a page of a replay, an inbound message."""
    headers = {H_UPLOAD: "u" * 64, H_NAME: "n" * 1000, "traceparent": "t" * 4000}
    sandbox, adapter = [await server.connect(who) for who in (OWN, "adapter")]
    for size, allowed in ((PIECE_MAX, True), (PIECE_MAX + 64 * 1024, False)):
        await sandbox.nc.publish(NAMES.svc(f"media.put.{OWN}"), bytes(size), headers=headers)
        if allowed:
            await sandbox.nc.flush()
        else:
            await until(lambda: sandbox.nc.is_closed, "the server ends the connection")
        await adapter.nc.publish(NAMES.inbox(OWN, "p"), bytes(size), headers=headers)
        await adapter.nc.flush()


async def test_a_sandbox_gets_the_ack_of_its_command(server: Guarded) -> None:
    """By the acknowledgement that answers a plain request: no JetStream API, in whichever account it is."""
    await with_streams(server)
    for who in (OWN, "agents"):
        player = await server.connect(who)
        answer = await player.nc.request(NAMES.out(OWN), b'{"text":"hi"}', timeout=30)
        assert msgspec.json.decode(answer.data)["stream"] == NAMES.stream_out
        assert player.refusals == []
