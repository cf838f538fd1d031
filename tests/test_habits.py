"""How tests are written: names that fit into a line, and no way into an object that is not public."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
NAME_CHARS = 80
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}
"""Public, in spite of their names."""

PRIVATE = {
    # nats-py offers no other way to what the client takes over from it, or to its socket
    "bus/test_client.py": "_flush_queue _flusher_task _io_reader _io_writer _max_payload _pending _process_headers"
    " _ps _reading_task _status _transport",
    "bus/test_tls.py": "_io_writer _transport",
    "conftest.py": "_send_ping",
    "e2e/test_growth.py": "_deleted _pool _subs",  # forgets what is bounded
    # headers that no client writes
    "bus/test_publisher.py": "_outstanding _send_command",
    # the moment at which a request is out, or a queue full, shows nowhere else
    "bus/test_multiplexer.py": "_multiplexer",
    "bus/test_objects.py": "_outstanding",
    "bus/test_agent.py": "_number _reader",
    "bus/test_next.py": "_replicated",
    "ilink/test_connection.py": "_idle",
    "inbound/test_poller.py": "_waiting",
    # a step that another one follows at once, and the part of a partition in which the code is to raise
    "bus/test_fence.py": "_store_end",
    "outbound/test_poison.py": "_sandbox",
    # memory, which nothing else shows
    "growth.py": "_lru_cache_wrapper _scheduled _timer_cancelled_count",
    "ownership/test_presence.py": "_heard",
    "test_probes.py": "_connections _server",
    # each regular expression, and each reader of foreign words, by itself
    "test_linear.py": "_HEX_KEY _HOST _HOST_PORT _ID _INBOX _LETTER _LOGIN"
    " _SECRET_NAME _UNPRINTABLE_IN_JSON _describe_error _publish_command",
    # what ends with a process that is killed
    "inbound/sharing.py": "_leaving _owned _polling _tasks",
    # in place of the network, the bucket's watcher or the consumer
    # and what ends with a process that is killed
    "fakes/bench.py": "_apply_entry _capacity _leaving _on_failed _owned _parts _polling _tasks",
    "fakes/bus.py": "_answers _heard",  # of the others of its world
    "test_schedules_inbound.py": "_apply_entry",
    "ilink/test_client.py": "_pool",
    "bus/test_media_service.py": "_upload_ident",
    "cli/test_embedded.py": "_with_token_key",
    "forks.py": "_exit",  # os's own: of a process that has no end of its own
    "foreign/drive_weilink.py": "_cdn _protocol",  # the other client's
}
"""What tests reach that is private to another object or module, by file, and why it has to be so."""


def private(tree: ast.AST) -> Iterator[str]:
    """Names with an underscore that are asked of anything but the test's own object, or imported."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super"))):
                continue
            case ast.Attribute(attr=name):
                names = [name]
            case ast.ImportFrom(names=aliases):
                names = [alias.name for alias in aliases]
            case _:
                continue
        yield from (name for name in names if name.startswith("_") and not name.startswith("__"))


@functools.cache
def trees() -> list[tuple[str, ast.AST]]:
    paths = [path for path in sorted(TESTS.rglob("*.py")) if "node_modules" not in path.parts]
    return [(path.relative_to(TESTS).as_posix(), ast.parse(path.read_text("utf-8"))) for path in paths]


def test_what_is_private_is_left_alone() -> None:
    found = {where: set(private(tree)) - OF_NAMED_TUPLES for where, tree in trees()}
    assert {where: names for where, names in found.items() if names} == {
        where: set(names.split()) for where, names in PRIVATE.items()
    }


def test_the_name_of_a_test_fits_into_a_line() -> None:
    functions = (node for _, tree in trees() for node in ast.walk(tree))
    names = [node.name for node in functions if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert [name for name in names if name.startswith("test_") and len(name) > NAME_CHARS] == []
