"""`erase` and `export` under the users of `helm/nats/`."""

from __future__ import annotations

from tests.bus.guarded import NAMES
from tests.cli.conftest import Command
from tests.cli.test_roles import Scene, scene

__all__ = ["scene"]


async def test_operators_may_ask_for_an_erasure_and_only_adapters_may_read_what_there_is(
    cli: Command, scene: Scene
) -> None:
    scene.enter("operator")
    asked = await cli("erase", "--user", "o9cq80demo@im.wechat", "--timeout", "0.5", "--yes")
    assert (asked.code, await scene.stored(NAMES.stream_ctl)) == (4, 1)
    refused = await cli("export", "--user", "o9cq80demo@im.wechat")
    assert (refused.code, refused.out) == (1, "")
    assert "use credentials that may" in refused.err
    scene.enter("adapter")
    assert (await cli("export", "--user", "o9cq80demo@im.wechat")).code == 0
