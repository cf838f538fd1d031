"""Which URLs may be called: iLink's by https, those that an operator allowed, and none that only looks like them."""

from __future__ import annotations

import pytest

from adapter.errors import Refused
from adapter.ilink.network import check_link, check_url, redirect_url

CDN = "https://novac2c.cdn.weixin.qq.com/c2c"
LOCAL = ("127.0.0.1:8080", "simulator", "[::1]:8080")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://ilinkai.weixin.qq.com", "https://ilinkai.weixin.qq.com"),
        ("https://ilinkai.weixin.qq.com/", "https://ilinkai.weixin.qq.com"),
        ("https://ilinkai.wechat.com", "https://ilinkai.wechat.com"),
        ("https://ILinkAI.WeChat.com/base/", "https://ILinkAI.WeChat.com/base"),
        ("https://ilinkai.weixin.qq.com:8443", "https://ilinkai.weixin.qq.com:8443"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("http://simulator:1234/x", "http://simulator:1234/x"),
    ],
)
def test_a_url_on_the_list_may_be_called(url: str, expected: str) -> None:
    assert check_url(url, LOCAL) == expected


@pytest.mark.parametrize(
    "url",
    [
        "https://weixin.qq.com",
        "https://user:pass@ilinkai.weixin.qq.com",
        "https://@ilinkai.weixin.qq.com",
        "https://evil.example／.weixin.qq.com",
        "https://evil。example.weixin.qq.com",
        "https://.weixin.qq.com",
        "https://a..weixin.qq.com",
        "https://a.weixin.qq.com?",
        "https://a.weixin.qq.com#",
        "https://a.weixin.qq.com/?x=1",
        "https://a.weixin.qq.com:port",
        " https://a.weixin.qq.com",
        "https://a.weixin.qq.com/\n",
        "https://[::1",
        "http://127.0.0.1:9090",
        "http://127.0.0.1",
        "http://127.0.0.1:8080@evil.example",
        "ftp://simulator",
        "ilinkai.weixin.qq.com",
        "https://",
        "",
    ],
)
def test_any_other_url_is_refused(url: str) -> None:
    """`baseurl` and `redirect_host` are words of a server, not of an operator. More of them: `test_addresses.py`."""
    with pytest.raises(Refused) as caught:
        check_url(url, LOCAL)
    assert caught.value.reason == "url"


@pytest.mark.parametrize(
    "url",
    [
        f"{CDN}/download?encrypted_query_param=a%2B&taskid=1",
        f"{CDN}/download?x=user@host",
        "http://127.0.0.1:8080/c2c/download?x=1",
    ],
)
def test_a_link_keeps_its_query(url: str) -> None:
    assert check_link(url, LOCAL) == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://novac2c.cdn.weixin.qq.com/c2c/download?x=1",
        "https://evil.example/c2c?host=.weixin.qq.com",
        "https://novac2c.cdn.weixin.qq.com@evil.example/?x",
        "http://127.0.0.1:1/c2c?x",
        "https://novac2c.cdn.weixin.qq.com/a b",
        "https://[::1.weixin.qq.com/?x",
    ],
)
def test_any_other_link_is_refused(url: str) -> None:
    with pytest.raises(Refused) as caught:
        check_link(url, LOCAL)
    assert caught.value.reason == "url"


@pytest.mark.parametrize(
    ("host", "base_url", "expected"),
    [
        ("sh.ilinkai.weixin.qq.com", "https://ilinkai.weixin.qq.com", "https://sh.ilinkai.weixin.qq.com"),
        ("ilinkai.wechat.com:8443", "https://ilinkai.weixin.qq.com", "https://ilinkai.wechat.com:8443"),
        ("127.0.0.1:8081", "http://127.0.0.1:8080", "http://127.0.0.1:8081"),
        ("127.0.0.1:8081", "https://ilinkai.weixin.qq.com", "https://127.0.0.1:8081"),
        ("sh.ilinkai.weixin.qq.com", "http://127.0.0.1:8080", "https://sh.ilinkai.weixin.qq.com"),
    ],
)
def test_a_redirect_goes_on_by_https_but_for_a_simulator(host: str, base_url: str, expected: str) -> None:
    assert redirect_url(host, base_url, ("127.0.0.1:8080", "127.0.0.1:8081")) == expected


@pytest.mark.parametrize(
    "host",
    ["evil.example", "weixin.qq.com.evil.example", "127.0.0.1:9", "a.weixin.qq.com/path", "a@b.weixin.qq.com",
     "https://a.weixin.qq.com", "a.weixin.qq.com?x", "a.weixin.qq.com\n", "[::1]", "", ".weixin.qq.com", "a b"],
)  # fmt: skip
def test_a_redirect_to_any_other_host_is_refused(host: str) -> None:
    """The host is a word of the server, not of an operator."""
    with pytest.raises(Refused) as caught:
        redirect_url(host, "http://127.0.0.1:8080", ("127.0.0.1:8080",))
    assert caught.value.reason == "url"
