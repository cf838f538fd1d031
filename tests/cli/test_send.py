"""`send`: the receipt decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from adapter.cli.bus import BusConnection
from adapter.contract.messages import BindingHealth, BindingInfo, BotStatus, Outbound, Receipt
from adapter.contract.names import H_MSG_ID, H_SCHEMA
from tests.cli.conftest import Command
from tests.cli.process import started
from tests.cli.standin import answering


def answer(*outcomes: str, **fields: Any) -> Callable[[Outbound], Sequence[Receipt]]:
    """Receipts of these outcomes for whatever is sent."""

    def receipts(command: Outbound) -> list[Receipt]:
        base = {"command": command.id, "sandbox": "s1", **fields}
        return [msgspec.convert(base | {"outcome": outcome}, Receipt) for outcome in outcomes]

    return receipts


@pytest.mark.parametrize("outcome", ["accepted_unconfirmed", "refused", "uncertain", "dead_lettered"])
async def test_everything_else_that_is_final_is_1(cli: Command, bus: BusConnection, outcome: str) -> None:
    async with answering(bus) as adapter:
        adapter.receipts = answer(outcome, reason="why", detail="A sentence.", ret=-2)
        result = await cli("send", "s1", "hi")
    assert (result.code, result.out) == (1, f"{outcome}  (why, A sentence, ret -2)\n")


async def test_parked_is_0_and_clearly_not_sent(cli: Command, bus: BusConnection) -> None:
    async with answering(bus) as adapter:
        adapter.receipts = answer("parked", reason="window_closed")
        result = await cli("send", "s1", "hi")
    assert (result.code, result.out) == (0, "parked  (not sent yet: window_closed)\n")


async def test_wait_final_waits_beyond_parked(cli: Command, bus: BusConnection) -> None:
    async with answering(bus) as adapter:
        adapter.receipts = answer("parked", "refused", reason="expired")
        result = await cli("send", "s1", "hi", "--wait-final")
        assert (result.code, result.out) == (1, "refused  (expired)\n")
        adapter.receipts = answer("parked")
        result = await cli("send", "s1", "hi", "--wait-final", "--timeout", "0.2")
    assert result.code == 4
    assert "Parked until the user writes" in result.err


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("polling", "An adapter runs, and iLink has not taken it yet"),
        ("failing", "b1@im.bot is failing: network: no connection to ilink"),
    ],
)
async def test_a_send_that_waits_for_ilink_says_so(
    status: BotStatus, said: str, cli: Command, bus: BusConnection
) -> None:
    health = BindingHealth(status=status, detail="network: no connection to ilink" if status == "failing" else "")
    info = BindingInfo(sandbox="s1", bot="b1@im.bot", user="u1", state="active", since_ms=1, health=health)
    async with answering(bus) as adapter:
        adapter.bindings = [info]
        result = await cli("send", "s1", "hi", "--timeout", "0.2", "--id", "c1")
    assert (result.code, said in result.err) == (4, True), result.err


async def test_no_receipt_is_4_and_names_the_id(cli: Command, bus: BusConnection) -> None:
    result = await cli("send", "s1", "hi", "--timeout", "0.1", "--id", "c1")
    assert result.code == 4
    assert "(id c1)" in result.err
    assert "No adapter runs on this bus: start one with `wechat-nats run`." in result.err


async def test_no_wait_ends_as_soon_as_it_is_stored(cli: Command, bus: BusConnection) -> None:
    result = await cli("send", "s1", "hi", "--no-wait", "--json", "--id", "c1")
    assert (result.code, result.rows) == (0, [{"command": "c1", "outcome": "stored"}])
    stored = await bus.nc.jetstream().get_last_msg(bus.names.stream_out, ">")
    assert stored.headers == {H_MSG_ID: "c1", H_SCHEMA: "1"}
    assert msgspec.json.decode(stored.data or b"") == {"id": "c1", "text": "hi"}


async def test_every_option_reaches_the_command(cli: Command, bus: BusConnection) -> None:
    options = ("--user", "u", "--bot", "b", "--when-closed", "refuse", "--expires-in", "5")
    await cli("send", "s1", "hi", "--no-wait", *options)
    stored = msgspec.json.decode(
        (await bus.nc.jetstream().get_last_msg(bus.names.stream_out, ">")).data or b"", type=Outbound
    )
    assert (stored.user, stored.bot, stored.when_closed) == ("u", "b", "refuse")
    assert stored.expires_in_s == 5


async def test_the_same_id_again_gets_the_receipt_of_the_first(cli: Command, bus: BusConnection) -> None:
    async with answering(bus) as adapter:
        adapter.receipts = answer("accepted", message_ids=["m1"])
        assert (await cli("send", "s1", "hi", "--id", "c1")).code == 0
    again = await cli("send", "s1", "hi", "--id", "c1")
    assert (again.code, again.out) == (0, "accepted  (message id m1)\n")


async def test_json_has_every_field(cli: Command, bus: BusConnection) -> None:
    async with answering(bus) as adapter:
        adapter.receipts = answer("refused", reason="not_bound")
        (row,) = (await cli("send", "s1", "hi", "--json")).rows
    assert (row["outcome"], row["reason"], row["message_ids"], row["window"]["remaining"]) == (
        *("refused", "not_bound", []),
        None,
    )


async def test_text_from_standard_input(bus: BusConnection) -> None:
    async with answering(bus) as adapter:
        adapter.receipts = answer("accepted", message_ids=["m1"])
        async with started("send", "s1", "-") as process:
            out, err = await process.communicate("你好\nworld\n".encode())
            assert (process.returncode, err) == (0, b"")
    assert [c.text for c in adapter.sent] == ["你好\nworld\n"]
    assert b"accepted" in out


async def test_without_streams_it_is_3(cli: Command, server: object) -> None:
    result = await cli("send", "s1", "hi")
    assert result.code == 3
    assert "doctor --fix" in result.err


async def test_too_many_waiting_commands_are_refused_with_1(cli: Command, bus: BusConnection) -> None:
    stream = await bus.nc.jetstream().stream_info(bus.names.stream_out)
    config = stream.config.as_dict() | {"max_msgs_per_subject": 1}
    await bus.api_request(f"STREAM.UPDATE.{bus.names.stream_out}", config)
    assert (await cli("send", "s1", "one", "--no-wait")).code == 0
    result = await cli("send", "s1", "two", "--no-wait")
    assert result.code == 1
    assert "too many messages wait" in result.err


async def test_a_text_larger_than_the_server_takes_is_1(bus: BusConnection) -> None:
    async with started("send", "s1", "-") as process:
        _, err = await process.communicate(b"x" * 1_100_000)
        assert process.returncode == 1
        assert b"larger than" in err


async def test_its_own_arguments_move_no_cursor(cli: Command, bus: BusConnection) -> None:
    stored = await cli("send", "s1", "hi", "--no-wait", "--id", "c\x1b[2J\u200b")
    assert (stored.code, stored.out) == (0, "stored  (id c\\x1b[2J\\x200b)\n")
    late = await cli("send", "s1", "hi", "--timeout", "0.1", "--id", "d\x1b[2J")
    assert late.code == 4
    assert "(id d\\x1b[2J)" in late.err
