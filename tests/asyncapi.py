"""The bus as an AsyncAPI document: `schemas/asyncapi.json`."""

from __future__ import annotations

from typing import Any, NamedTuple

from adapter.cli.schema import definitions_of
from adapter.contract.messages import MESSAGES, SCHEMA_VERSION
from adapter.contract.names import H_MSG_ID, H_POSITION, H_REPLY_TO, H_SCHEMA, H_TRACEPARENT, SANDBOX_PATTERN, Names

RAW = ("media_bytes", "media_piece")
"""Messages whose payload is bytes; their schema is that of their headers."""
BY_HEADER, BY_REPLY = f"$message.header#/{H_REPLY_TO}", "$message.header#/reply"
"""Where an answer goes, as an AsyncAPI runtime expression."""


class Channel(NamedTuple):
    """A subject, what goes over it, and what the adapter does with it."""

    key: str
    subject: str
    message: str
    does: str
    """send or receive, seen from the adapter."""
    summary: str
    answer: str = ""
    """Message of the answer; "" if there is none."""
    answer_to: str = ""


def channels(names: Names) -> list[Channel]:
    """Every subject that sandboxes, services and the platform use."""
    sandbox = "{sandbox}"
    receipts = names.receipts(sandbox).replace(">", "{command}.{sequence}")
    sent = [
        ("in", names.live(sandbox), "inbound", "Live: what a user said, by plain subscribe."),
        ("receipt", receipts, "receipt", "What became of a command."),
        ("binding", names.event(sandbox, "binding"), "binding_event", "A binding changed."),
        ("login", names.event(sandbox, "login"), "login_event", "A step of a QR login."),
        *(
            (f"{verb}_receipt", receipts.replace(".receipt.", f".{verb}."), "receipt", f"How {what} ended.")
            for verb, what in (("bind", "a bind"), ("unbind", "an unbind"), ("erase", "an erase"))
        ),
    ]
    received = [
        ("out", names.out(sandbox), "outbound", "A sandbox says something to its user."),
        ("out_any", names.out_plain, "outbound", "A service says it; the body names the sandbox."),
    ]
    controls = [
        ("bind", names.said("bind", sandbox), "Let a bot serve a sandbox."),
        ("unbind", names.said("unbind", sandbox), "End that."),
        ("erase", names.said("erase", sandbox), "Erase a person."),
    ]
    of_body = "of the sandbox that the body names."
    services = [
        ("bindings_list", "bindings.list", "bindings_query", "bindings_page", "Which bindings there are."),
        ("bindings_get", "bindings.get", "bindings_query", "bindings_page", "The bindings of one bot or sandbox."),
        ("media_get", f"media.get.{sandbox}", "media_query", "media_bytes", "The next piece of an object's bytes."),
        ("media_put", f"media.put.{sandbox}", "media_piece", "media", "A piece of media that the sandbox brings."),
        ("login_start", "login.start", "login_start", "login", "Start a QR login; the answer holds the code."),
        ("login_status", "login.status", "login_query", "login", "How a login stands, and its newest code."),
        ("login_verify", "login.verify", "login_verify", "login", "The digits that the phone shows."),
        ("login_cancel", "login.cancel", "login_query", "login", "End a login."),
        ("window", f"window.{sandbox}", "window_query", "window", "What the sandbox may still send."),
        ("last_receipt", f"receipt.{sandbox}", "receipt_query", "receipt", "The last receipt of a command."),
        (
            "send",
            f"send.{sandbox}",
            "outbound",
            "command_stored",
            "Store a command of an untrusted sandbox.",
        ),
        ("next", f"next.{sandbox}", "next_query", "next_page", "The messages that the sandbox has not handled yet."),
        ("replay", f"replay.{sandbox}", "replay_query", "replay_page", "The sandbox's inbound messages again."),
        ("window_any", "window", "window_query", "window", "What may still be sent; the body names the sandbox."),
        ("last_receipt_any", "receipt", "receipt_query", "receipt", f"The last receipt of a command {of_body}"),
        ("replay_any", "replay", "replay_query", "replay_page", f"The inbound messages {of_body}"),
    ]
    return [
        *(Channel(key, subject, message, "send", summary) for key, subject, message, summary in sent),
        *(Channel(key, subject, message, "receive", summary) for key, subject, message, summary in received),
        *(Channel(key, at, key, "receive", summary, "receipt", BY_HEADER) for key, at, summary in controls),
        *(
            Channel(key, names.svc(verb), message, "receive", summary, answer, BY_REPLY)
            for key, verb, message, answer, summary in services
        ),
    ]


