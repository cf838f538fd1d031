"""The steps of a QR login: its record after each, and what is told of it. Pure.

`LoginRegistry.update` stores a step, with its time, and removes the secrets after the last one.
"""

from __future__ import annotations

from typing import Any

from msgspec import structs

from adapter.contract.messages import CHECKING, Login, LoginEvent
from adapter.contract.records import LoginCode, LoginRecord
from adapter.logins.qr import png_base64, terminal_text
from adapter.ports import QrCode, Scan
from adapter.security.seal import Sealer, login_context

CODES = 2
"""Codes of a login about which iLink is asked: the newest, and the one before it, which someone may be scanning."""
DEAD_CODES = 3
"""Expired or blocked codes after which a login ends, as in the official client."""
ADVICE = {
    "wait": "Scan the code with WeChat.",
    "scanned": "Confirm on the phone.",
    "need_verify_code": "Send the digits shown on the phone by login.verify.",
    "confirmed": "The bot is bound. The user must write a first message before anything can be sent to them.",
    "already_bound": "A bot of this sandbox serves this user already; nothing has changed.",
    "expired": "No code was scanned and confirmed in time; start another login.",
    "failed": "The login failed; start another one.",
    "cancelled": "The login was cancelled.",
}


def next_step(record: LoginRecord, **changes: object) -> LoginRecord:
    """The record after a step that has an event."""
    return structs.replace(record, **{"reason": "", "detail": "", **changes, "step": record.step + 1})


def code_of(record: LoginRecord, number: int) -> LoginCode | None:
    """The code `number`, if it is still valid."""
    return next((code for code in record.codes if code.number == number), None)


def seal_code(sealer: Sealer, login: str, number: int, code: QrCode, now_ms: int) -> LoginCode:
    return LoginCode(
        number=number,
        handle=sealer.seal(login_context(login, "handle"), code.handle),
        url=sealer.seal(login_context(login, "url"), code.url),
        made_ms=now_ms,
    )


def with_code(record: LoginRecord, code: LoginCode) -> LoginRecord | None:
    """The record with a new code; None: the code before it was scanned. Both may be scanned from now on."""
    if record.status != "wait" or record.token:
        return None
    return next_step(record, number=code.number, codes=[*record.codes, code][-CODES:], digits="")


def apply_scan(record: LoginRecord, code: LoginCode, sent: str, scan: Scan) -> LoginRecord | None:
    """Applies an answer about a code; None: nothing changes. `sent`: the digits that were sent, as sealed.

    A confirmation, a redirect and a bot that is bound already are handled in `flow`.
    """
    match scan.status:
        case "scaned" if record.status != "scanned" and record.digits == sent:
            return next_step(record, status="scanned", codes=[code], digits="")
        case "need_verifycode" if sent:
            if record.digits != sent:
                return None  # other digits were sent meanwhile
            detail = "The digits are not those shown on the phone; send them again."
            return next_step(
                record, status="need_verify_code", codes=[code], digits="", reason="wrong_code", detail=detail
            )
        case "need_verifycode" if record.status != "need_verify_code":
            return next_step(record, status="need_verify_code", codes=[code])
        case "expired" | "verify_code_blocked":
            return _without_code(record, code, blocked=scan.status == "verify_code_blocked")
        case _:
            return None


def _without_code(record: LoginRecord, code: LoginCode, *, blocked: bool) -> LoginRecord:
    """Removes a dead code. Only the end of the newest one counts, since the other was already replaced."""
    codes = [other for other in record.codes if other.number != code.number]
    if codes and code.number != record.number:
        return structs.replace(record, codes=codes)
    record = structs.replace(record, ended=record.ended + 1)
    if record.ended < DEAD_CODES:
        return structs.replace(record, status="wait", codes=codes, digits="", reason="", detail="")
    if blocked:
        detail = "Too many wrong digits; start another login."
        return next_step(record, status="failed", reason="blocked", detail=detail)
    detail = f"{record.ended} codes expired without being confirmed; start another login."
    return next_step(record, status="expired", reason="codes", detail=detail)


def _told(login: str, record: LoginRecord) -> dict[str, Any]:
    """What answers and events have in common."""
    return {
        "login": login,
        "sandbox": record.sandbox,
        "status": record.status,
        "code": max(1, record.number),
        "bot": record.bot if record.is_over else "",
        "user": record.user if record.is_over else "",
        "former_user": record.former_user if record.status == "confirmed" else "",
        "reason": record.reason,
        "detail": record.detail or ADVICE[record.status],
    }


def event_of(login: str, record: LoginRecord) -> LoginEvent:
    """The event of a step, without secrets."""
    return LoginEvent(**_told(login, record), at_ms=record.changed_ms)


def to_login(sealer: Sealer, login: str, record: LoginRecord, *, with_png: bool) -> Login:
    """The answer to a request, with the newest code. Raises Refused("token_key")."""
    newest = record.codes[-1] if record.codes and not record.token else None
    url = sealer.open(login_context(login, "url"), newest.url) if newest else ""
    told = _told(login, record)
    if record.digits:
        told |= {"reason": CHECKING, "detail": "The digits are being checked."}
    return Login(
        **told,
        qrcode_url=url,
        qrcode_text=terminal_text(url) if url else "",
        qrcode_png=png_base64(url) if url and with_png else "",
        expires_at_ms=record.until_ms,
    )
