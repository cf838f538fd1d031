"""MkDocs hook: the site consists of the repository's Markdown files, at the paths that they have there.

So a link from a page to `../helm/runbook.md`, or to a source file, works in the repository and on the site.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
TARGET = re.compile(r"\]\(([^)#:\s]+)")


def pages() -> list[str]:
    """Every Markdown file that git knows or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return sorted(path for path in listed if (ROOT / path).is_file())


def linked(path: str) -> set[str]:
    """The files that a page links to, pictures and source code among them."""
    targets = {(ROOT / path).parent / target for target in TARGET.findall((ROOT / path).read_text("utf-8"))}
    return {str(target.resolve().relative_to(ROOT)) for target in targets if target.is_file()}


def on_config(config: Any) -> Any:
    """Expands the nav's `docs/decisions` to the decisions, in the order of their numbers."""
    decisions = [path for path in pages() if path.startswith("docs/decisions/")]
    config.nav = [
        {"Decisions": sorted(decisions, key=lambda path: not path.endswith("README.md"))}
        if "Decisions" in part
        else part
        for part in config.nav
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Replaces what is in docs/ by the pages of the whole repository. The theme's own files stay."""
    paths = set(pages()).union(*(linked(path) for path in pages()))
    kept = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*kept, *(File.generated(config, path, abs_src_path=str(ROOT / path)) for path in sorted(paths))])
