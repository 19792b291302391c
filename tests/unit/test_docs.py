# SPDX-License-Identifier: Apache-2.0
"""The documentation: its form, its links, its site, and what it says of options."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from adadecode_vllm.config import AdaDecodeConfig
from adadecode_vllm.request_options import PREFIX, RequestOptions
from tests.documents import DOCUMENTS, ROOT, anchors, links, prose, read, table

LINE = 100
TABLE = 140
GENERATED = {"docs/features.md"}
"""Documents whose tables are written by a program."""


def long_lines(document: str) -> list[str]:
    """Where a document's lines are too long."""
    tables = {number for number, line in prose(document) if line.lstrip()[:1] == "|"}
    found = []
    for number, line in enumerate(read(document).splitlines(), 1):
        if number in tables:
            if document not in GENERATED and len(line) > TABLE:
                found.append(f"{document}:{number}: a row of {len(line)} characters")
        elif len(line) > LINE:
            found.append(f"{document}:{number}: {len(line)} characters")
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lines_are_short(document: str) -> None:
    assert long_lines(document) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    """Relative links lead to a file, and anchors to a heading in it."""
    dead = []
    for link in links(document):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        target = target.resolve()
        if not target.is_relative_to(ROOT.resolve()) or not target.exists():
            dead.append(link)
        elif anchor:
            name = target.relative_to(ROOT.resolve()).as_posix()
            if anchor not in anchors(name):
                dead.append(link)
    assert dead == []


def test_every_page_can_be_reached() -> None:
    """The site's navigation names every page of docs/, and no other."""
    nav = read("mkdocs.yml").partition("\nnav:\n")[2]
    named = {line.rsplit(" ", 1)[1] for line in nav.splitlines() if ".md" in line}
    pages = {
        path.relative_to(ROOT / "docs").as_posix()
        for path in (ROOT / "docs").rglob("*.md")
    }
    assert named == pages | {"contributing.md", "changelog.md"}


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("mkdocs", "material", "griffe_pydantic")),
    reason="the extra docs is not installed",
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = (site / "api/heads/index.html").read_text(encoding="utf-8")
    assert "load_tensors" in page
    assert "a matrix holds NaN or infinity" in page, "docstrings are missing"
    page = (site / "api/engine/index.html").read_text(encoding="utf-8")
    assert "Most unverified tokens" in page, "descriptions of fields are missing"
    results = (site / "results/index.html").read_text(encoding="utf-8")
    assert 'href="../source/benchmarks/results/smollm2_gsm8k_float32.json"' in results
    source = site / "source/benchmarks/results/smollm2_gsm8k_float32.json"
    assert json.loads(source.read_text())["workload"]["name"] == "gsm8k"
    assert (site / "contributing/index.html").exists()


def test_every_option_of_the_engine_is_explained() -> None:
    rows = {row[0].strip("`"): row[1] for row in table("docs/tune.md", "option")}
    fields = AdaDecodeConfig.model_fields
    assert list(rows) == list(fields)
    for name, default in rows.items():
        value = fields[name].default
        if isinstance(value, bool | int | float | str):
            documented = default.strip("`")
            assert documented == json.dumps(value), name


def test_every_option_of_a_request_is_explained() -> None:
    rows = [row[0].strip("`") for row in table("docs/serve.md", "option")]
    assert rows == [PREFIX + name for name in RequestOptions.model_fields]


def test_every_patch_has_a_proposal() -> None:
    rows = " ".join(row[0] for row in table("docs/upstream.md", "patch"))
    patches = {path.stem for path in (ROOT / "patches").glob("[a-z]*.py")}
    assert {name for name in patches if f"`{name}`" not in rows} == set()
