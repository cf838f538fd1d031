"""The steps of a QR login, and what is told of them. Pure."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from adapter.contract.messages import CHECKING, Login, LoginEvent
from adapter.contract.records import LoginRecord
from adapter.logins.qr import png_base64, terminal_text
from adapter.security.seal import Sealer, login_context

ADVICE = {
    "wait": "Scan the code with WeChat.",
    "scanned": "Confirm on the phone.",
    "need_verify_code": "Send the digits shown on the phone by login.verify.",
    "confirmed": "The bot is bound. The user must write a first message before anything can be sent to them.",
    "already_bound": "A bot of this sandbox serves this user already, and goes on with it.",
    "expired": "No code was scanned and confirmed in time; start another login.",
    "failed": "The login failed; start another one.",
    "cancelled": "The login was cancelled.",
    "lost": "The replica that ran the login is gone; start another one.",
}


def next_step(record: LoginRecord, **changes: object) -> LoginRecord:
    """The record after a step that has an event."""
    return structs.replace(record, **{"reason": "", "detail": "", **changes, "step": record.step + 1})


def _told(login: str, record: LoginRecord) -> dict[str, Any]:
    """What answers and events have in common."""
    return {
        "login": login,
        "sandbox": record.sandbox,
        "status": record.status,
        "code": record.number,
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
    url = sealer.open(login_context(login, "url"), record.url) if record.url else ""
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
