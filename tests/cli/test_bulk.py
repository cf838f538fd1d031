"""`bind` of many rows: `--from` and `--failed`."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from adapter.cli.bus import BusConnection
from adapter.contract.messages import Bind
from tests.cli.conftest import Command
from tests.cli.process import started
from tests.cli.standin import answering

HEADER = "sandbox,bot,token,user,auto_typing\n"
START_S = 60.0


def write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tmp_path / "rows"


async def test_rows_of_csv_are_bound_and_what_is_no_row_can_be_mended_and_run_again(
    cli: Command, bus: BusConnection, rows: Path, tmp_path: Path
) -> None:
    failed = tmp_path / "failed.csv"
    failed.touch(0o644)
    write(
        rows,
        HEADER + "s1,b1@im.bot,t1-secret,u1@im.wechat,\nS 2,b2@im.bot,t2-secret,,\ns3,b3@im.bot,t3-secret,,true\n",
    )
    async with answering(bus) as adapter:
        result = await cli(
            "bind", "--from", str(rows), "--failed", str(failed), "--base-url", "https://x.weixin.qq.com"
        )
        assert result.code == 2
        assert (result.out, "2 bound, 1 failed" in result.err, "line 3 (S 2): " in result.err) == ("", True, True)
        assert "secret" not in result.err
        assert stat.S_IMODE(failed.stat().st_mode) == 0o600
        header, row = failed.read_text().splitlines()
        assert header == "sandbox,bot,token,user,auto_typing,error"
        assert row.startswith("S 2,b2@im.bot,t2-secret,,,")

        write(failed, f"{header}\n{row.replace('S 2', 's2')}\n")
        result = await cli("bind", "--from", str(failed), "--failed", str(failed))
        assert (result.code, failed.read_text()) == (0, header + "\n")
    binds = [asked for asked in adapter.asked if isinstance(asked, Bind)]
    assert sorted((bind.sandbox, bind.bot, bind.bot_token, bind.user) for bind in binds) == [
        ("s1", "b1@im.bot", "t1-secret", "u1@im.wechat"),
        ("s2", "b2@im.bot", "t2-secret", None),
        ("s3", "b3@im.bot", "t3-secret", None),
    ]
    assert {bind.sandbox: (bind.options.auto_typing, bind.base_url) for bind in binds} == {
        "s1": (False, "https://x.weixin.qq.com"),
        "s3": (True, "https://x.weixin.qq.com"),
        "s2": (False, None),
    }


async def test_rows_come_from_standard_input_too(bus: BusConnection) -> None:
    async with answering(bus) as adapter, started("bind", "--from", "-", "--json") as process:
        out, err = await process.communicate(b"sandbox,bot,token\ns1,b1@im.bot,t1\ns2,b2@im.bot,t2\n")
    assert (process.returncode, out.count(b'{"ok":true')) == (0, 2)
    assert b"2 bound, 0 failed" in err
    assert [each.sandbox for each in adapter.asked] == ["s1", "s2"]


async def test_rows_are_stored_in_order(cli: Command, bus: BusConnection, rows: Path) -> None:
    """Also where a hundred others are on their way at the same time."""
    lines = [f"s{i % 3},b{i % 4}@im.bot,t{i}\n" for i in range(300)]
    write(rows, "".join(["sandbox,bot,token\n", *lines]))
    async with answering(bus) as adapter:
        assert (await cli("bind", "--from", str(rows))).code == 0
    assert [each.bot_token for each in adapter.asked if isinstance(each, Bind)] == [f"t{i}" for i in range(300)]


async def test_without_an_adapter_all_is_stored_and_4(
    cli: Command, bus: BusConnection, rows: Path, tmp_path: Path
) -> None:
    write(rows, "sandbox,bot,token\ns1,b1@im.bot,t\nno row\n")
    failed = tmp_path / "failed"
    result = await cli("bind", "--from", str(rows), "--failed", str(failed), "--timeout", "0.1")
    assert (result.code, "Stored; no adapter answered" in result.err) == (1, True)
    assert len(failed.read_text().splitlines()) == 3
    assert (await bus.js.stream_info(bus.names.stream_ctl)).state.messages == 1
    write(rows, "sandbox,bot,token\ns1,b1@im.bot,t\n")
    assert (await cli("bind", "--from", str(rows), "--timeout", "0.1")).code == 4


async def test_what_ctrl_c_leaves_undone_is_in_the_file(bus: BusConnection, rows: Path, tmp_path: Path) -> None:
    write(rows, "sandbox,bot,token\n" + "".join(f"s{i},b{i}@im.bot,t\n" for i in range(300)))
    failed = tmp_path / "failed"
    async with started("bind", "--from", str(rows), "--failed", str(failed)) as process:
        while (await bus.js.stream_info(bus.names.stream_ctl)).state.messages < 256:
            pass
        process.send_signal(2)
        await process.wait()
    assert process.returncode == 130
    assert len(failed.read_text().splitlines()) == 301


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bind", "s1", "--from", "rows"), "stand in the rows"),
        (("bind", "s1"), "Name a sandbox and a bot"),
        (("bind", "--from", "/nowhere"), "Cannot read /nowhere"),
    ],
)
async def test_rows_and_names_exclude_each_other(cli: Command, arguments: tuple[str, ...], said: str) -> None:
    result = await cli(*arguments)
    assert (result.code, said in result.err) == (2, True)
