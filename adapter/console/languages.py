"""The console's two languages. The English of a text is its name; what adapters report stays as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PREFERRED = re.compile(r"\b(zh|en)\b[^,;]*(?:;\s*q=([01](?:\.\d{1,3})?))?", re.IGNORECASE)


class Language:
    """Called with an English text and the values of its `{}`, gives it in this language."""

    def __init__(self, tag: str, texts: Mapping[str, str]) -> None:
        self.tag = tag
        """As HTML has it."""
        self._texts = texts

    def __call__(self, text: str, *values: object) -> str:
        said = self._texts.get(text, text)
        return said.format(*values) if values else said

    def age(self, then_ms: int, now_ms: int) -> str:
        """How long ago, or in how long, in its largest unit: `12 s`, `5 min`, `3 h`, `4 d`."""
        seconds = abs(now_ms - then_ms) // 1000
        for unit, length in (("{} d", 86400), ("{} h", 3600), ("{} min", 60)):
            if seconds >= length:
                return self(unit, seconds // length)
        return self("{} s", seconds)

    def count(self, number: int, one: str) -> str:
        """`1 replica`, `2 replicas`."""
        if (said := self._texts.get(f"{{}} {one}")) is not None:
            return said.format(f"{number:,}")
        return f"{number:,} {one}{'' if number == 1 else 's'}"


CHINESE = {
    # Ages and numbers
    "{} s": "{} 秒",
    "{} min": "{} 分钟",
    "{} h": "{} 小时",
    "{} d": "{} 天",
    "{} ago": "{}前",
    "in {}": "{}后",
    "now": "现在",
    "{} bot": "{} 个机器人",
    "{} partition": "{} 个分区",
    "{} for {}": "{}：已 {}",
    "{} replica": "{} 个副本",
    "{} binding": "{} 个绑定",
    # Every page
    "Console": "控制台",
    "Pages": "页面",
    "Bindings": "绑定",
    "Logins": "登录",
    "Dead letters": "死信",
    "Sign in": "登入",
    "Sign out": "退出",
    "draining": "正在退出",
    "{} of {} did not answer": "{} 个没有应答，共 {}",
    "No answer. What you see is of": "没有应答。现在看到的内容来自",
    "Back": "返回",
    "Not here": "没有找到",
    "That did not work": "操作没有成功",
    "The bus does not answer": "总线没有应答",
    "Try again in a moment.": "请稍后再试。",
    "There is no such page.": "没有这个页面。",
    "There is no such login, or it has been over for a while.": "没有这次登录，或者它早已结束。",
    # Sign in
    "Token": "Token",
    "This is not the token.": "token 不对。",
    "Too many wrong tokens came from your address: wait a minute.": "你的地址输错 token 的次数太多，请等一分钟。",
    # Bindings
    "Which bot serves which sandbox, and how it is": "哪个机器人服务哪个沙箱，状态如何",
    "{} of {}": "{}，共 {} 个",
    "bindings": "绑定",
    "need a login": "需要登录",
    "dead letters": "死信",
    "replica answering": "有应答的副本",
    "replicas answering": "有应答的副本",
    "Sandbox, bot or user": "沙箱、机器人或用户",
    "All states": "所有状态",
    "Find": "查找",
    "Sandbox": "沙箱",
    "State": "状态",
    "Window": "窗口",
    "Last poll": "上次轮询",
    "User wrote": "用户来信",
    "Last send": "上次发送",
    "for {}": "已 {}",
    "never open": "从未打开",
    "open": "打开",
    "used up": "已用完",
    "closed": "已关闭",
    "{} send left": "还能发 {} 条",
    "{} sends left": "还能发 {} 条",
    "closes in {}": "{}后关闭",
    "never": "从未",
    "none since": "此后没有",
    "Nothing matches": "没有匹配的绑定",
    "Show all {}": "显示全部 {}",
    "No bindings yet": "还没有绑定",
    "A person who scans a QR code gets a sandbox.": "扫了二维码的人会得到一个沙箱。",
    "Start a login": "发起登录",
    "Previous": "上一页",
    "Next": "下一页",
    "Page {} of {}": "第 {} 页，共 {} 页",
    # States of bots
    "not polled": "无人轮询",
    "of a newer version": "属于更新的版本",
    "failing": "出错",
    "needs a login": "需要登录",
    "not known": "未知",
    "token refused": "token 被拒",
    "paused": "暂停",
    "retrying": "正在重试",
    "waiting": "等待中",
    "active": "正常",
    # Dead letters
    "What could not be read or delivered, kept for 30 days. Bodies are not shown:": (
        "无法读取或投递的消息，保留 30 天。这里不显示内容，请用"
    ),
    "Subject": "主题",
    "Reason": "原因",
    "When": "时间",
    "Size": "大小",
    "number {}": "编号 {}",
    "unknown": "未知",
    "Try again": "重试",
    "Drop": "丢弃",
    "Older": "更早",
    "No dead letters": "没有死信",
    "Every message could be read and delivered.": "所有消息都能读取和投递。",
    "Letter {} is stored again on {}.": "死信 {} 已重新存到 {}。",
    "Letter {} is dropped.": "死信 {} 已丢弃。",
    # Logins
    "Whoever scans the code with WeChat talks to the sandbox from then on": "谁用微信扫了码，以后就和这个沙箱对话",
    "Name of the sandbox": "沙箱的名字",
    "Lower-case letters, digits, - and _": "小写字母、数字、- 和 _",
    "Show that the bot types until it answers": "回答之前显示“正在输入”",
    "Show a QR code": "显示二维码",
    "Open": "进行中",
    "Status": "状态",
    "Last step": "上一步",
    "Ends": "结束",
    "waits for a scan": "等待扫码",
    "scanned": "已扫码",
    "asks for digits": "需要输入数字",
    # One login
    "Login of {}": "{} 的登录",
    "Keep the code to the person it is for: who scans it first gets the sandbox": (
        "二维码只给该用的人看：谁先扫，沙箱就归谁"
    ),
    "Bound": "已绑定",
    "Bound already": "早已绑定",
    "Digits are asked for": "需要输入数字",
    "Scanned": "已扫码",
    "A new code is fetched": "正在获取新的二维码",
    "Cancelled": "已取消",
    "Expired": "已过期",
    "Failed": "失败",
    "Lost": "已中断",
    "The bot is bound. The user must write a first message before anything can be sent to them.": (
        "机器人已绑定。用户要先写一条消息，之后才能给他们发消息。"
    ),
    "A bot of this sandbox serves this user already, and goes on with it.": (
        "这个沙箱的一个机器人已经在服务这位用户，会继续下去。"
    ),
    "No code was scanned and confirmed in time; start another login.": "没有及时扫码并确认，请重新发起登录。",
    "The login failed; start another one.": "登录失败，请重新发起。",
    "The login was cancelled.": "登录已取消。",
    "The replica that ran the login is gone; start another one.": "处理这次登录的副本已经不在，请重新发起。",
    "The digits are being checked.": "正在核对数字。",
    "Scan the code with WeChat": "用微信扫码",
    "Confirm on the phone": "在手机上确认",
    "Write a first message: a bot cannot": "先给机器人发一条消息：机器人不能先开口",
    "Waiting for the person to confirm.": "等待对方确认。",
    "These were not the digits; type them once more.": "数字不对，请再输入一次。",
    "Type the digits that the phone shows.": "请输入手机上显示的数字。",
    "Digits shown on the phone": "手机上显示的数字",
    "Send digits": "提交数字",
    "Bot": "机器人",
    "User": "用户",
    "Code": "二维码",
    "number {}; a new one comes by itself": "第 {} 个；过期后自动换新的",
    "code {}": "第 {} 个",
    "Cancel the login": "取消登录",
    "Another login": "再登录一个",
    "Start another": "重新发起",
    "Show the binding": "查看绑定",
}
LANGUAGES = {"en": Language("en", {}), "zh": Language("zh-CN", CHINESE)}


def preferred(accept_language: str) -> str:
    """What a browser prefers of the languages there are, by its header."""
    found = _PREFERRED.findall(accept_language[:1000])
    return min(found, key=lambda each: -float(each[1] or 1), default=("en", ""))[0].lower()
