"""For authors of sandboxes: a person's messages in, answers out, with no other rights than a sandbox has.

    async with Sandbox("s1") as sandbox:
        async for message in sandbox:
            await message.reply(f"You said: {message.text}")

`docs/howto/agent.md` has the promises and the rest of it.
"""

from adapter.agent.sandbox import Message, Sandbox

__all__ = ["Message", "Sandbox"]
