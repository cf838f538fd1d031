"""An adapter of a version whose private records have a newer form: `python -m tests.e2e.newer_version run`.

It writes them as version 2 and reads both, as a version does whose upgrade keeps what is stored.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec


def _renewed(name: str, before: str, after: str) -> ModuleType:
    """The module of another source, in which `before` stands once."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    assert source.count(before) == 1, name
    module = module_from_spec(spec)
    sys.modules[name] = module
    exec(compile(source.replace(before, after), spec.origin, "exec"), module.__dict__)
    return module


def raise_versions() -> None:
    """Of all private records but leases, before anything has imported them."""
    _renewed(
        "adapter.contract.records",
        'tag_field="v", tag=1):\n',
        'tag_field="v", tag=lambda name: 1 if name == "Lease" else 2):\n',
    )
    decoding = _renewed(
        "adapter.tools.decoding",
        "        return msgspec.json.decode(value, type=kind)\n    except UNDECODABLE as exc:\n",
        "        return msgspec.json.decode(raised(value, kind), type=kind)\n    except UNDECODABLE as exc:\n",
    )

    def raised(value: bytes, kind: type[msgspec.Struct]) -> bytes:
        record = msgspec.json.decode(value, type=dict[str, Any])
        return msgspec.json.encode(record | {"v": kind.__struct_config__.tag}) if record["v"] == 1 else value

    decoding.raised = raised  # type: ignore[attr-defined]


if __name__ == "__main__":
    for name in [name for name in sys.modules if name.partition(".")[0] == "adapter"]:
        del sys.modules[name]  # a fork has the older ones
    raise_versions()
    runpy.run_module("adapter", run_name="__main__", alter_sys=True)
