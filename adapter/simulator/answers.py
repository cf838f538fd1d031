"""Writes an answer to the connection: whole, slowly, garbled or not at all (faults `F1` to `F6`)."""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from adapter.simulator.clock import VirtualClock
from adapter.simulator.faults import FaultRule
from adapter.simulator.parameters import GARBLED

HTML = b"<html><head><title>%d</title></head><body><h1>%d</h1><hr>nginx</body></html>"


def ignore_outcome(written: bool, outcome: str) -> None:
    """`settle` of an answer that needs no settling."""


class HttpAnswer(Struct, kw_only=True):
    """An answer to write. `settle(written, outcome)` is called once, after the answer was written or lost."""

    body: bytes
    status: int = 200
    content_type: str = ""
    """An empty type stands for the setting `json_type`."""
    outcome: str = "answered"
    cut: bool = False
    """Whether the connection is reset instead."""
    settle: Callable[[bool, str], None] = ignore_outcome


def json_answer(value: Any, *, status: int = 200) -> HttpAnswer:
    """`value` None makes an empty body."""
    return HttpAnswer(body=b"" if value is None else msgspec.json.encode(value), status=status)


def error_page(rule: FaultRule, status: int) -> HttpAnswer:
    """The error page of a gateway in front of iLink (faults `F1`, `F2`)."""
    body = str(rule.params["body"]).encode() if "body" in rule.params else HTML % (status, status)
    return HttpAnswer(body=body, status=status, content_type="text/html", outcome=rule.fault)


def gateway_timeout(rule: FaultRule) -> HttpAnswer:
    """The error page of the edge for a poll that it cut (fault `F2`)."""
    return error_page(rule, int(rule.params.get("status", 524)))


def garble(answer: HttpAnswer, kind: str) -> None:
    """Spoils an answer in one of the ways of fault `F3`."""
    if kind == "malformed":
        answer.body = b'{"ret":0,,"msgs":[{]}'
    elif kind == "truncated":
        answer.body = answer.body[: max(len(answer.body) // 2, 1)]
    elif kind == "html":
        answer.body, answer.content_type = HTML % (200, 200), "text/html"
    elif kind == "empty":
        answer.body = b""
    elif kind == "wrong_type":
        answer.body, answer.content_type = b"ok", "text/plain"
    else:
        raise ValueError(f"unknown kind {kind}, there are {', '.join(GARBLED)}")


def reset_connection(request: web.Request) -> None:
    """Resets the connection."""
    transport = request.transport
    if transport is None:
        return
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def write(request: web.Request, answer: HttpAnswer) -> web.StreamResponse:
    """Raises ConnectionError if the client closed the connection before the last byte was handed over."""
    response = web.Response(body=answer.body, status=answer.status, content_type=answer.content_type)
    await response.prepare(request)
    await response.write_eof()
    return response


async def dribble(
    request: web.Request, answer: HttpAnswer, rule: FaultRule, clock: VirtualClock
) -> web.StreamResponse:
    """Writes the headers at once and the body in small pieces (fault `F4`)."""
    size = max(int(rule.params.get("chunk", 1)), 1)
    pause_s = float(rule.params.get("pause_ms", 200)) / 1000
    response = web.StreamResponse(status=answer.status)
    response.content_type = answer.content_type
    response.content_length = len(answer.body)
    await response.prepare(request)
    for start in range(0, len(answer.body), size):
        await clock.sleep(pause_s)
        await response.write(answer.body[start : start + size])
    await response.write_eof()
    return response


async def stay_silent(rule: FaultRule, clock: VirtualClock) -> None:
    """Waits `hang_ms`, or until the client gives up (fault `F5`)."""
    if "hang_ms" in rule.params:
        await clock.sleep(float(rule.params["hang_ms"]) / 1000)
    else:
        await asyncio.Event().wait()
