"""Settings: what is read, what is refused, and that every fault is named at once without showing a secret."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from adapter.bridge.window import SENT_KEPT
from adapter.errors import SettingsError
from adapter.settings import Settings, read_settings, split_addr

KEY = base64.b64encode(b"k" * 32).decode()
OLD_KEY = base64.b64encode(b"o" * 32).decode()


def refusal(environ: dict[str, str]) -> str:
    """The text of the SettingsError, without the leading reason."""
    with pytest.raises(SettingsError) as caught:
        read_settings(environ)
    assert caught.value.reason == "invalid_settings"
    return caught.value.detail


def test_an_empty_environment_gives_the_defaults() -> None:
    """Variables of others, also NATS_*, are nobody's business here."""
    assert read_settings({"PATH": "/bin", "NATS_CONTEXT": "prod"}) == Settings()


def test_an_empty_variable_counts_as_absent() -> None:
    """Charts and compose files set what has no value to nothing."""
    assert read_settings({"WECHAT_NATS_PREFIX": "", "WECHAT_NATS_REPLICAS": " ", "NATS_URL": ""}) == Settings()


@pytest.mark.parametrize(
    ("variable", "raw", "field", "value"),
    [
        ("NATS_URL", "nats://a:4222, tls://b:4222", "nats_url", ("nats://a:4222", "tls://b:4222")),
        ("NATS_URL", "localhost:4222", "nats_url", ("localhost:4222",)),
        ("WECHAT_NATS_PREFIX", "we-2", "prefix", "we-2"),
        ("WECHAT_NATS_REPLICAS", "3", "replicas", 3),
        ("WECHAT_NATS_CDN_BASE_URL", "https://cdn.example/c2c/", "cdn_base_url", "https://cdn.example/c2c"),
        ("WECHAT_NATS_ALLOWED_HOSTS", "sim, 127.0.0.1:8080", "allowed_hosts", ("sim", "127.0.0.1:8080")),
        ("WECHAT_NATS_TOKEN_KEY", f"{KEY},{OLD_KEY}", "token_key", (b"k" * 32, b"o" * 32)),
        ("WECHAT_NATS_SEND_GAP_MS", "0", "send_gap_ms", 0),
        ("WECHAT_NATS_WINDOW_HOURS", "22.5", "window_hours", 22.5),
        ("NATS_TLS_FIRST", "true", "nats_tls_first", True),
        ("WECHAT_NATS_LANGUAGE", "en", "language", "en"),
        ("WECHAT_NATS_IN_MAX_BYTES", "-1", "in_max_bytes", -1),
        ("WECHAT_NATS_ILINK_VERSION", "2.10.255", "ilink_version", "2.10.255"),
        ("WECHAT_NATS_ILINK_AGENT", "A_b.c/1.0+d (x <y@z>) E/2", "ilink_agent", "A_b.c/1.0+d (x <y@z>) E/2"),
        ("WECHAT_NATS_ILINK_ROUTE_TAG", "gray-1", "ilink_route_tag", "gray-1"),
    ],
)
def test_a_variable_is_read(variable: str, raw: str, field: str, value: object) -> None:
    assert getattr(read_settings({variable: raw}), field) == value


