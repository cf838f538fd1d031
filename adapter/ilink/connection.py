"""One HTTP/1.1 connection without pipelining: a request, its answer, the next request. httptools parses.

Name resolution, TLS and pooling are in `transport`. No redirects, no cookies, no retries.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import cast

import httptools

from adapter.errors import Temporary, Uncertain
from adapter.ilink.protocol import IlinkReply
from adapter.kit.timing import Deadline

HEAD_BYTES = 65_536
"""Longest head of an answer, trailers included."""
CHUNK_BYTES = 16
"""Allowed chunk overhead for each byte of the body."""
PARSER_LENIENCIES = {
    "lenient_headers": True,
    "lenient_optional_cr_before_lf": True,
    "lenient_spaces_after_chunk_size": True,
    "lenient_chunked_length": True,
}
"""Deviations that a client must or may accept: folded headers, lines that end in LF, a length beside chunks, which
the chunks override (RFC 9112, 5.2, 2.2, 6.3). iLink may count the messages in such an answer as delivered. The
deviations are dangerous only in a proxy, which passes them on."""


class _Answer:
    """Parses the answers of one connection, one after the other, with httptools' callbacks."""

    __slots__ = ("_parser", "body", "framed", "head_read", "headers", "is_complete", "keeps", "limit", "problem",
                 "read", "size", "status")  # fmt: skip

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(**PARSER_LENIENCIES)
        self.keeps = True
        """Whether another answer may follow."""
        self.begin(0)

    def begin(self, limit: int) -> None:
        """Prepares for an answer of at most `limit` bytes."""
        self.limit = limit
        self.status = self.read = self.size = 0
        self.headers: dict[str, str] = {}
        self.body: bytes | bytearray = b""
        self.head_read = self.is_complete = False
        self.framed = True
        """Whether the answer tells its own end."""
        self.problem: Uncertain | None = None

    def feed(self, data: bytes) -> None:
        """Takes a piece of the answer, after which it is complete, or has a problem, or goes on."""
        self.read += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self.keeps = False
            if not self.is_complete and self.problem is None:
                self.problem = Uncertain("network", type(exc).__name__)
        around = self.read - CHUNK_BYTES * self.size
        if self.problem is None and not self.is_complete and around > HEAD_BYTES:
            self.problem = Uncertain("network", f"what is around the body exceeds {HEAD_BYTES} bytes")

    def close(self) -> None:
        """Breaks the reference cycle with the parser."""
        self.keeps = False
        del self._parser

    # for the parser ------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Starts another head: after an answer with status 1xx, or after the answer, where it is unexpected."""
        if self.is_complete:
            self.keeps = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keeps the first header of a name. A trailer may not change the head (RFC 9110, 6.5.1)."""
        if not self.head_read:
            self.headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        if not self.is_complete:
            self.status = self._parser.get_status_code()
            if self.status >= 200:
                self.head_read = True
                self.framed = "content-length" in self.headers or "transfer-encoding" in self.headers

    def on_body(self, body: bytes) -> None:
        if self.is_complete:
            return
        self.size += len(body)
        if self.size > self.limit:
            self.problem = self.problem or Uncertain("unreadable", f"the answer exceeds {self.limit} bytes")
        elif not self.body:
            self.body = body
        elif isinstance(self.body, bytearray):
            self.body += body
        else:
            self.body = bytearray(self.body) + body  # not a list: a server may send a byte a piece

    def on_message_complete(self) -> None:
        """An answer is complete; one with status 1xx does not count."""
        if not self.head_read:
            self.headers = {}
        elif not self.is_complete:
            self.is_complete = True
            self.keeps = self.keeps and self._parser.should_keep_alive()


class Connection(asyncio.Protocol):
    """An asyncio.Protocol for one peer."""

    __slots__ = ("_answer", "_deadline", "_loop", "_result", "_transport", "idle_since", "tls")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._answer: _Answer
        self._transport: asyncio.Transport | None = None
        self._result: asyncio.Future[IlinkReply] | None = None
        self._deadline: Deadline
        self.idle_since = 0.0
        """End of the last answer, by the loop's clock."""
        self.tls: ssl.SSLObject | None = None

    @property
    def is_usable(self) -> bool:
        """Whether the connection can carry another request."""
        return self._transport is not None and not self._transport.is_closing() and self._answer.keeps

    @property
    def is_silent(self) -> bool:
        """Whether no byte came in answer to the last request."""
        return self._answer.read == 0

    async def send_request(self, request: bytes, timeout_s: float, limit: int) -> IlinkReply:
        """Sends the request and reads its answer, still compressed. Closes the connection if it is cancelled or
        fails.

        Raises TimeoutError; Temporary: the connection was closed before; Uncertain("network"): no answer, a part of
        one, or invalid HTTP; Uncertain("unreadable"): more than `limit` bytes.
        """
        if self._transport is None or self._transport.is_closing():
            raise Temporary("network", "the connection is closed")
        self._answer.begin(limit)
        self._result = result = self._loop.create_future()
        self._deadline = Deadline(self._loop, timeout_s, self._on_deadline)
        self._transport.write(request)
        del request
        try:
            reply: IlinkReply = await result
            return reply
        except BaseException:
            self._abort()
            raise
        finally:
            self._deadline.cancel()
            del self._deadline  # breaks a reference cycle
            self._answer.body = b""
            self._result = None
            del result  # an error in it refers to this frame
            self.idle_since = self._loop.time()

    def close(self) -> None:
        """Closes the connection as TLS requires."""
        if self._transport is not None:
            self._transport.close()

    # for the event loop -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._answer = _Answer()
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no class of asyncio's
        self.tls = transport.get_extra_info("ssl_object")

    def data_received(self, data: bytes) -> None:
        """Takes a piece of the answer. Data without a request close the connection."""
        answer = self._answer
        if self._result is None or self._result.done():
            self._abort()
            return
        answer.feed(data)
        if answer.problem is not None:
            self._fail(answer.problem)
        elif answer.is_complete:
            self._finish()

    def eof_received(self) -> None:
        """The server closes its side, so this side closes, too; `connection_lost` follows."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Finishes an answer that the end of the connection delimits; any other unfinished answer is lost."""
        if self._transport is None:  # the TLS handshake failed
            return
        self._transport = None
        answer = self._answer
        answer.close()
        if exc is None and answer.head_read and not answer.framed:
            self._finish()
        else:
            self._fail(Uncertain("network", type(exc).__name__ if exc else "the server closed the connection"))

    # -----------------------------------------------------------------------------------------------------------

    def _on_deadline(self) -> None:
        self._fail(TimeoutError())

    def _fail(self, problem: Exception) -> None:
        if self._result is not None and not self._result.done():
            self._result.set_exception(problem)
        self._abort()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _finish(self) -> None:
        if self._result is None or self._result.done():
            return
        answer = self._answer
        self._result.set_result(IlinkReply(answer.status, answer.headers, bytes(answer.body)))
        if not answer.keeps:
            self.close()
