# SPDX-License-Identifier: Apache-2.0
"""Program code of a model runs only where the user says so, and nobody is asked."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import load_heads_config
from adadecode_vllm.toolkit.data.generate import EngineSpec, check_options, model_length
from tests.command import run
from tests.data_directory import write_rows
from tests.harness import MODEL
from tests.tiny import save_tiny_llama

# Every import of the code is recorded.
CODE = """
import transformers

with open({marker!r}, "a") as file:
    file.write("imported\\n")

class MineConfig(transformers.LlamaConfig):
    model_type = "mine"

class LlamaForCausalLM(transformers.LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def model(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model whose architecture Transformers does not know."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    # A name of its own: Python keeps modules that it has imported.
    directory = tmp_path / f"model_{tmp_path.name}"
    save_tiny_llama(directory, vocab_size=1024, max_position_embeddings=64)
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {
            "AutoConfig": "mine.MineConfig",
            "AutoModelForCausalLM": "mine.LlamaForCausalLM",
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "mine.py").write_text(CODE.format(marker=str(marker)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(MODEL) / name, directory / name)
    return directory


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked on the terminal; the answer is yes."""
    asked: list[str] = []

    def answer(prompt: str = "") -> str:
        asked.append(prompt)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    return asked


def commands(model: Path, work: Path) -> dict[str, list[str]]:
    (work / "texts.jsonl").write_text('{"text": "Ann has 3 apples and 4 pears."}\n' * 4)
    rows = [([5, 6], list(range(10, 30))) for _ in range(8)]
    data = write_rows(work / "data", rows, vocab_size=1024)
    heads, layers = str(work / "heads"), ["--exit-layers", "1,2"]
    return {
        "init-heads": ["init-heads", str(model), heads, *layers],
        "eval": ["eval", str(model), heads, "--data", str(data), "--no-plots"],
        "train": [
            *("train", str(model), str(work / "trained"), "--data", str(data)),
            *(*layers, "--epochs", "1"),
        ],
        "data": [
            *("data", str(work / "new"), "--model", str(model), "--finished"),
            *("--plain", "--input", str(work / "texts.jsonl")),
        ],
    }


@pytest.mark.parametrize("command", ["init-heads", "eval", "train", "data"])
def test_code_runs_only_if_the_user_says_so(
    model: Path,
    marker: Path,
    questions: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    argv = commands(model, tmp_path)
    if command == "eval":
        assert run(*argv["init-heads"], "--trust-remote-code") == 0
        marker.unlink()
    assert run(*argv[command]) == 2
    argument = "--model" if command == "data" else "MODEL"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {argument} {model}: the model brings program code of its own, which "
        "would run on this machine; read it and pass --trust-remote-code, or give a "
        "model that needs none"
    )
    assert not marker.exists()
    assert questions == []
    assert run(*argv[command], "--trust-remote-code") == 0
    if command != "eval":  # which has imported it before
        assert "imported" in marker.read_text()
    assert questions == []
    if command == "train":
        assert load_heads_config(tmp_path / "trained").exit_layers == [1, 2]


def test_the_engine_is_told(
    model: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AdaDecodeError, match=r"pass --trust-remote-code"):
        check_options({"trust_remote_code": True})
    told: list[Any] = []

    class Arguments:
        def __init__(self, **values: Any) -> None:
            told.append(values["trust_remote_code"])
            raise ValueError("enough")

    monkeypatch.setattr("vllm.EngineArgs", Arguments)
    for trusted in (False, True):
        with pytest.raises(AdaDecodeError, match="enough"):
            model_length(EngineSpec("m", "auto", 9, trust_remote_code=trusted))
    assert told == [False, True]
