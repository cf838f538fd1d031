"""Contexts of the command `nats`: named files that say where NATS is and who asks, in `~/.config/nats/context`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from adapter.errors import SettingsError

SELECTED = "@selected"
"""Instead of a name: the context that `nats context select` has chosen."""
SERVER = "nats://127.0.0.1:4222"
"""That of a context without a URL, as `nats` has it."""
IDENTITIES = ("user", "creds", "nkey", "token")
"""The first one that a context has counts."""
FIELDS = ("url", "password", "ca", "cert", "key", "tls_first", "inbox_prefix")
UNSUPPORTED = ("user_jwt", "nsc", "socks_proxy", "jetstream_domain", "jetstream_api_prefix")


def with_context(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ`, with what the context in NATS_CONTEXT says of variables that are not set. Raises SettingsError."""
    given = {name: value for name, value in environ.items() if value.strip()}
    if name := given.get("NATS_CONTEXT", "").strip():
        home = Path(given.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "nats"
        return {"NATS_URL": SERVER, **_read(home, name), **given}
    return given


def _read(home: Path, name: str) -> dict[str, str]:
    """The variables that say the same as the context. Raises SettingsError, whose text holds no secret."""
    try:
        name = (home / "context.txt").read_text(encoding="utf-8").strip() if name == SELECTED else name
        path = home / "context" / f"{name}.json"
        if path.parent != home / "context":
            raise _fault(f"{name!r} is no name of a context.")
        context = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        known = sorted(file.stem for file in (home / "context").glob("*.json"))
        raise _fault(f"cannot read {exc.filename}: {exc.strerror}; contexts: {', '.join(known) or 'none'}.") from None
    except ValueError:
        raise _fault(f"the context {name} is no JSON.") from None
    if not isinstance(context, dict):
        raise _fault(f"the context {name} is no JSON object.")
    if unusable := [field for field in UNSUPPORTED if context.get(field)]:
        raise _fault(f"the context {name} has {', '.join(unusable)}, which is not supported: use creds, or nkey.")
    identity = next((field for field in IDENTITIES if context.get(field)), "")
    return {
        f"NATS_{field.upper()}": str(context[field]).lower() if field == "tls_first" else str(context[field])
        for field in (*FIELDS, identity)
        if context.get(field)
    }


def _fault(sentence: str) -> SettingsError:
    return SettingsError("nats_context", f"NATS_CONTEXT: {sentence}")
