"""`python -m adapter.simulator`."""

import sys

from adapter.simulator.process import run

if __name__ == "__main__":
    sys.exit(run())
