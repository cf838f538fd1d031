"""The console over HTTP. Threads of their own talk to the browser; the event loop talks to the bus."""

from __future__ import annotations

import asyncio
import concurrent.futures
import ipaddress
import re
import secrets
from collections.abc import Callable, Coroutine, Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import parse_qs, quote

import structlog

from adapter.console.auth import SESSION_S, ConsoleAuth
from adapter.console.languages import LANGUAGES, preferred
from adapter.console.pages import Pages
from adapter.console.service import ConsoleService
from adapter.contract.messages import BOT_STATUSES, Options
from adapter.errors import AdapterError, Refused, Temporary
from adapter.settings import split_addr
from adapter.tools.timing import Clock
from adapter.tools.web import Listener

log = structlog.get_logger()

T = TypeVar("T")
COOKIE = "wechat_nats_console"
LANGUAGE = "wechat_nats_language"
"""Name of the cookie with the language that was chosen; without it the browser's counts."""
LANGUAGE_S = 365 * 86400
ANSWER_S = 15.0
"""How long a page waits for the event loop before it says that nobody answers."""
MAX_BODY = 4096
REFRESH_S = 5
_NUMBER = re.compile(r"[0-9]{1,18}")
_LOGIN = re.compile(r"/logins/([0-9a-f]{24})(/verify|/cancel|)")
_LETTER = re.compile(r"/dead/([0-9]{1,18})")
SIGNED_OUT: dict[str, Any] = {"replicas": [], "expected": 0, "dead": 0, "logins": 0}


class BrowserRequest(NamedTuple):
    """What a browser asks for."""

    method: str
    path: str
    query: dict[str, str]
    form: dict[str, str]
    session: str
    language: str
    """A key of LANGUAGES."""
    origin: str
    """"" where the browser says nothing."""
    host: str
    secure: bool
    """It came over TLS, as far as a proxy in front of us tells."""
    peer: str
    part: bool
    """It is for the page's own script, which needs no other script and no style."""
    nonce: str
    """Scripts and styles of the answer bear it."""


