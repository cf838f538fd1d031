"""Coverage-guided fuzzing of every target: `python -m tests.fuzz [--seconds N] [target …]`; see `make fuzz`.

Each target is a process of its own, since the fuzzer ends the one that it runs in. Corpora and findings stay in
.pytest_cache/fuzz. Exit code 1 if one of them found something.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".pytest_cache" / "fuzz"
SLOWER = 5.0
"""How much slower code is whose coverage is counted."""


def fuzz(name: str, arguments: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris  # only in the environment that `make fuzz` makes

    with atheris.instrument_imports(include=["adapter", "filetype", "imagesize"]):
        from tests.fuzz import costs
    atheris.Setup(["fuzz", *arguments], partial(costs.check, name, slower=SLOWER))
    atheris.Fuzz()


def run(name: str, seconds: int) -> tuple[bool, str]:
    """Whether a target is without a finding, and its line of the report."""
    from tests.fuzz.targets import seeds

    corpus, findings = FOLDER / name / "corpus", FOLDER / name / "findings"
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds(name):
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    arguments = [str(corpus), f"-artifact_prefix={findings}/", f"-max_total_time={seconds}", "-timeout=20"]
    arguments += ["-rss_limit_mb=2048", "-max_len=8192", "-print_final_stats=1"]
    started = time.monotonic()
    command = [sys.executable, "-m", "tests.fuzz", "--only", name, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    took_s = time.monotonic() - started
    cases = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    edges = covered[-1] if covered else "?"
    line = f"{name:10} {int(cases[-1]) if cases else 0:>10} cases {took_s:6.0f} s  {edges:>6} edges"
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(("INFO:", "#"))]
        return False, "\n".join([f"{line}  FOUND SOMETHING (exit code {done.returncode})", *said[-60:]])
    return True, line


def main() -> int:
    """The report, one line for each target as it ends."""
    if "--only" in sys.argv:
        at = sys.argv.index("--only")
        fuzz(sys.argv[at + 1], sys.argv[at + 2 :])
    if importlib.util.find_spec("atheris") is None:
        sys.exit("The fuzzer, atheris, is not here: it has wheels for Linux and Python 3.11 to 3.14.")
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], help="default: all")
    options = parser.parse_args()
    failed = 0
    for name in options.targets or TARGETS:
        fine, line = run(name, options.seconds)
        failed += not fine
        print(line, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
