"""For authors of sandboxes in Python: `from wechat_nats import Sandbox`.

`Sandbox` is one sandbox, `Sandboxes` many over one connection. `Message` is what a handler gets. `Outbound` is a
command, with `OutText`, `OutImage`, `OutVideo`, `OutFile` and `Media` as its items, and `Receipt` says what became of
it. `Refused` and `Temporary` are the errors: what is asked for is not possible, or not possible now.
`docs/howto/agent.md` has the promises.
"""

from adapter.agent import Message, Sandbox, Sandboxes
from adapter.contract.messages import Inbound, Media, Outbound, OutFile, OutImage, OutText, OutVideo, Receipt, Window
from adapter.errors import Refused, Temporary

__all__ = [
    "Inbound",
    "Media",
    "Message",
    "OutFile",
    "OutImage",
    "OutText",
    "OutVideo",
    "Outbound",
    "Receipt",
    "Refused",
    "Sandbox",
    "Sandboxes",
    "Temporary",
    "Window",
]
