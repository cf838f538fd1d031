"""Documents: every link leads somewhere, and no text cites a number that only its author could look up."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = {".git", ".venv", ".tools", ".pytest_cache", "node_modules", "dist", "data", "__pycache__"}


def files(folder: Path) -> Iterator[Path]:
    """Those of the repository, and none of what tools and packages have brought."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path
        elif path.name not in OUTSIDE:
            yield from files(path)


OURS = [*files(ROOT)]
PAGES = [path for path in OURS if path.suffix == ".md"]
CODE = [path for path in OURS if path.suffix == ".py"]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
NUMBERS = re.compile(r"\((?:section )?[1-9]\d?(?:\.\d{1,2}){1,2}(?:(?:, | and )[1-9]\d?\.\d{1,2})*\)")
"""Numbers of sections in parentheses. Looked for in code alone: in tables of Markdown files these are figures."""
CITATION = re.compile(
    r"(?<![`\"'/#])\b[FQS]\d{1,2}\b(?![`\"'])"  # faults of the simulator are named in backticks
    r"|\b(?:chapter|decision|guarantee|section|ilink-protocol|CONTRIBUTING(?:\.md)?`?,?) \d",
)
SOURCE = re.compile(r'(docs/[\w./-]+\.md)((?:,? (?:and )?"[^"]+")*)')
"""A page, and titles on it, as comments and docstrings name them."""
BLOCK = re.compile(r"```.*?```", re.DOTALL)


CHINESE = [page for page in PAGES if page.name.endswith(".zh-CN.md")]
COMMENT = re.compile(r"(?:^|(?<=\s))# .*", re.MULTILINE)


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text("utf-8")), re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MkDocs make them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(page)}


@cache
def prose(path: Path) -> str:
    """Comments and docstrings of a Python file, a line each."""
    source = path.read_text("utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [token.string for token in tokens if token.type == tokenize.COMMENT]
    values = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    texts = [value.value for value in values if isinstance(value, ast.Constant)]
    found += [re.sub(r"\s+", " ", text) for text in texts if isinstance(text, str)]
    return "\n".join(found)


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


def skeleton(page: Path) -> dict[str, object]:
    """What a page has in common with the same one in the other language."""
    text = page.read_text("utf-8").replace("LANGUAGE=zh", "LANGUAGE=en")
    said = BLOCK.sub("", text)
    links = [(target.replace(".zh-CN", ""), anchor) for target, anchor in LINK.findall(said)]
    blocks = [re.sub(" +", " ", COMMENT.sub("", block)) for block in BLOCK.findall(text)]
    return {
        "blocks": [[line.rstrip() for line in block.splitlines()] for block in blocks],
        "structure": re.findall(r"^(?:#+ |- |\d+\. |\|)", said, re.MULTILINE),
        "code": set(re.findall(r"`([^`\n]+)`", said)),
        "links": sorted((target, anchor if target else bool(anchor)) for target, anchor in links),
    }


@pytest.mark.parametrize("page", CHINESE, ids=[str(page.relative_to(ROOT)) for page in CHINESE])
def test_a_page_has_the_same_code_and_structure_in_chinese(page: Path) -> None:
    english = page.with_name(page.name.replace(".zh-CN", ""))
    assert f"\n[中文]({page.name})\n" in english.read_text("utf-8")
    assert f"\n[English]({english.name})\n" in page.read_text("utf-8")
    assert skeleton(page) == skeleton(english)


def test_pages_and_titles_that_code_names_are_there() -> None:
    named = [found.groups() for path in CODE for found in SOURCE.finditer(prose(path))]
    assert len(named) > 20
    assert [page for page, _ in named if not (ROOT / page).is_file()] == []
    titles = {(page, title) for page, quoted in named for title in re.findall('"([^"]+)"', quoted)}
    assert {(page, title) for page, title in titles if title not in headings(ROOT / page)} == set()


def test_no_text_cites_a_bare_number() -> None:
    simulator = ROOT / "adapter/simulator/README.md"  # where its faults have their names from
    found = {path: citations(prose(path)) for path in CODE}
    found |= {page: CITATION.findall(page.read_text("utf-8")) for page in PAGES if page != simulator}
    assert {path: cited for path, cited in found.items() if cited} == {}
