"""The pages' links lead to files and headings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted(page for folder in ("benchmarks", "csrc", "docs", "tests")
            for page in (ROOT / folder).rglob("*.md")),
]  # fmt: skip


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The headings as GitHub names them: small letters, spaces as hyphens, no other signs."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    links = [
        "".join(link.split())  # a line may break within
        for link in re.findall(r"\]\(([^)]+)\)", without_code(page))
    ]
    broken = []
    for link in links:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_link_to_nothing_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `two`, three\n")
    page = tmp_path / "page.md"
    links = ["other.md#one-two-three", "#here", "gone.md", "other.md#gone", "#gone"]
    page.write_text("# Here\n" + " ".join(f"[a]({link})" for link in links))
    assert broken_links(page) == links[2:]
