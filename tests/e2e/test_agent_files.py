"""Media of a person for a program or a URL, and files of theirs for the person, byte for byte."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from adapter.simulator import FaultRule, samples
from tests.e2e.test_agent import agent_running, settled
from tests.e2e.world import World, until

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
"""


def options(folder: Path) -> list[str]:
    (folder / "files.py").write_text(PROGRAM)
    return ["--exec", f"{sys.executable} {folder / 'files.py'} {folder}", "--state", str(folder / "state")]


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
        made.say("s1", "only words")
        await until(lambda: len(shown(made)) == 5, "all are answered")
        assert shown(made) == [
            ("text", "Here:", b""),
            ("image", "", picture),
            ("text", "Here:", b""),
            ("file", "Bericht 年度.pdf", report),
            ("text", "Here:", b""),
        ]
        image, file, words = prompts(tmp_path)
        folders = tmp_path / "state" / "files"
        assert image.startswith(f"[image: {folders}/")
        assert image.endswith("/in/image.jpg]")
        assert file.endswith("/in/Bericht 年度.pdf]")
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
        assert prompts(tmp_path) == ["[image]", "many"]
        log = agent.log.read_text()
        assert "agent.no_media" in log
        assert log.count("agent.file_not_sent") == 2  # the empty one, and the eleventh


async def test_after_a_kill_files_come_again_and_no_folder_stays(tmp_path: Path) -> None:
    async with agent_running(tmp_path, *options(tmp_path)) as (made, agent):
        picture = samples.png()
        made.sim.say_media(made.bots["s1"].bot, "image", picture)
        await until(lambda: len(prompts(tmp_path)) == 1, "the program runs")
        folders = tmp_path / "state" / "files"
        assert len(list(folders.iterdir())) == 1
        await agent.end(signal.SIGKILL)
        (tmp_path / "go").touch()
        await agent.start()
        await until(lambda: len(shown(made)) == 2, "it is answered")
        await settled(made)
        assert shown(made) == [("text", "Here:", b""), ("image", "", picture)]
        assert list(folders.iterdir()) == []
