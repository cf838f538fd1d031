"""Documents: every link leads somewhere, and no text cites a number that only its author could look up."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = {".git", ".venv", ".tools", ".pytest_cache", "node_modules", "dist", "data"}
PAGES = sorted(path for path in ROOT.rglob("*.md") if not OUTSIDE & {*path.relative_to(ROOT).parts})
CODE = sorted(path for folder in ("adapter", "tests", "schemas", "docs") for path in (ROOT / folder).rglob("*.py"))
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
NUMBERS = re.compile(r"\((?:section )?[1-9]\d?(?:\.\d{1,2}){1,2}(?:(?:, | and )[1-9]\d?\.\d{1,2})*\)")
"""Numbers of sections in parentheses. Looked for in code alone: in tables of Markdown files these are figures."""
CITATION = re.compile(
    r"(?<![`\"'/#])\b[FQS]\d{1,2}\b(?![`\"'])"  # faults of the simulator are named in backticks
    r"|\b(?:chapter|decision|guarantee|section|ilink-protocol|CONTRIBUTING(?:\.md)?`?,?) \d",
)
NOT_YET = {"adapter/inbound/dispatcher.py"}
BLOCK = re.compile(r"```.*?```", re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def prose(source: str) -> Iterator[str]:
    """Comments and docstrings of a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


def citations(text: str) -> list[str]:
    return [found.group() for pattern in (NUMBERS, CITATION) for found in pattern.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for target, anchor in LINK.findall(BLOCK.sub("", page.read_text("utf-8"))):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(f"{target}#{anchor}")
    assert lost == []


def test_no_text_cites_a_bare_number() -> None:
    found = {str(path.relative_to(ROOT)): citations("\n".join(prose(path.read_text("utf-8")))) for path in CODE}
    simulator = ROOT / "adapter/simulator/README.md"  # where the simulator's faults have their names from
    found |= {
        str(page.relative_to(ROOT)): CITATION.findall(page.read_text("utf-8")) for page in PAGES if page != simulator
    }
    assert {path: cited for path, cited in found.items() if cited and path not in NOT_YET} == {}


@pytest.mark.parametrize(
    "text", ["Repeats (F16).", "The window (5.2).", "See decision 59.", "(ilink-protocol 7.3)", "Q6"]
)
def test_a_bare_number_would_be_found(text: str) -> None:
    assert citations(text)


@pytest.mark.parametrize(
    "text",
    ["The fault `F16`", "(1.4 ms)", "nats-server 2.14", "a cooling of 5.2", "(0.5, 1)", "(1.41, without modules)"],
)
def test_what_is_no_citation_passes(text: str) -> None:
    assert citations(text) == []
