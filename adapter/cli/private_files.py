"""Files that only this user may read: they hold tokens, keys or what people sent."""

from __future__ import annotations

import os
import stat


def open_private(path: str | os.PathLike[str], how: int = os.O_TRUNC) -> int:
    """A descriptor to write to a file. A file that others may read becomes private; a device or a pipe stays as it
    is. `how`: os.O_TRUNC, os.O_APPEND or os.O_EXCL. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, 0o600)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
