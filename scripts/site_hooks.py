# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs: the site shows pages and files that lie outside docs/.

Sources are written so that links work in the repository. Here CONTRIBUTING.md and
CHANGELOG.md become pages, and every other file that a page links to is published
as it is, below source/.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the root, and the pages that links to them lead to."""

_GENERATED = ("CONTRIBUTING.md", "CHANGELOG.md")
# The target of a Markdown link, without its anchor; not an address, not an anchor.
_TARGET = re.compile(r"(?<=\]\()(?![a-z]+:|#)[^)\s#]+")
# What browsers show; anything else is published as text.
_SHOWN = {".json", ".png", ".svg"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages."""
    for name in _GENERATED:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, PAGES[name], content=text))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Point links that leave docs/ to pages or published files."""
    uri = page.file.src_uri
    page_dir = posixpath.dirname(uri)
    generated = uri in {PAGES[name] for name in _GENERATED}
    base = "" if generated else posixpath.join(DOCS, page_dir)

    def target(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(base, match[0]))
        if path in PAGES:
            found = PAGES[path]
        elif path.startswith(f"{DOCS}/"):
            found = path.removeprefix(f"{DOCS}/")
        else:
            found = _published(path, uri, config, files)
        return posixpath.relpath(found, page_dir or ".")

    return _TARGET.sub(target, markdown)


def _published(path: str, page: str, config: MkDocsConfig, files: Files) -> str:
    source = ROOT / path
    if path.startswith("..") or not source.is_file():
        raise PluginError(f"{page} links to {path}, which is not a file")
    uri = f"source/{path}"
    if source.suffix not in _SHOWN:
        uri += ".txt"
    if files.get_file_from_path(uri) is None:
        files.append(File.generated(config, uri, abs_src_path=str(source)))
    return uri
