"""Authentication of the console: its token, signed sessions, CSRF proofs of forms. No I/O, no clock.

Sessions are derived from the token: any replica accepts those of another, and a new token ends all of them. Which of
them were signed out, and who tried wrong tokens, is known to this replica alone, until it ends.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter

SESSION_S = 12 * 3600
"""A session ends so long after signing in."""
WRONG_A_MINUTE = 10
"""Wrong tokens of one address after which none of it is looked at, for the rest of a minute."""


class ConsoleAuth:
    """Made of the console's token. Times are Unix seconds."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._key = hashlib.sha256(b"wechat-nats console\0" + self._token).digest()
        self._signed_out: dict[str, int] = {}
        """Sessions that were ended here, until when they would have lasted."""
        self._wrong_attempts: Counter[str] = Counter()
        self._wrong_attempts_until_s = 0

    def is_token(self, token: str) -> bool:
        """Compares in constant time."""
        return hmac.compare_digest(token.encode("utf-8", "replace"), self._token)

    def may_try(self, peer: str, now_s: int) -> bool:
        """Whether a token from this address is looked at: behind a proxy, all have one."""
        if not now_s < self._wrong_attempts_until_s <= now_s + 60:
            self._wrong_attempts.clear()
            self._wrong_attempts_until_s = now_s + 60
        return self._wrong_attempts[peer] < WRONG_A_MINUTE

    def count_wrong(self, peer: str) -> None:
        """A token from this address was wrong."""
        self._wrong_attempts[peer] += 1

    def new_session(self, now_s: int, nonce: str) -> str:
        """A cookie for who knew the token. `nonce` has no dots, and makes it another than all others."""
        head = f"{now_s + SESSION_S:x}.{nonce}"
        return f"{head}.{self._mac('session', head)}"

    def is_valid_session(self, session: str, now_s: int) -> bool:
        """Whether a cookie is one of ours and not over."""
        head, _, mac = session.rpartition(".")
        if not hmac.compare_digest(mac.encode("utf-8", "replace"), self._mac("session", head).encode()):
            return False
        return now_s < _until_s(session) and session not in self._signed_out  # ours, so it has a number

    def sign_out(self, session: str, now_s: int) -> None:
        """Ends a session that is admitted."""
        for over in [one for one, until_s in list(self._signed_out.items()) if until_s <= now_s]:
            self._signed_out.pop(over, None)
        self._signed_out[session] = _until_s(session)

    def form_proof(self, session: str) -> str:
        """What a form of this session carries: another site cannot read it (CSRF)."""
        return self._mac("form", session)

    def is_form_proof(self, session: str, proof: str) -> bool:
        """Whether a form that was sent carries it."""
        return hmac.compare_digest(proof.encode("utf-8", "replace"), self.form_proof(session).encode())

    def login_handle(self, login: str) -> str:
        """Stands for a login in addresses, since its id is a secret: who has it can fetch the code."""
        return self._mac("login", login)[:24]

    def _mac(self, purpose: str, text: str) -> str:
        return hmac.new(self._key, f"{purpose}\0{text}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def _until_s(session: str) -> int:
    return int(session.partition(".")[0], 16)
