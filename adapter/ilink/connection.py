"""One HTTP/1.1 connection without pipelining: a request, its answer, the next request. httptools parses.

Name resolution, TLS and pooling are in `transport`. No redirects, no cookies, no retries.
"""

from __future__ import annotations

import asyncio
import ssl
from functools import partial
from typing import cast

import httptools

from adapter.errors import AdapterError, Temporary, Uncertain
from adapter.ilink.budget import SMALL, ByteBudget, Share
from adapter.ilink.protocol import Reply
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


class Connection(asyncio.Protocol):
    """An asyncio.Protocol for one peer, with httptools' callbacks."""

    __slots__ = (
        "_answer",
        "_body",
        "_budget",
        "_deadline",
        "_due",
        "_ended",
        "_framed",
        "_head_read",
        "_headers",
        "_keeps",
        "_limit",
        "_loop",
        "_parser",
        "_problem",
        "_read",
        "_remaining",
        "_share",
        "_status",
        "_transport",
        "idle_since",
        "tls",
    )

    def __init__(self, budget: ByteBudget) -> None:
        self._loop = asyncio.get_running_loop()
        self._budget = budget
        self._parser: httptools.HttpResponseParser
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Reply] | None = None
        self._keeps = True
        self.idle_since = 0.0
        """End of the last answer, by the loop's clock."""
        self.tls: ssl.SSLObject | None = None
        self._deadline: Deadline
        self._due: float
        """When the deadline expires, by the loop's clock."""
        self._share: asyncio.Future[Share] | None
        """Share of the budget for a large answer."""
        self._limit: int
        self._headers: dict[str, str]
        self._body: bytes | bytearray
        self._problem: AdapterError | None
        self._head_read: bool
        self._ended: bool
        self._framed: bool
        self._reset_reply(0)

    @property
    def is_usable(self) -> bool:
        """Whether the connection can carry another request."""
        return self._keeps and self._transport is not None and not self._transport.is_closing()

    @property
    def is_silent(self) -> bool:
        """Whether no byte came in answer to the last request."""
        return self._read == 0

    async def send_request(self, request: bytes, timeout_s: float, limit: int) -> Reply:
        """Sends the request and reads its answer, still compressed. Closes the connection if it is cancelled or
        fails. The wait of a large answer for its share of the budget does not count.

        Raises TimeoutError; Temporary: the connection was closed before; Uncertain("network"): no answer, a part of
        one, or invalid HTTP; Uncertain("unreadable"): more than `limit` bytes.
        """
        if self._transport is None or self._transport.is_closing():
            raise Temporary("network", "the connection is closed")
        self._reset_reply(limit)
        self._answer = answer = self._loop.create_future()
        self._start_clock(timeout_s)
        self._transport.write(request)
        try:
            reply: Reply = await answer
            return reply
        except BaseException:
            self.abort()
            raise
        finally:
            self._deadline.cancel()
            del self._deadline  # breaks a reference cycle
            if (share := self._share) is not None and not share.cancel():
                share.result().release()
            self._share, self._body = None, b""
            self._answer = None
            del answer  # an error in it refers to this frame
            self.idle_since = self._loop.time()

    def abort(self) -> None:
        """Closes the connection at once."""
        self._keeps = False
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Closes the connection as TLS requires."""
        self._keeps = False
        if self._transport is not None:
            self._transport.close()

    # for the event loop -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open. The parser refers to this object, so it is made only now."""
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(**PARSER_LENIENCIES)
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no class of asyncio's
        self.tls = transport.get_extra_info("ssl_object")

    def data_received(self, data: bytes) -> None:
        """Takes a piece of the answer. Data without a request close the connection."""
        if self._answer is None or self._answer.done():
            self.abort()
            return
        self._read += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._keeps = False
            if not self._ended:  # otherwise only data after the answer are invalid
                self._finish_with_error(self._problem or Uncertain("network", type(exc).__name__))
        around = self._read - CHUNK_BYTES * (self._limit - self._remaining)
        if self._problem is None and not self._ended and around > HEAD_BYTES:
            self._problem = Uncertain("network", f"what is around the body exceeds {HEAD_BYTES} bytes")
        if self._problem is not None:
            self._finish_with_error(self._problem)
        elif self._ended:
            self._finish_with_reply()
        elif self._share is None and self._limit - self._remaining > SMALL:
            self._reserve_share()

    def eof_received(self) -> None:
        """The server closes its side, so this side closes, too; `connection_lost` follows."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Finishes an answer that the end of the connection delimits; any other unfinished answer is lost."""
        self._keeps = False
        if self._transport is None:  # the TLS handshake failed
            return
        waits = self._share is not None and not self._share.done()  # unread data may remain
        if exc is None and self._head_read and not self._framed and not waits:
            self._finish_with_reply()
        else:
            self._finish_with_error(
                Uncertain("network", type(exc).__name__ if exc else "the server closed the connection")
            )
        self._transport = None
        del self._parser  # breaks a reference cycle

    # for the parser ------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Starts another head: after an answer with status 1xx, or after the answer, where it is unexpected."""
        if self._ended:
            self._keeps = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keeps the first header of a name. A trailer may not change the head (RFC 9110, 6.5.1)."""
        if self._head_read:
            return
        self._headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        """The head is complete."""
        if self._ended:
            return
        self._status = self._parser.get_status_code()
        if self._status >= 200:
            self._head_read = True
            self._framed = "content-length" in self._headers or "transfer-encoding" in self._headers

    def on_body(self, body: bytes) -> None:
        """Takes a piece of the body."""
        if self._ended:
            return
        self._remaining -= len(body)
        if self._remaining >= 0:
            if not self._body:
                self._body = body
            elif isinstance(self._body, bytearray):
                self._body += body
            else:
                self._body = bytearray(self._body) + body  # not a list: a server may send a byte a piece
        elif self._problem is None:
            self._problem = Uncertain("unreadable", f"the answer exceeds {self._limit} bytes")

    def on_message_complete(self) -> None:
        """An answer is complete; one with status 1xx does not count."""
        if not self._head_read:
            self._headers = {}
        elif not self._ended:
            self._ended = True
            self._keeps = self._keeps and self._parser.should_keep_alive()

    # -----------------------------------------------------------------------------------------------------------

    def _reset_reply(self, limit: int) -> None:
        """Prepares for the next answer."""
        self._headers = {}
        self._body = b""
        self._share = None
        self._limit = self._remaining = limit
        self._read = self._status = 0
        self._head_read = self._ended = False
        self._framed = True
        self._problem = None

    def _start_clock(self, seconds: float) -> None:
        self._due = self._loop.time() + seconds
        self._deadline = Deadline(self._loop, seconds, self._on_deadline)

    def _reserve_share(self) -> None:
        """Pauses reading until there is room for a large answer: its announced or largest size, and its unpacked
        size."""
        assert self._transport is not None
        content_length = self._headers.get("content-length", "")
        exact = (
            "transfer-encoding" not in self._headers
            and content_length.isascii()
            and content_length.isdigit()
            and len(content_length) < 10
        )
        packed = min(int(content_length), self._limit) if exact else self._limit
        unpacked = self._limit if "content-encoding" in self._headers else 0
        self._share = share = self._budget.reserve(packed + unpacked)
        if not share.done():
            self._deadline.cancel()
            self._transport.pause_reading()
            share.add_done_callback(partial(self._resume_reading, self._due - self._loop.time()))

    def _resume_reading(self, left_s: float, share: asyncio.Future[Share]) -> None:
        if share is self._share and self._transport is not None:
            self._start_clock(left_s)
            self._transport.resume_reading()

    def _on_deadline(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(TimeoutError())

    def _finish_with_error(self, problem: AdapterError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(problem)
        self.abort()

    def _finish_with_reply(self) -> None:
        if self._answer is None or self._answer.done():
            return
        share = self._share.result() if self._share is not None else None
        self._answer.set_result(Reply(self._status, self._headers, bytes(self._body), share=share))
        self._share = None
        if not self._keeps:
            self.close()