class Response(NamedTuple):
    """What it gets."""

    status: str
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class Console(Listener):
    """Serves at `addr` while entered; see Listener."""

    def __init__(self, addr: str, auth: ConsoleAuth, service: ConsoleService, clock: Clock) -> None:
        super().__init__("console_addr", addr, self._serve)
        self._auth = auth
        self._service = service
        self._now_ms = clock.now_ms
        self._pages = Pages()

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        super().__enter__()
        log.info("console.started", url=self.url)
        if not is_loopback(split_addr(self._addr)[0]):
            log.warning(
                "console.exposed", url=self.url, detail="Put TLS in front of it: the token passes in the clear."
            )
        return self

    # HTTP -------------------------------------------------------------------------------------------

    def _serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        nonce = secrets.token_urlsafe(16)
        try:
            request = read_request(environ, nonce)
            answer = self._answer(request) if isinstance(request, BrowserRequest) else request
        except Exception:  # a bug: the page says so, and the others go on
            log.exception("console.crashed")
            answer = Response("500 Internal Server Error", b"The console failed; the adapter's log says why.\n")
        kind = "text/html" if answer.body.startswith(b"<!doctype") else "text/plain"
        start_response(
            answer.status,
            [
                ("Content-Type", f"{kind}; charset=utf-8"),
                ("Content-Length", str(len(answer.body))),
                *security_headers(nonce),
                *answer.headers,
            ],
        )
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [answer.body]

    def _answer(self, request: BrowserRequest) -> Response:
        if request.method not in ("GET", "HEAD", "POST"):
            return Response("405 Method Not Allowed", b"GET, HEAD or POST\n", (("Allow", "GET, HEAD, POST"),))
        if request.method == "POST" and not is_same_origin(request):
            return Response("403 Forbidden", b"This form is of another site.\n")
        if (request.method, request.path) == ("POST", "/signin"):
            return self._sign_in(request)
        if request.method == "GET" and (language := request.query.get("lang", "")) in LANGUAGES:
            kept = cookie(LANGUAGE, language, LANGUAGE_S, secure=request.secure)
            return see_other(_place(request.path), kept)
        if not self._auth.is_valid_session(request.session, self._now_ms() // 1000):
            if request.method == "POST":
                return Response("403 Forbidden", b"Sign in first.\n")
            return self._render_page(request, "signin", "401 Unauthorized", wrong="")
        if request.method == "POST" and not self._auth.is_form_proof(request.session, request.form.get("proof", "")):
            return Response("403 Forbidden", b"This form is of another session; go back and load the page again.\n")
        return self._answer_signed_in(request)

    def _sign_in(self, request: BrowserRequest) -> Response:
        now_s = self._now_ms() // 1000
        if not self._auth.may_try(request.peer, now_s):
            wrong = "Too many wrong tokens came from your address: wait a minute."
            return self._render_page(request, "signin", "429 Too Many Requests", wrong=wrong)
        if not self._auth.is_token(request.form.get("token", "")):
            self._auth.count_wrong(request.peer)
            log.warning("console.refused", peer=request.peer)
            return self._render_page(request, "signin", "401 Unauthorized", wrong="This is not the token.")
        log.info("console.signed_in", peer=request.peer)
        return see_other(
            "/", cookie(COOKIE, self._auth.new_session(now_s, request.nonce), SESSION_S, secure=request.secure)
        )

    def _answer_signed_in(self, request: BrowserRequest) -> Response:
        try:
            if request.method == "POST":
                return self._answer_post(request)
            return self._answer_get(request)
        except Refused as exc:
            missing = exc.reason in ("not_found", "not_bound")
            status, headline = ("404 Not Found", "Not here") if missing else ("400 Bad Request", "That did not work")
            return self._problem_page(request, status, headline, exc.detail or exc.reason)
        except (Temporary, TimeoutError) as exc:
            reason = exc.reason if isinstance(exc, Temporary) else "timeout"
            log.info("console.unanswered", path=request.path.partition("/logins/")[0] or "/logins", reason=reason)
            return self._problem_page(
                request, "503 Service Unavailable", "The bus does not answer", "Try again in a moment."
            )
        except AdapterError as exc:
            return self._problem_page(request, "409 Conflict", "That did not work", exc.detail or exc.reason)

    def _answer_get(self, request: BrowserRequest) -> Response:
        service = self._service
        if request.path == "/":
            words, state, page = (request.query.get(name, "") for name in ("q", "state", "page"))
            state = state if state in BOT_STATUSES else ""
            number = int(page) if _NUMBER.fullmatch(page) else 1
            found = self._run_in_loop(service.find_bindings(words[:100], state, number))
            return self._render_page(request, "bindings", found=found, refresh_s=REFRESH_S)
        if request.path == "/dead":
            return self._dead_page(request, request.query.get("before", ""))
        if request.path == "/logins":
            return self._logins_page(request)
        if (match := _LOGIN.fullmatch(request.path)) and not match[2]:
            shown = self._run_in_loop(service.shown_login(match[1]))
            return self._render_page(request, "login", here="/logins", shown=shown, refresh_s=REFRESH_S)
        return self._problem_page(request, "404 Not Found", "Not here", "There is no such page.")

    def _answer_post(self, request: BrowserRequest) -> Response:
        service, form = self._service, request.form
        if request.path == "/signout":
            self._auth.sign_out(request.session, self._now_ms() // 1000)
            return see_other("/", cookie(COOKIE, "", 0, secure=request.secure))
        if request.path == "/logins":
            sandbox = form.get("sandbox", "").strip()
            options = Options(auto_typing="auto_typing" in form)
            try:
                handle = self._run_in_loop(service.start_login(sandbox, options))
            except (Refused, Temporary) as exc:
                return self._logins_page(request, sandbox, exc.detail or exc.reason, "400 Bad Request")
            return see_other(f"/logins/{handle}")
        if (match := _LOGIN.fullmatch(request.path)) and match[2]:
            action = (
                service.verify_login(match[1], form.get("digits", ""))
                if match[2] == "/verify"
                else service.cancel_login(match[1])
            )
            self._run_in_loop(action)
            return see_other(f"/logins/{match[1]}")
        if (match := _LETTER.fullmatch(request.path)) and form.get("do") in ("retry", "drop"):
            seq, say = int(match[1]), LANGUAGES[request.language]
            if form["do"] == "retry":
                subject = self._run_in_loop(service.retry_dead_letter(seq))
                notice = say("Letter {} is stored again on {}.", seq, subject)
            else:
                self._run_in_loop(service.drop_dead_letter(seq))
                notice = say("Letter {} is dropped.", seq)
            log.info("console.dead_letter", sequence=seq, action=form["do"])
            return self._dead_page(request, notice=notice)
        return self._problem_page(request, "404 Not Found", "Not here", "There is no such page.")

    def _run_in_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs in the event loop, waits in this thread. Raises what it raises, TimeoutError."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(ANSWER_S)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError from None
        except concurrent.futures.CancelledError:
            raise Temporary("stopping") from None

    # pages ------------------------------------------------------------------------------------------

    def _render_page(self, request: BrowserRequest, name: str, status: str = "200 OK", **values: Any) -> Response:
        is_signed_in = self._auth.is_valid_session(request.session, self._now_ms() // 1000)
        proof = self._auth.form_proof(request.session) if is_signed_in else ""
        platform = SIGNED_OUT
        if proof and "platform" not in values:
            platform = self._run_in_loop(self._service.platform())
        common = {
            "nonce": request.nonce,
            "language": request.language,
            "switch": values.get("here", "/") if request.method == "POST" else _place(request.path),
            "part": request.part,
            "proof": proof,
            "here": request.path,
            "platform": platform,
            "notice": "",
            "refresh_s": 0,
            "now_ms": self._now_ms(),
        }
        return Response(status, self._pages.render(name, **{**common, **values}))

    def _dead_page(self, request: BrowserRequest, before: str = "", notice: str = "") -> Response:
        older_than = int(before) if _NUMBER.fullmatch(before) else None
        letters = self._run_in_loop(self._service.dead_letters(older_than))
        return self._render_page(request, "dead", here="/dead", dead=letters, notice=notice)

    def _logins_page(
        self, request: BrowserRequest, sandbox: str = "", wrong: str = "", status: str = "200 OK"
    ) -> Response:
        found = self._run_in_loop(self._service.open_logins())
        return self._render_page(
            request, "logins", status, logins=found, sandbox=sandbox, wrong=wrong, refresh_s=REFRESH_S
        )

    def _problem_page(self, request: BrowserRequest, status: str, headline: str, sentence: str) -> Response:
        """Asks nothing of the bus: it may be the problem."""
        back = "/" + request.path.split("/")[1]
        return self._render_page(
            request, "problem", status, headline=headline, sentence=sentence, back=back, platform=SIGNED_OUT
        )


def read_request(environ: dict[str, Any], nonce: str) -> BrowserRequest | Response:
    """What is asked for; at once the answer to what no browser sends."""
    form: dict[str, str] = {}
    try:
        if environ.get("REQUEST_METHOD") == "POST":
            length = environ.get("CONTENT_LENGTH") or "0"
            if not length.isdigit() or int(length) > MAX_BODY:
                return Response("413 Content Too Large", f"A form has at most {MAX_BODY} bytes.\n".encode())
            body = environ["wsgi.input"].read(int(length))
            if len(body) < int(length):
                return Response("400 Bad Request", b"This form was cut.\n")
            form = _fields(body.decode("utf-8", "replace"))
        query = _fields(environ.get("QUERY_STRING", ""))
    except OSError:  # it stopped, or was closed for another
        return Response("408 Request Timeout", b"This form was cut.\n")
    except ValueError:  # too many fields
        return Response("400 Bad Request", b"This is no form of ours.\n")
    cookies = _cookies(environ.get("HTTP_COOKIE", ""))
    language = cookies.get(LANGUAGE, "")
    return BrowserRequest(
        method=environ.get("REQUEST_METHOD", ""),
        path=environ.get("PATH_INFO", ""),
        query=query,
        form=form,
        session=cookies.get(COOKIE, ""),
        language=language if language in LANGUAGES else preferred(environ.get("HTTP_ACCEPT_LANGUAGE", "")),
        origin=environ.get("HTTP_ORIGIN", ""),
        # a proxy may call us by another name; no site can make a browser send this header to us
        host=environ.get("HTTP_X_FORWARDED_HOST") or environ.get("HTTP_HOST", ""),
        secure=environ.get("HTTP_X_FORWARDED_PROTO", "") == "https",
        peer=environ.get("REMOTE_ADDR", ""),
        part=environ.get("HTTP_X_PART", "") == "1",
        nonce=nonce,
    )


def is_same_origin(request: BrowserRequest) -> bool:
    """Browsers say where a form is from; a page of another site, or none that it will name, is not ours."""
    return request.origin == "" or request.origin.partition("://")[2] == request.host


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def security_headers(nonce: str) -> list[tuple[str, str]]:
    """Nothing from elsewhere, nothing kept, nothing framed; scripts and styles only with the page's nonce."""
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:;"
        " connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )
    return [
        ("Content-Security-Policy", policy),
        ("Cache-Control", "no-store"),
        ("Referrer-Policy", "same-origin"),  # with none at all, browsers would not say where our own forms are from
        ("X-Content-Type-Options", "nosniff"),
        ("X-Frame-Options", "DENY"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
    ]


def see_other(place: str, *headers: tuple[str, str]) -> Response:
    return Response("303 See Other", b"", (("Location", place), *headers))


def cookie(name: str, value: str, seconds: int, *, secure: bool) -> tuple[str, str]:
    flags = "; Secure" if secure else ""
    return "Set-Cookie", f"{name}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{flags}"


def _fields(text: str) -> dict[str, str]:
    """The last value of each name. Raises ValueError."""
    parsed = parse_qs(text, keep_blank_values=True, max_num_fields=20, errors="replace")
    return {name: values[-1] for name, values in parsed.items()}


def _place(path: str) -> str:
    """The path as a link; two slashes would name another host."""
    return "/" + quote(path.lstrip("/"))


def _cookies(header: str) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(header).items()}
    except CookieError:
        return {}
