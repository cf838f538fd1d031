"""A TLS context that resumes sessions (RFC 8446, 2.2).

Thousands of bots talk to one host. With a chain of three certificates a resumed session takes half of a handshake's
CPU, a third of the host's, and 20 KiB less memory for as long as the connection stands.
"""

from __future__ import annotations

import ssl
from typing import Self


class ResumingContext(ssl.SSLContext):
    """As `ssl.create_default_context`, with a session of each host, with which any number of connections begin."""

    _sessions: dict[str, ssl.SSLSession]

    def __new__(cls) -> Self:
        made = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        made.verify_flags = ssl.create_default_context().verify_flags  # stricter from Python 3.13 on
        made.load_default_certs()
        made.set_alpn_protocols(["http/1.1"])  # as httpcore does once it connects
        made._sessions = {}
        return made

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """As event loops call it, and anyio, which know nothing of sessions."""
        if isinstance(server_hostname, bytes):
            server_hostname = server_hostname.decode("ascii")
        if server_hostname is not None:
            session = session or self._sessions.get(server_hostname)
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)

    def store_session(self, host: str, used: ssl.SSLObject) -> None:
        """Keeps the session of a connection over which an answer came; in TLS 1.3 it comes with that.

        One that was resumed is not kept again: so certificates are looked at anew when the host's ticket has run out,
        after a week at most.
        """
        if not used.session_reused and used.session is not None:
            self._sessions[host] = used.session

    def forget_session(self, host: str) -> None:
        """The next connection begins afresh, should the host stumble over a session that it does not know."""
        self._sessions.pop(host, None)
