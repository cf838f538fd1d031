from __future__ import annotations

from tests.clients.conftest import npm

__all__ = ["npm"]
