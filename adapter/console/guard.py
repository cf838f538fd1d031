"""Authentication of the console: its token, signed sessions, CSRF proofs of forms. No I/O, no clock.

Everything is derived from the token: any replica accepts the sessions of another, and a new token ends all of them.
"""

from __future__ import annotations

import hashlib
import hmac

SESSION_S = 12 * 3600
"""A session ends so long after signing in."""


class Guard:
    """Made of the console's token. Times are Unix seconds."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._key = hashlib.sha256(b"wechat-nats console\0" + self._token).digest()

    def knows(self, token: str) -> bool:
        """Compares in constant time."""
        return hmac.compare_digest(token.encode("utf-8", "replace"), self._token)

    def session(self, now_s: int) -> str:
        """A cookie for who knew the token."""
        until = f"{now_s + SESSION_S:x}"
        return f"{until}.{self._mac('session', until)}"

    def admits(self, session: str, now_s: int) -> bool:
        """Whether a cookie is one of ours and not over."""
        until, _, mac = session.partition(".")
        if not hmac.compare_digest(mac.encode("utf-8", "replace"), self._mac("session", until).encode()):
            return False
        return now_s < int(until, 16)  # ours, so it is a number

    def form(self, session: str) -> str:
        """What a form of this session carries: another site cannot read it (CSRF)."""
        return self._mac("form", session)

    def is_form(self, session: str, proof: str) -> bool:
        """Whether a form that was sent carries it."""
        return hmac.compare_digest(proof.encode("utf-8", "replace"), self.form(session).encode())

    def handle(self, login: str) -> str:
        """Stands for a login in addresses, since its id is a secret: who has it can fetch the code."""
        return self._mac("login", login)[:24]

    def _mac(self, purpose: str, text: str) -> str:
        return hmac.new(self._key, f"{purpose}\0{text}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()
