"""Messages of every shape that a user's phone is known to produce (4.5, 4.6, S21)."""

from collections.abc import Callable

from adapter.simulator.records import Json, SimulatorError

QUOTED_ID = 7497484083968569737


def text_item(text: str) -> Json:
    return {"type": 1, "is_completed": True, "text_item": {"text": text}}


def text(words: str) -> Json:
    return {"item_list": [text_item(words)]}


def voice(words: str) -> Json:
    """With WeChat's transcript, and with a reference that nothing stands behind."""
    media = {"encrypt_query_param": "", "aes_key": "", "encrypt_type": 1}
    payload = {"media": media, "encode_type": 6, "sample_rate": 24000, "playtime": 1500, "text": words}
    return {"item_list": [{"type": 3, "is_completed": True, "voice_item": payload}]}


def quote(words: str, reference: Json) -> Json:
    return {"item_list": [text_item(words) | {"ref_msg": reference}]}


def partial_quote(words: str) -> Json:
    """Quotes "world" of "hello world"; the hash is the MD5 of that part."""
    part = {
        "start": "world",
        "end": "world",
        "startindex": 0,
        "endindex": 0,
        "quotemd5": "7d793037a0760186574b0282f2f435e7",
    }
    return quote(words, {"svr_id": QUOTED_ID, "partial_text": part})


KINDS: dict[str, Callable[[str], Json]] = {
    "text": text,
    "multi_item": lambda words: {"item_list": [text_item(words), text_item("second item")]},
    "voice_transcript": voice,
    "unknown_item": lambda words: {"item_list": [{"type": 99, "new_item": {"text": words}}]},
    "unknown_beside_text": lambda words: {"item_list": [{"type": 99, "new_item": {}}, text_item(words)]},
    "no_context_token": lambda words: text(words) | {"context_token": None},
    "no_message_id": lambda words: text(words) | {"message_id": None},
    "zero_message_id": lambda words: text(words) | {"message_id": 0},
    "empty_message_id": lambda words: text(words) | {"message_id": ""},
    "string_message_id": lambda words: text(words) | {"message_id": "7497484083968569739"},
    "bot_echo": lambda words: text(words) | {"message_type": 2, "context_token": None},
    "big_id": lambda words: text(words) | {"message_id": 2**64 - 1},
    "emoji": lambda words: text(f"{words} 😀👩‍👩‍👧 𠮷 你好"),
    "empty_text": lambda words: text(""),
    "no_items": lambda words: {"item_list": []},
    "quote_full": lambda words: quote(
        words, {"title": "earlier", "message_item": text_item("hello world") | {"msg_id": QUOTED_ID}}
    ),
    "quote_type_8": lambda words: quote(
        words, {"title": "", "message_item": {"type": 8, "msg_id": QUOTED_ID, "is_completed": True}}
    ),
    "quote_type_0": lambda words: quote(
        words,
        {
            "message_item": {
                "type": 0,
                "create_time_ms": 1789000000000,
                "update_time_ms": 1789000000000,
                "msg_id": QUOTED_ID,
                "button_item_list": [],
            }
        },
    ),
    "quote_svr_id": lambda words: quote(words, {"svr_id": QUOTED_ID}),
    "quote_partial": partial_quote,
}
"""By name; the argument is the text that the message has where it has one."""


def of_kind(kind: str, words: str) -> Json:
    if kind not in KINDS:
        raise SimulatorError(f"unknown kind {kind}, there are {', '.join(KINDS)}")
    return KINDS[kind](words)
