"""The command `wechat-nats`: all of it is in `adapter.cli`."""

from __future__ import annotations

import sys

from adapter import __version__


def main() -> None:
    """Ends the process with the exit code of the command (`wechat-nats --help` lists them)."""
    if sys.argv[1:] == ["--version"]:  # scripts ask for it: nothing is imported
        sys.stdout.write(f"{__version__}\n")
        return
    try:
        from adapter import entry  # noqa: PLC0415 -- as above

        entry.prepare()
        from adapter.cli import main as cli  # noqa: PLC0415 -- a ctrl-C is not to be met by a traceback
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(cli())


if __name__ == "__main__":
    main()
