"""Are known vulnerabilities in what is locked? `python -m tests.audit [--unknown-ok] UV`; see `make audit`.

Exit code 0: none is known; 1: some are, one line each; 3: that cannot be told, as nobody with advisories answered.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NONE, FOUND, UNKNOWN = 0, 1, 3
ROOT = Path(__file__).parents[1]


def verdict(report: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Exit code and lines, out of pip-audit's `dependencies`. What was skipped was not audited."""
    skipped = [found["name"] for found in report if "skip_reason" in found]
    lines = [
        f"{found['name']} {found['version']}: {flaw['id']}, fixed in {flaw['fix_versions'] or 'no version'}"
        for found in report
        for flaw in found.get("vulns", [])
    ]
    if lines:
        return FOUND, lines
    if skipped or not report:
        return UNKNOWN, [f"not audited: {len(skipped)} of {len(report)} packages; is there an index with advisories?"]
    return NONE, [f"no known vulnerability in {len(report)} packages"]


def main(uv: str) -> int:
    """Audits what every extra needs, without the development tools."""
    with tempfile.TemporaryDirectory() as folder:
        locked = Path(folder) / "requirements.txt"
        wanted = ["--frozen", "--all-extras", "--no-default-groups", "--no-emit-project", "--quiet"]
        subprocess.run([uv, "export", *wanted, "--output-file", str(locked)], cwd=ROOT, check=True)
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--requirement",
            str(locked),
            "--require-hashes",
            "--disable-pip",
        ]
        done = subprocess.run(
            [*command, "--format", "json", "--progress-spinner", "off"],
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        report = json.loads(done.stdout)["dependencies"]
    except (ValueError, LookupError):
        print(f"not audited: {(done.stderr.strip().splitlines() or ['pip-audit said nothing'])[-1][:300]}")
        return UNKNOWN
    code, lines = verdict(report)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    code = main(sys.argv[-1])
    sys.exit(NONE if code == UNKNOWN and "--unknown-ok" in sys.argv else code)
