"""Media of a person for a program or a URL, and files of theirs for the person, byte for byte."""

from __future__ import annotations

import base64
import json
import signal
import sys
from pathlib import Path

import pytest
from aiohttp import web

from adapter.agent.texts import TEXTS
from adapter.agent.webhook import INLINE_BYTES
from adapter.simulator import FaultRule, samples
from tests.e2e.test_agent import Agent, Receiver, agent_running, settled, shows
from tests.e2e.test_agent import receiver as receiver  # noqa: PLC0414
from tests.e2e.world import World, free_port, until

PROGRAM = """
import json, os, pathlib, shutil, sys, time
text, home = sys.stdin.read(), pathlib.Path(sys.argv[1])
files, out = (pathlib.Path(os.environ[name]) for name in ("WECHAT_FILES", "WECHAT_OUT"))
with (home / "prompts").open("a") as prompts:
    prompts.write(json.dumps(text) + "\\n")
while not (home / "go").exists():
    time.sleep(0.01)
for file in files.iterdir():
    shutil.copy(file, out)
if text == "many":
    for number in range(12):
        (out / f"{number:02}.txt").write_text(str(number))
    (out / "00.txt").write_text("")
    (out / "01.txt").unlink()
    (out / "01.txt").symlink_to(out / "02.txt")
    (out / "folder").mkdir()
print("Here:")
(home / "ended").touch()
"""


def options(folder: Path, gather: str = "0") -> list[str]:
    (folder / "files.py").write_text(PROGRAM)
    program = f"{sys.executable} {folder / 'files.py'} {folder}"
    return ["--exec", program, "--state", str(folder / "state"), "--gather", gather]


def prompts(folder: Path) -> list[str]:
    file = folder / "prompts"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def shown(made: World) -> list[tuple[str, str, bytes]]:
    """What the phone shows: kind, file name and bytes of each of the media, or "text", the text and nothing."""
    found = []
    for message in made.sim.phone(made.bots["s1"].user):
        found += [("text", message.text, b"")] if message.text else []
        found += [(view.kind, view.file_name, made.sim.media_content(view.reference)) for view in message.media]
    return found


