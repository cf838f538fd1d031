"""For authors of sandboxes: a person's messages in, answers out, with no other rights than a sandbox has.

    async def handle(message: Message) -> None:
        await message.reply(f"You said: {message.text}")

    async with Sandbox("s1") as sandbox:
        await sandbox.run(handle)

`docs/howto/agent.md` has the promises and the rest of it.
"""

from adapter.agent.sandbox import Message, Sandbox
from adapter.agent.sandboxes import Sandboxes

__all__ = ["Message", "Sandbox", "Sandboxes"]
