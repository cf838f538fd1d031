"""`make attacks`: attacks of `tests/attacks/` one after the other, a row each; 1 where something does not hold."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
from pathlib import Path

from tests.attacks.rig import HEAD, attacks, run


def main() -> int:
    known = attacks()
    parser = argparse.ArgumentParser(description="Attacks a bridge on this machine, and measures its victim.")
    parser.add_argument("names", nargs="*", metavar="attack", help=f"of {', '.join(known)}; all unless named")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long each attack lasts")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if unknown := set(given.names) - set(known):
        parser.error(f"no such attack: {', '.join(sorted(unknown))}")
    print(HEAD, flush=True)
    faults = 0
    for name in given.names or known:
        with (
            tempfile.TemporaryDirectory(prefix=f"attack-{name}-", ignore_cleanup_errors=True) as folder,
            contextlib.redirect_stdout(sys.stderr),  # what the commands say that make the credentials
        ):
            outcome = asyncio.run(run(name, Path(folder), seconds=given.seconds, seed=given.seed))
        print(outcome.row(), flush=True)
        faults += bool(outcome.faults())
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