def asyncapi() -> dict[str, Any]:
    """AsyncAPI 3.0 of the bus, under the default prefix."""
    listed = channels(Names())
    definitions = definitions_of(MESSAGES.values(), "#/components/schemas/{name}")
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "wechat-nats",
            "version": f"{SCHEMA_VERSION}.0.0",
            "description": (
                "The bus between WeChat and sandboxes. Operations are the adapter's: what it sends you receive,"
                " what it receives you send. The first token of every subject is a setting. See README.md."
            ),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {
            **{channel.key: _channel(channel) for channel in listed},
            **{f"{channel.key}_answer": _answer_channel(channel) for channel in listed if channel.answer},
        },
        "operations": {channel.key: _operation(channel) for channel in listed},
        "components": {
            "messages": {name: _message(name) for name in MESSAGES},
            "schemas": {**_without_discriminators(dict(sorted(definitions.items()))), "Headers": _headers()},
        },
    }


def _channel(channel: Channel) -> dict[str, Any]:
    parameters = {
        "sandbox": {"description": f"Name of the sandbox; matches {SANDBOX_PATTERN}"},
        "command": {"description": "Id of the command; =XX for each byte that is no word character"},
        "sequence": {"description": "Sequence of the command in WECHAT_OUT"},
    }
    used = {name: about for name, about in parameters.items() if f"{{{name}}}" in channel.subject}
    return {
        "address": channel.subject,
        "summary": channel.summary,
        "messages": {channel.message: _reference("components/messages", channel.message)},
    } | ({"parameters": used} if used else {})


def _answer_channel(channel: Channel) -> dict[str, Any]:
    return {
        "address": None,
        "summary": f"Answers to {channel.subject}, at an inbox of the asker.",
        "messages": {channel.answer: _reference("components/messages", channel.answer)},
    }


def _operation(channel: Channel) -> dict[str, Any]:
    made: dict[str, Any] = {
        "action": channel.does,
        "channel": _reference("channels", channel.key),
        "summary": channel.summary,
        "messages": [_reference("channels", channel.key, "messages", channel.message)],
    }
    if channel.answer:
        made["reply"] = {
            "address": {"location": channel.answer_to},
            "channel": _reference("channels", f"{channel.key}_answer"),
            "messages": [_reference("channels", f"{channel.key}_answer", "messages", channel.answer)],
        }
    return made


def _message(name: str) -> dict[str, Any]:
    kind = MESSAGES[name]
    about = {"name": name, "title": kind.__name__, "summary": " ".join((kind.__doc__ or "").split())}
    shape = _reference("components/schemas", kind.__name__)
    if name in RAW:
        binary = {"type": "string", "format": "binary"}
        return {**about, "contentType": "application/octet-stream", "headers": shape, "payload": binary}
    headers = _reference("components/schemas", "Headers")
    return {**about, "contentType": "application/json", "headers": headers, "payload": shape}


def _reference(*path: str) -> dict[str, str]:
    return {"$ref": f"#/{'/'.join(path)}"}


def _headers() -> dict[str, Any]:
    meanings = {
        H_SCHEMA: f"Major version of the contract: {SCHEMA_VERSION}.",
        H_MSG_ID: "Id; JetStream drops a repeat within five minutes, of a command within 15 s.",
        H_POSITION: "On a live message: its place in the inbox, as `next` has it.",
        H_REPLY_TO: "Inbox for the answer to bind, unbind and erase.",
        H_TRACEPARENT: "W3C Trace Context; a command's is that of its receipts.",
    }
    properties = {name: {"type": "string", "description": meaning} for name, meaning in meanings.items()}
    return {"title": "Headers", "type": "object", "properties": properties}


def _without_discriminators(node: Any) -> Any:
    """AsyncAPI means something else by the word than JSON Schema's code generators do."""
    match node:
        case dict():
            return {key: _without_discriminators(value) for key, value in node.items() if key != "discriminator"}
        case list():
            return [_without_discriminators(value) for value in node]
        case _:
            return node
