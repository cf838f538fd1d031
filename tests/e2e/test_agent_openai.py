"""`--openai URL` as a process, with a stand-in for the model behind a real socket."""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from adapter.simulator import samples
from tests.e2e.test_agent import Agent, agent_running, settled, shows

KEY = "sk-0123456789"
SORRY = "That did not work. Please try again."


class Model:
    """A server with OpenAI's chat interface. It says how many messages it was shown, and the last one's text."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.responses: list[web.Response] = []
        self.url = ""
        self.takes_pictures = True

    async def on_models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": []}, status=200 if self.allows(request) else 401)

    async def on_chat(self, request: web.Request) -> web.Response:
        assert self.allows(request)
        self.requests.append(body := json.loads(await request.read()))
        if self.responses:
            return self.responses.pop(0)
        said = body["messages"][-1]["content"]
        if isinstance(said, list) and not self.takes_pictures:
            return web.json_response({"error": {"code": "no_pictures", "message": f"{KEY} {said}"}}, status=400)
        text = said if isinstance(said, str) else said[0]["text"]
        answer = {"role": "assistant", "content": f"{len(body['messages'])}: {text}"}
        return web.json_response({"choices": [{"index": 0, "message": answer, "finish_reason": "stop"}]})

    def allows(self, request: web.Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {KEY}"


@pytest.fixture
async def model() -> AsyncIterator[Model]:
    made = Model()
    app = web.Application()
    app.router.add_get("/v1/models", made.on_models)
    app.router.add_post("/v1/chat/completions", made.on_chat)
    async with TestServer(app) as server:
        made.url = str(server.make_url("/v1"))
        yield made


async def test_a_model_is_shown_the_conversation_until_new(tmp_path: Path, model: Model) -> None:
    """Also after a kill, and at most as much as --history says."""
    options = ("--openai", model.url, "--model", "m1", "--system", "Be short.", "--history", "2")
    async with agent_running(tmp_path, *options, OPENAI_API_KEY=KEY) as (made, agent):
        made.say("s1", "one")
        await shows(made, "2: one")
        await settled(made)
        await agent.end(signal.SIGKILL)
        await agent.start()
        for text in ("two", "three", "four", "/new", "five"):
            made.say("s1", text)
        answers = ["2: one", "4: two", "6: three", "6: four", "A new conversation begins.", "2: five"]
        await shows(made, *answers)
        assert {request["model"] for request in model.requests} == {"m1"}
        assert model.requests[2]["messages"] == [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "2: one"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "4: two"},
            {"role": "user", "content": "three"},
        ]
        assert '"one"' not in agent.log.read_text()
        (file,) = agent.folder.rglob("chats/*.json")
        assert (file.parent.stat().st_mode & 0o777, "two" in file.read_text()) == (0o700, False)


async def test_a_picture_is_shown_once_and_not_to_a_model_that_takes_none(tmp_path: Path, model: Model) -> None:
    secret = tmp_path / "key"
    secret.write_text(f"{KEY}\n")
    options, environ = ("--openai", model.url, "--model", "m1"), {"OPENAI_API_KEY_FILE": str(secret)}
    async with agent_running(tmp_path, *options, **environ) as (made, agent):
        sent, bot = samples.jpeg(), made.bots["s1"].bot
        made.sim.say_media(bot, "image", sent)
        await shows(made, "1: [image]")
        words, picture = model.requests[0]["messages"][0]["content"]
        assert words == {"type": "text", "text": "[image]"}
        assert picture["image_url"]["url"] == f"data:image/jpeg;base64,{base64.b64encode(sent).decode()}"
        model.takes_pictures = False
        made.sim.say_media(bot, "image", sent)
        await shows(made, "1: [image]", "3: [image]")
        assert [request["messages"][-1]["content"] for request in model.requests[2:]] == ["[image]"]
        assert KEY not in agent.log.read_text()


async def test_a_failed_request_is_repeated_and_a_refused_one_costs_an_apology(tmp_path: Path, model: Model) -> None:
    said = {"error": {"code": "model_not_found", "message": f"{KEY} has no such model, you said: one"}}
    model.responses = [
        web.Response(status=503),
        web.Response(status=429, headers={"retry-after": "1"}),
        web.json_response(said, status=404),
        web.json_response({"choices": []}),
        web.json_response({"choices": [{"message": {"content": None}}]}),
    ]
    async with agent_running(tmp_path, "--openai", model.url, "--model", "m1", OPENAI_API_KEY=KEY) as (made, agent):
        for text in ("one", "two", "three", "four"):
            made.say("s1", text)
        await shows(made, SORRY, SORRY, SORRY, "1: four")
        await settled(made)
        log = agent.log.read_text()
        assert "HTTP 404 model_not_found" in log
        assert (KEY in log, "you said" in log, log.count("asked again")) == (False, False, 1)


async def test_a_server_that_refuses_the_key_is_said_at_the_start(tmp_path: Path, model: Model) -> None:
    async with agent_running(tmp_path, "--exec", "true") as (made, _):
        refused = Agent(made, "--openai", model.url, "--model", "m1", name="refused", OPENAI_API_KEY="wrong")
        await refused.start()
        assert await refused.ended() == 1
        assert refused.log.read_text().strip().endswith("The server refuses the key (HTTP 401): see OPENAI_API_KEY.")