@pytest.mark.parametrize(
    ("variable", "raw", "expected"),
    [
        ("NATS_URL", "http://a", "expected nats://host:port"),
        ("NATS_URL", "nats://a:port", "expected nats://host:port"),
        ("NATS_CREDS", "/nowhere/x.creds", "expected a file"),
        ("WECHAT_NATS_PREFIX", "We.Chat", "expected string, pattern ^[a-z][a-z0-9_-]{0,31}"),
        ("WECHAT_NATS_REPLICAS", "2", "expected one of 1, 3, 5, got '2'"),
        ("WECHAT_NATS_SEND_GAP_MS", "-1", "expected integer, minimum 0"),
        ("WECHAT_NATS_LEASE_S", "nan", "expected number, minimum 0.5"),
        ("WECHAT_NATS_SENDS_PER_WINDOW", str(SENT_KEPT + 1), f"maximum {SENT_KEPT}, got '33'"),
        ("WECHAT_NATS_WINDOW_HOURS", "97", "expected number, exclusiveMinimum 0, maximum 96"),
        ("WECHAT_NATS_DRAIN_S", "inf", "expected number, minimum 0"),
        ("NATS_TLS_FIRST", "perhaps", "expected boolean"),
        ("WECHAT_NATS_ALLOWED_HOSTS", "http://sim", "expected host or host:port"),
        ("WECHAT_NATS_HTTP_ADDR", "a:99999", "expected host:port"),
        ("WECHAT_NATS_ILINK_BASE_URL", "ilink", "expected https://host"),
        ("WECHAT_NATS_ILINK_BASE_URL", "http://ilink", "or a host that WECHAT_NATS_ALLOWED_HOSTS names"),
        *(
            ("WECHAT_NATS_ILINK_VERSION", raw, "expected major.minor.patch, each 0 to 255, such as 2.4.9")
            for raw in ("2.4", "2.4.256", "v2.4.9", "2.4.09", "2.4.9-beta")
        ),
        *(
            ("WECHAT_NATS_ILINK_AGENT", raw, "expected Name/version (comment) of one or several products")
            for raw in ("Name", "a/1  b/2", "a/1 (a(b)", "a/1 (é)", "a/1 ()", "n" * 33 + "/1", "ab/123" + " a/1" * 63)
        ),
        ("WECHAT_NATS_ILINK_ROUTE_TAG", "two tags", "expected printable ASCII characters without spaces"),
        ("WECHAT_NATS_TOKEN_KEY", "c2hvcnQ=", "expected base64 of 32 bytes"),
        ("WECHAT_NATS_CONSOLE_TOKEN", "short", "expected 16 characters or more"),
        ("WECHAT_NATS_LOG", "verbose", "expected one of debug, error, info, warning"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(variable: str, raw: str, expected: str) -> None:
    text = refusal({variable: raw})
    assert text.startswith(f"{variable}: ")
    assert expected in text


def test_every_fault_is_named_at_once_on_its_own_line() -> None:
    text = refusal({"WECHAT_NATS_REPLICAS": "2", "WECHAT_NATS_LOG": "loud", "WECHAT_NATS_LOGS": "info"})
    assert [line.split(":")[0] for line in text.splitlines()] == [
        "WECHAT_NATS_REPLICAS",
        "WECHAT_NATS_LOG",
        "WECHAT_NATS_LOGS",
    ]


def test_a_misspelt_variable_is_refused_with_the_nearest_name() -> None:
    assert refusal({"WECHAT_NATS_SEND_GAP": "9"}) == (
        "WECHAT_NATS_SEND_GAP: no such setting, did you mean WECHAT_NATS_SEND_GAP_MS?"
    )


def test_a_port_of_ours_is_not_taken_for_one_of_kubernetes() -> None:
    assert "WECHAT_NATS_HTTP_PORT: no such setting" in refusal({"WECHAT_NATS_HTTP_PORT": "9464"})


def test_plain_http_is_for_allowed_hosts_only() -> None:
    environ = {"WECHAT_NATS_ILINK_BASE_URL": "http://127.0.0.1:8080", "WECHAT_NATS_ALLOWED_HOSTS": "127.0.0.1:8080"}
    assert read_settings(environ).ilink_base_url == "http://127.0.0.1:8080"
    assert "WECHAT_NATS_ILINK_BASE_URL" in refusal(environ | {"WECHAT_NATS_ALLOWED_HOSTS": "127.0.0.1:9"})


def test_a_client_certificate_needs_its_key_and_a_password_its_user(tmp_path: Path) -> None:
    cert = tmp_path / "cert.pem"
    cert.touch()
    text = refusal({"NATS_CERT": str(cert), "NATS_PASSWORD": "canary"})
    assert text.splitlines() == [
        "NATS_KEY: expected a value, since NATS_CERT has one",
        "NATS_USER: expected a value, since NATS_PASSWORD has one",
    ]


def test_the_inbox_keeps_at_least_a_window_and_an_hour() -> None:
    """An entry that is gone earlier takes a window with it that is still open."""
    asked = {"WECHAT_NATS_IN_MAX_AGE_H": "23.9"}
    expected = "expected at least 24, an hour more than WECHAT_NATS_WINDOW_HOURS, got 23.9"
    assert refusal(asked) == f"WECHAT_NATS_IN_MAX_AGE_H: {expected}"
    assert read_settings(asked | {"WECHAT_NATS_WINDOW_HOURS": "22.9"}).in_max_age_h == 23.9
    assert refusal({"WECHAT_NATS_WINDOW_HOURS": "96"}).startswith("WECHAT_NATS_IN_MAX_AGE_H: expected at least 97")


def test_who_asks_for_tls_gets_no_open_websocket(tmp_path: Path) -> None:
    """The password went over it in plain text."""
    ca = tmp_path / "ca.pem"
    ca.touch()
    asked = {"NATS_URL": "wss://a,ws://b", "NATS_CA": str(ca)}
    assert refusal(asked) == "NATS_URL: expected wss:// instead of ws://, which has no TLS, since NATS_CA asks for it"
    assert read_settings(asked | {"NATS_URL": "wss://a"}).nats_ca
    assert read_settings(asked | {"NATS_CA": ""}).nats_url == ("wss://a", "ws://b")


def test_the_language_is_that_of_the_terminal_unless_the_setting_says_another() -> None:
    def language(**environ: str) -> str:
        return read_settings(environ).language

    assert [language(), language(LANG="C.UTF-8"), language(LANG="de_DE.UTF-8", LC_ALL="")] == ["en"] * 3
    assert [language(LANG="zh_CN.UTF-8"), language(LANG="en_US", LC_ALL="zh_TW")] == ["zh"] * 2
    assert [language(LANG="zh_CN", LC_ALL="en_US"), language(LANG="zh_CN", WECHAT_NATS_LANGUAGE="en")] == ["en"] * 2
    assert language(LANG="en_US.UTF-8", WECHAT_NATS_LANGUAGE="zh") == "zh"


def test_a_wrong_file_is_not_reported_as_missing_too(tmp_path: Path) -> None:
    (tmp_path / "key.pem").touch()
    text = refusal({"NATS_CERT": "/nowhere/cert.pem", "NATS_KEY": str(tmp_path / "key.pem")})
    assert len(text.splitlines()) == 1


def test_a_secret_may_come_from_a_file(tmp_path: Path) -> None:
    """Editors and `echo` end a file with a newline that is no part of the secret."""
    (tmp_path / "token").write_text("canary\n")
    (tmp_path / "keys").write_text(f"{KEY},\n{OLD_KEY}\n")
    read = read_settings(
        {"NATS_TOKEN_FILE": str(tmp_path / "token"), "WECHAT_NATS_TOKEN_KEY_FILE": str(tmp_path / "keys")}
    )
    assert (read.nats_token, read.token_key) == ("canary", (b"k" * 32, b"o" * 32))


def test_a_secret_from_both_or_from_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    text = refusal(
        {
            "NATS_TOKEN": "canary",
            "NATS_TOKEN_FILE": str(tmp_path / "empty"),
            "NATS_PASSWORD_FILE": str(tmp_path / "absent"),
            "WECHAT_NATS_TOKEN_KEY_FILE": str(tmp_path / "empty"),
        }
    )
    assert "NATS_TOKEN: expected either NATS_TOKEN or NATS_TOKEN_FILE, not both" in text
    assert "No such file" in text
    assert "is empty" in text
    assert "canary" not in text


def test_an_adapter_does_not_start_without_a_key_and_says_how_one_is_made() -> None:
    assert read_settings({}).token_key == ()
    with pytest.raises(SettingsError) as caught:
        read_settings({"WECHAT_NATS_REPLICAS": "2"}, adapter=True)
    first, second = caught.value.detail.split("\n")
    assert first.startswith("WECHAT_NATS_REPLICAS: ")
    assert second == (
        "WECHAT_NATS_TOKEN_KEY: expected a key, which seals bot tokens at rest; keep it: openssl rand -base64 32"
    )
    with pytest.raises(SettingsError) as caught:
        read_settings({"WECHAT_NATS_TOKEN_KEY": "c2hvcnQ="}, adapter=True)
    assert caught.value.detail.count("WECHAT_NATS_TOKEN_KEY") == 1
    assert read_settings({"WECHAT_NATS_TOKEN_KEY": KEY}, adapter=True).token_key == (b"k" * 32,)


def test_no_error_and_no_repr_shows_a_secret() -> None:
    text = refusal(
        {
            "WECHAT_NATS_TOKEN_KEY": "canary",
            "NATS_URL": "http://me:canary@nats",
            "WECHAT_NATS_ILINK_BASE_URL": "https://me:canary@ilink",
        }
    )
    assert "canary" not in text
    held = read_settings({"NATS_URL": "nats://me:canary@nats", "NATS_USER": "me", "NATS_PASSWORD": "canary"})
    assert "canary" not in repr(held)
    assert "nats_password=***" in repr(held)


@pytest.mark.parametrize(
    ("addr", "host", "port"),
    [("127.0.0.1:9464", "127.0.0.1", 9464), (":0", "", 0), ("[::1]:80", "::1", 80), ("pod.local:1", "pod.local", 1)],
)
def test_the_http_address_is_split(addr: str, host: str, port: int) -> None:
    read = read_settings({"WECHAT_NATS_HTTP_ADDR": addr})
    assert split_addr(read.http_addr) == (host, port)


def test_a_console_needs_a_token() -> None:
    assert refusal({"WECHAT_NATS_CONSOLE_ADDR": "127.0.0.1:9465"}) == (
        "WECHAT_NATS_CONSOLE_TOKEN: expected a value, since WECHAT_NATS_CONSOLE_ADDR has one"
    )
    environ = {"WECHAT_NATS_CONSOLE_ADDR": ":9465", "WECHAT_NATS_CONSOLE_TOKEN": "0123456789abcdef"}
    settings = read_settings(environ)
    assert settings.console_addr == ":9465"
    assert "0123456789abcdef" not in repr(settings)