async def test_a_picture_alone_reaches_a_program_and_one_comes_back(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    async with agent_running(tmp_path, *options(tmp_path)) as (made, _):
        bot, picture, report = made.bots["s1"].bot, samples.jpeg(), b"%PDF-1.4 report"
        made.sim.say_media(bot, "image", picture)
        made.sim.say_media(bot, "file", report, file_name="../Bericht 年度.pdf")
        made.sim.say_media(bot, "voice", samples.silk(), text="good morning")
        made.say("s1", "only words")
        await until(lambda: len(shown(made)) == 7, "all are answered")
        assert [(kind, name) for kind, name, _ in shown(made)[4:6]] == [("text", "Here:"), ("file", "voice.wav")]
        assert shown(made)[:4] + shown(made)[6:] == [
            ("text", "Here:", b""),
            ("image", "", picture),
            ("text", "Here:", b""),
            ("file", "Bericht 年度.pdf", report),
            ("text", "Here:", b""),
        ]
        image, file, voice, words = prompts(tmp_path)
        folders = tmp_path / "state" / "files"
        assert image.startswith(f"[image: {folders}/")
        assert image.endswith("/in/image.jpg]")
        assert file.endswith("/in/Bericht 年度.pdf]")
        assert voice.startswith("good morning\n[voice: ")
        assert voice.endswith("/in/voice.wav]")
        assert words == "only words"
        assert list(folders.iterdir()) == []


async def test_what_cannot_be_had_or_sent_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    async with agent_running(tmp_path, *options(tmp_path)) as (made, agent):
        made.sim.set_fault(FaultRule(fault="F25", endpoint="cdn/download", params={"status": 403}))
        made.sim.say_media(made.bots["s1"].bot, "image", samples.jpeg())
        made.say("s1", "many")
        names = [f"{number:02}.txt" for number in range(2, 11)]
        await until(lambda: len(shown(made)) == 2 + len(names), "both are answered")
        assert [(kind, name) for kind, name, _ in shown(made)[2:]] == [("file", name) for name in names]
        assert [text for _, text, _ in shown(made)[:2]] == ["Here:", f"Here:\n\n{TEXTS['en'].no_file}"]
        assert prompts(tmp_path) == ["[image]", "many"]
        log = agent.log.read_text()
        assert "agent.no_media" in log
        assert log.count("agent.file_not_sent") == 2  # the empty one, and the eleventh


async def test_pictures_and_the_words_about_them_are_one_turn(tmp_path: Path) -> None:
    """Also after a kill. A command is no words about a picture."""
    async with agent_running(tmp_path, *options(tmp_path, "60")) as (made, agent):
        bot, pictures = made.bots["s1"].bot, [samples.png(), samples.jpeg()]
        for picture in pictures:
            made.sim.say_media(bot, "image", picture)
        made.say("s1", "What is this?")
        await until(lambda: len(prompts(tmp_path)) == 1, "the program runs")
        made.say("s1", "later")
        await agent.end(signal.SIGKILL)
        (tmp_path / "go").touch()
        await agent.start()
        await until(lambda: len(shown(made)) == 4, "both are answered")
        images = [("image", "", picture) for picture in pictures]
        here = ("text", "Here:", b"")
        assert [shown(made)[0], *sorted(shown(made)[1:3]), shown(made)[3]] == [here, *sorted(images), here]
        assert [text.count("[image: ") for text in prompts(tmp_path)] == [2, 2, 0]
        assert [text.partition("\n")[0] for text in prompts(tmp_path)] == ["What is this?", "What is this?", "later"]
        made.sim.say_media(bot, "image", pictures[0])
        made.say("s1", "/stop")
        await until(lambda: shown(made)[-1][1] == TEXTS["en"].stopped, "the picture waits no more")
        made.say("s1", "after")
        await until(lambda: len(prompts(tmp_path)) == 4, "words after a command are a turn of their own")
        assert prompts(tmp_path)[3] == "after"


async def test_a_picture_without_words_is_a_turn_after_a_while(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    async with agent_running(tmp_path, *options(tmp_path, "0.2")) as (made, _):
        made.sim.say_media(made.bots["s1"].bot, "image", samples.png())
        await until(lambda: len(shown(made)) == 2, "it is answered")
        made.say("s1", "words")
        await until(lambda: len(prompts(tmp_path)) == 2, "the words are answered")
        assert prompts(tmp_path)[1] == "words"


@pytest.mark.parametrize("victim", ["command", "adapter", "server"])
async def test_after_a_kill_each_file_is_sent_once_and_no_folder_stays(tmp_path: Path, victim: str) -> None:
    async with agent_running(tmp_path, *options(tmp_path)) as (made, agent):
        picture = samples.png()
        made.sim.say_media(made.bots["s1"].bot, "image", picture)
        await until(lambda: len(prompts(tmp_path)) == 1, "the program runs")
        folders = tmp_path / "state" / "files"
        assert len(list(folders.iterdir())) == 1
        if victim == "command":
            await agent.end(signal.SIGKILL)
            (tmp_path / "go").touch()
            await agent.start()
        elif victim == "adapter":
            await made.adapters[0].kill()
            (tmp_path / "go").touch()
            await until(lambda: '"agent.retrying"' in agent.log.read_text(), "the file waits for an adapter")
            await made.adapters[0].start()
        else:
            made.server.kill()
            (tmp_path / "go").touch()
            await until((tmp_path / "ended").exists, "the program ends while there is no bus")
            await made.server.start()
        await until(lambda: len(shown(made)) == 2, "it is answered")
        await settled(made)
        assert shown(made) == [("text", "Here:", b""), ("image", "", picture)]
        assert list(folders.iterdir()) == []


async def test_a_newer_command_keeps_its_files_when_the_other_one_ends(tmp_path: Path) -> None:
    async with agent_running(tmp_path, *options(tmp_path)) as (made, agent):
        picture = samples.png()
        made.sim.say_media(made.bots["s1"].bot, "image", picture)
        await until(lambda: len(prompts(tmp_path)) == 1, "the program runs")
        newer = Agent(made, *options(tmp_path), name="newer")
        await newer.start()
        try:
            await until(lambda: len(prompts(tmp_path)) == 2, "the newer one has taken the message")
            made.say("s1", "words")
            assert agent.process is not None
            assert await agent.process.wait() == 1
            (tmp_path / "go").touch()
            await until(lambda: len(shown(made)) == 3, "both are answered")
            assert shown(made) == [("text", "Here:", b""), ("image", "", picture), ("text", "Here:", b"")]
        finally:
            await newer.end(signal.SIGKILL)


async def test_an_answer_that_is_refused_costs_an_apology(tmp_path: Path, receiver: Receiver) -> None:
    """One with a file of somebody else, and one that needs more than ten messages."""
    foreign = {"kind": "image", "media": {"object": "s2/picture"}}
    long = {"kind": "text", "text": "x" * 20_000}
    receiver.responses = [web.json_response({"reply": "Here:", "items": [item]}) for item in (foreign, long)]
    async with agent_running(tmp_path, "--http", receiver.url, WECHAT_WEBHOOK_SECRET=receiver.secret) as (
        made,
        agent,
    ):
        nc = await made.nc()
        await made.bind(nc, "s1", made.sim.add_bot())  # of two persons, the one who has asked has an answer
        await nc.close()
        made.say("s1", "a picture")
        made.say("s1", "a story")
        await shows(made, *["That did not work. Please try again."] * 2)
        assert agent.log.read_text().count("agent.refused") == 2
        assert "xxx" not in agent.log.read_text()


async def test_a_url_has_the_picture_and_answers_with_items(tmp_path: Path, receiver: Receiver) -> None:
    """And of a file that is too large only name and size. No proxy is asked for what is on this machine."""
    picture, report, large = samples.png(), samples.blob(600_000), samples.blob(INLINE_BYTES + 1)
    items = [
        {"kind": "image", "data": base64.b64encode(picture).decode()},
        {"kind": "file", "data": base64.b64encode(report).decode(), "name": "report.bin"},
    ]
    receiver.responses = [web.json_response({"reply": "Here:", "items": items})]
    environ = {"WECHAT_WEBHOOK_SECRET": receiver.secret, "http_proxy": f"http://127.0.0.1:{free_port()}"}
    async with agent_running(tmp_path, "--http", receiver.url, **environ) as (made, _):
        sent, bot = samples.jpeg(), made.bots["s1"].bot
        made.sim.say_media(bot, "image", sent)
        await until(lambda: len(shown(made)) == 3, "it is answered")
        assert shown(made) == [("text", "Here:", b""), ("image", "", picture), ("file", "report.bin", report)]
        made.sim.say_media(bot, "file", large, file_name="large.bin")
        await until(lambda: len(receiver.events) == 2, "the agent has the file, too")
    (item,), (other,) = (event["data"]["items"] for event in receiver.events)
    assert (base64.b64decode(item["data"]), item["mime"]) == (sent, "image/jpeg")
    assert ("data" in other, other["media"]["name"], other["media"]["size"]) == (False, "large.bin", len(large))
