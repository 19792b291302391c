# SPDX-License-Identifier: Apache-2.0
"""Commands and snippets of the documentation name what exists."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import typer.main

from adadecode_vllm import plugin
from adadecode_vllm.cli import app
from adadecode_vllm.config import parse_config
from adadecode_vllm.engine.arguments import options_from_flags
from adadecode_vllm.heads import load_heads_config
from tests.documents import DOCUMENTS, ROOT, blocks, commands, read

SHELL = [
    (document, command)
    for document in DOCUMENTS
    for block in blocks(document)
    if block.language in ("", "bash", "sh") and "│" not in block.text
    for command in commands(block)
]
PYTHON = [
    pytest.param(block.text, id=f"{document}-{index}")
    for document in DOCUMENTS
    for index, block in enumerate(blocks(document))
    if block.language == "python"
]


def named(*programs: str) -> list[object]:
    """The documents' commands that start a program, as parameters for a test."""
    found = []
    for document, command in SHELL:
        words = [word for word in shlex.split(command, comments=True) if word]
        # What stands before it in a line, such as a variable's value.
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words and words[0].removeprefix(".venv/bin/") in programs:
            cut = [w for w in words[1:] if w not in ("|", "&&")]
            found.append(pytest.param(cut, id=f"{document}: {' '.join(words[:3])}"))
    assert found, programs
    return found


@pytest.mark.parametrize("words", named("adadecode"))
def test_adadecode_commands(words: list[str]) -> None:
    """The command exists and takes these options."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group | typer.main.TyperGroup)
    if words[0] == "--version":
        return
    command = group.commands[words[0]]
    # Existing files are no matter of the text's.
    command.make_context(words[0], words[1:], resilient_parsing=False)


@pytest.mark.parametrize("words", named("make"))
def test_make_targets(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) [:?]?=", read("Makefile"), re.MULTILINE))
    for word in words:
        name, is_set, _ = word.partition("=")
        assert name in (variables if is_set else targets), word


@pytest.mark.parametrize("words", named("python", "python3", "scripts/run.sh"))
def test_programs_exist(words: list[str]) -> None:
    words = [word for word in words if not word.endswith("bin/python")]
    if words[0] == "-m":
        assert find_spec(words[1]) is not None, words[1]
    else:
        assert (ROOT / words[0]).is_file(), words[0]


@pytest.fixture(scope="module")
def server_arguments() -> argparse.ArgumentParser:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plugin.register()
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


@pytest.mark.parametrize("words", named("vllm"))
def test_server_commands(
    words: list[str], server_arguments: argparse.ArgumentParser
) -> None:
    """vLLM's parser takes them, and AdaDecode their options."""
    if words[0] != "serve" or words[1].startswith("--help"):
        return
    args = server_arguments.parse_args(["--model", words[1], *words[2:]])
    options = options_from_flags(args)
    assert options is not None, "a server of the documentation without AdaDecode"
    if "heads" not in options and (ROOT / words[1]).is_dir():
        assert load_heads_config(ROOT / words[1]).recommended
    parse_config({"heads": words[1], **options})


def configs() -> Iterator[object]:
    """Options in the text, wherever they stand."""
    for document in DOCUMENTS:
        found = re.findall(r"--adadecode-config\s+\\?\s*'(\{[^']*\})'", read(document))
        for index, text in enumerate(found):
            yield pytest.param(text, id=f"{document}-{index}")


@pytest.mark.parametrize("text", list(configs()))
def test_options_are_valid(text: str) -> None:
    parse_config({"heads": "HEADS", **json.loads(text)})


@pytest.mark.parametrize("code", PYTHON)
def test_snippets_import_what_exists(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name), name.name
        elif isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)


@pytest.mark.parametrize("document", ["docs/get-started.md", "docs/serve.md"])
def test_requests_are_json(document: str) -> None:
    bodies = re.findall(r"-d '(\{.*?\})'", read(document), re.DOTALL)
    for body in bodies:
        assert json.loads(body)["model"] == "examples/demo/model"
        assert (ROOT / "examples/demo/model").is_dir()
    assert bodies or document != "docs/serve.md"


def test_paths_of_models_and_heads_exist() -> None:
    """Those that the repository brings; the real model is fetched."""
    text = "".join(read(document) for document in DOCUMENTS)
    paths = set(re.findall(r"\bexamples/(?:demo|smollm2)/[\w./-]*\w", text))
    missing = {path for path in paths if not Path(ROOT / path).exists()}
    assert missing <= {"examples/smollm2/model", "examples/smollm2/download"}
