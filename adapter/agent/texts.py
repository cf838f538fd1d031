"""What persons are told by the bridge itself, in the language of the settings, and the commands they give."""

from __future__ import annotations

import unicodedata
from typing import Literal, NamedTuple

Command = Literal["help", "new", "stop"]


class Texts(NamedTuple):
    """One language."""

    sorry: str
    """The agent failed."""
    new: str
    stopped: str
    idle: str
    """There is nothing to stop."""
    cut: str
    """At the end of an answer that is only sent in part."""
    no_file: str
    """A file of an answer could not be sent."""
    working: str
    """The agent has been at work for a minute."""
    welcome: str
    """Before the first answer to a person."""
    help: str
    """In paragraphs: WeChat reads Markdown, which joins lines."""
    may: str
    """Before what a tool would do."""
    options: dict[str, str]
    """Answers to `may`, by the Agent Client Protocol's kinds of options."""
    choose: str
    """After the numbered answers."""


TEXTS = {
    "zh": Texts(
        sorry="出错了，请再试一次。",
        new="已开始新对话。",
        stopped="已停止。",
        idle="当前没有正在处理的内容。",
        cut="（回答过长，以上只是开头部分。）",
        no_file="（有文件无法发送。）",
        working="仍在处理，请稍候。",
        welcome="你好！这里由 AI 助手回复。发送“帮助”查看可用指令。",
        help=(
            "直接发消息即可，AI 助手会回复。\n\n"
            "帮助 /help：显示本说明\n\n新对话 /new：忘掉之前的内容，重新开始\n\n停止 /stop：停止当前的回复"
        ),
        may="可以执行吗？",
        options={
            "allow_once": "允许一次",
            "allow_always": "总是允许",
            "reject_once": "拒绝",
            "reject_always": "总是拒绝",
        },
        choose="请回复数字。",
    ),
    "en": Texts(
        sorry="That did not work. Please try again.",
        new="A new conversation begins.",
        stopped="Stopped.",
        idle="There is nothing to stop.",
        cut="(The answer is too long: this is its beginning.)",
        no_file="(A file could not be sent.)",
        working="Still working on it.",
        welcome="Hello! An AI agent answers here. Write /help for what you can do.",
        help=(
            "Just write: an AI agent answers.\n\n"
            "/help shows this text\n\n/new forgets what was said and begins anew\n\n/stop ends the answer under way"
        ),
        may="May I?",
        options={
            "allow_once": "Allow once",
            "allow_always": "Always allow",
            "reject_once": "Reject",
            "reject_always": "Always reject",
        },
        choose="Please answer with a number.",
    ),
}
_COMMANDS: dict[str, Command] = {
    **{"/help": "help", "/帮助": "help", "帮助": "help"},
    **{"/new": "new", "/新对话": "new", "新对话": "new"},
    **{"/stop": "stop", "/停止": "stop", "停止": "stop"},
}


def command_of(text: str) -> Command | None:
    """The command that the whole text is. Chinese keyboards give `、` and `／` for the slash."""
    word = unicodedata.normalize("NFKC", text).strip().casefold()
    return _COMMANDS.get(f"/{word[1:]}" if word.startswith("、") else word)
