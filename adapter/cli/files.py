"""Files that commands read, and write for this user alone: they hold tokens, keys or what people sent."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from adapter.cli.exits import USAGE, Failed


def read_bytes(path: Path) -> bytes:
    """Raises Failed."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise Failed(USAGE, f"Cannot read {path}: {exc.strerror}.") from None


def read_text(path: Path) -> str:
    """Raises Failed."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Failed(USAGE, f"Cannot read {path}: it is not UTF-8.") from None


def write_private(path: str | Path, content: str | bytes, *, advice: str = "") -> None:
    """Writes a file, and the folder that it is in. A file that others may read becomes private; a device or a pipe
    stays as it is. `advice` is said where it cannot be written. Raises Failed."""
    try:
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                os.fchmod(file.fileno(), 0o600)
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as exc:
        raise Failed(USAGE, f"Cannot write {path}: {exc.strerror}.{advice}") from None
