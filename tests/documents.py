# SPDX-License-Identifier: Apache-2.0
"""The project's Markdown, read for tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").glob("*/README.md"),
    )
)

_FENCE = re.compile(r"^ *```(?P<language>\w*)")
_LINK = re.compile(r"(?<!\\)\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(?P<text>.*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    language: str
    text: str


def read(document: str) -> str:
    """A document's text; its name is relative to the root."""
    return (ROOT / document).read_text(encoding="utf-8")


def prose(document: str) -> Iterator[tuple[int, str]]:
    """A document's lines with their numbers, without fenced blocks."""
    inside = False
    for number, line in enumerate(read(document).splitlines(), 1):
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            yield number, line


def blocks(document: str) -> list[Block]:
    """A document's fenced blocks."""
    found: list[Block] = []
    language: str | None = None
    lines: list[str] = []
    for line in read(document).splitlines():
        fence = _FENCE.match(line)
        if fence and language is None:
            language, lines = fence["language"], []
        elif fence:
            assert language is not None
            found.append(Block(language, "\n".join(lines) + "\n"))
            language = None
        else:
            lines.append(line)
    assert language is None, f"{document}: a fence is not closed"
    return found


def links(document: str) -> list[str]:
    """The targets of a document's links and images, addresses included."""
    return [
        match["target"] for _, line in prose(document) for match in _LINK.finditer(line)
    ]


def anchors(document: str) -> set[str]:
    """The anchors of a document's headings, as GitHub and mkdocs make them."""
    found = set()
    for _, line in prose(document):
        if heading := _HEADING.match(line):
            text = re.sub(r"[^\w\s-]", "", heading["text"].lower()).strip()
            found.add(re.sub(r"\s", "-", text))
    return found


def table(document: str, first: str) -> list[list[str]]:
    """The rows, without the head, of the table whose head begins with a cell."""
    rows: list[list[str]] = []
    for _, line in prose(document):
        if line.startswith(f"| {first} |") or (rows and line.startswith("|")):
            rows.append([cell.strip() for cell in line.strip("|\n").split(" | ")])
        elif rows:
            break
    assert len(rows) > 2, f"{document} has no table {first}"
    return [[cell.strip("| ") for cell in row] for row in rows[2:]]


def commands(block: Block) -> list[str]:
    """The commands of a block, with continued and quoted lines joined."""
    found: list[str] = []
    open_command = ""
    for line in block.text.splitlines():
        open_command += line
        if line.endswith("\\"):
            open_command = open_command[:-1]
        elif open_command.count("'") % 2:
            open_command += "\n"
        else:
            found.append(open_command.strip())
            open_command = ""
    assert not open_command, f"a command does not end: {open_command}"
    return [command for command in found if command and not command.startswith("#")]
