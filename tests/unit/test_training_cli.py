# SPDX-License-Identifier: Apache-2.0
"""`adadecode train` and `adadecode eval` as users call them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from adadecode_vllm.heads import load_heads_config, load_tensors
from adadecode_vllm.toolkit.report.text import percent
from tests.command import run
from tests.data_directory import write_answers
from tests.harness import ROOT
from tests.tiny import save_tiny_llama

TRAIN = ("--exit-layers", "1,2", "--epochs", "2", "--batch-size", "8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return write_answers(tmp_path_factory.mktemp("data") / "d", model, 24, 12)


def test_train_then_eval(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = tmp_path / "heads"
    assert run("train", model, heads, "--data", data, *TRAIN) == 0
    out = capsys.readouterr().out
    assert "exit 1: agrees with the final layer on" in out
    assert f"Wrote {heads} after 2 epochs" in out
    assert load_heads_config(heads).speculators_config is not None
    assert list((heads / "run" / "tensorboard").iterdir())

    assert run("eval", model, heads, "--data", data) == 0
    assert "Predicted speedup, 24 answers, gate: probability" in capsys.readouterr().out
    report = json.loads((heads / "evaluation" / "evaluation.json").read_text())
    assert report["simulation"]["answers"] == 24
    assert (heads / "evaluation" / "report.html").stat().st_size > 1000
    assert "vllm serve" in (heads / "README.md").read_text()

    acceptance = ("--gate", "acceptance", "--no-plots", "--output", tmp_path / "a")
    assert run("eval", model, heads, "--data", data, *acceptance) == 0
    report = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert report["simulation"]["gate"] == "acceptance"


def test_agreement_among_few_tokens_is_told_as_such(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = tmp_path / "heads"
    few = ("--draft-vocabulary", "4", "--held-out", "0.2")
    assert run("train", model, heads, "--data", data, *TRAIN, *few) == 0
    among = "among the 4 tokens of the draft vocabulary"
    out = " ".join(capsys.readouterr().out.split())
    assert f"exit 1: agrees with the final layer {among} on" in out
    assert run("eval", model, heads, "--data", data, "--answers", 0) == 0
    assert among in (heads / "README.md").read_text()
    assert among in (heads / "evaluation" / "report.html").read_text()


def test_process_groups_of_others_stay(model: Path, data: Path, tmp_path: Path) -> None:
    """As those of an engine in the same process, which would not start another."""
    distributed = torch.distributed
    distributed.init_process_group(
        "gloo", store=distributed.HashStore(), rank=0, world_size=1
    )
    try:
        assert run("train", model, tmp_path / "heads", "--data", data, *TRAIN) == 0
        assert distributed.is_initialized()
    finally:
        distributed.destroy_process_group()


def test_train_then_eval_with_memory(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--epochs", "2", "--batch-size", "8", "--preset", "best")
    heads = tmp_path / "heads"
    data_option = ("--data", data, "--unroll", "2")
    layers = ("--exit-layers", "0,2")
    assert run("train", model, heads, *data_option, *options, *layers) == 0
    assert "held-out tokens (next drafts: " in capsys.readouterr().out
    card = (heads / "README.md").read_text()
    assert "| Exit | Loss, nats per token | Agreement |" in card
    assert run("eval", model, heads, "--data", data) == 0
    report = json.loads((heads / "evaluation" / "evaluation.json").read_text())
    assert report["simulation"]["answers"] == 24
    assert len(report["exits"][0]["agreement_by_draft"]) == 3
    card = (heads / "README.md").read_text()
    assert "| Memory |" in card
    assert "for the first, second and third draft of a cycle" in card
    shares = map(percent, report["exits"][0]["agreement_by_draft"])
    assert f"| 0 | {' / '.join(shares)} |" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--exit-layers", "4"), "--exit-layers contains 4, but the model's 4 layers"),
        (("--exit-layers", "2,1"), "--exit-layers must be strictly increasing, not"),
        (("--exit-layers", "x"), "--exit-layers 'x': not a list of integers"),
        (
            ("--preset", "fast"),
            "--preset fast: unknown; choose one of paper, quick, best",
        ),
        (("--objective", "mse"), "--objective mse: input should be 'kl' or 'greedy'"),
        (("--epochs", "0"), "--epochs 0: input should be greater than 0"),
        (("--held-out", "1"), "--held-out 1.0: input should be less than 1"),
        (("--draft-vocabulary", "1"), "--draft-vocabulary 1: input should be"),
        (
            ("--head", "full", "--draft-vocabulary", "9"),
            "--draft-vocabulary 9: value error, full-size heads have the whole",
        ),
        (("--seed", "-1"), "--seed -1: input should be greater than or equal to 0"),
        (("--seed", str(2**32)), f"--seed {2**32}: input should be less than {2**32}"),
        (("--unroll", "0"), "--unroll 0: input should be greater than 0"),
        (("--threshold", "1.5"), "--threshold 1.5: input should be less than or"),
        (("--threshold", "-0.1"), "--threshold -0.1: input should be greater than or"),
        (
            ("--max-early-predictions", "0"),
            "--max-early-predictions 0: input should be greater than or equal to 1;",
        ),
        (("--max-early-predictions", "129"), "--max-early-predictions 129: input"),
        (("--start", "zero"), "--start zero: input should be 'identity' or 'ridge'"),
        (
            ("--head", "full", "--start", "ridge"),
            "--start ridge: value error, full-size heads have a start of their own",
        ),
        (
            ("--head", "full", "--memory"),
            "--memory True: value error, full-size heads have no memory",
        ),
        (("--heads-dtype", "int8"), "--heads-dtype int8: unknown dtype"),
        (("--dtype", "int8"), "--dtype int8: unknown dtype"),
        (("--attn", "xformers"), "--attn xformers: its kernels"),
        (("--held-out", "0"), "--exit-layers auto: the choice needs held-out text"),
    ],
)
def test_mistakes_are_one_sentence(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert run("train", model, tmp_path / "h", "--data", data, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {message}")
    assert not (tmp_path / "h" / "config.json").exists()


def test_a_cache_within_out_is_refused(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "h"
    cache = tmp_path / "h" / "states"
    options = ("--data", data, "--cache-dir", cache)
    assert run("train", model, output, *options) == 2
    assert f"--cache-dir {cache}: it lies in OUT, {output}," in capsys.readouterr().err
    assert not output.exists()


def test_missing_data_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", model, tmp_path / "h", "--data", tmp_path / "none") == 2
    assert f"error: --data {tmp_path / 'none'}" in capsys.readouterr().err


def test_eval_refuses_the_heads_of_another_model(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    save_tiny_llama(other, seed=5)
    heads = tmp_path / "heads"
    assert run("init-heads", other, heads, "--exit-layers", "1,2") == 0
    assert run("eval", model, heads, "--data", data) == 2
    assert f"HEADS {heads}: they were made for {other}" in capsys.readouterr().err


def test_eval_needs_calibration_for_the_acceptance_gate(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = tmp_path / "heads"
    assert run("init-heads", model, heads, "--exit-layers", "1,2") == 0
    assert run("eval", model, heads, "--data", data, "--gate", "acceptance") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --gate acceptance: the heads are not calibrated")


@pytest.mark.parametrize("memory", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_train_the_same_heads(
    model: Path, data: Path, tmp_path: Path, memory: bool
) -> None:
    """Gradients are summed over the processes, so only the rounding differs."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = (*TRAIN, "--memory") if memory else TRAIN
    assert run("train", model, one, "--data", data, *options) == 0
    launch = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--standalone", "-m", "adadecode_vllm.cli", "train"),
        *(str(model), str(two), "--data", str(data), *options),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        launch,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    record = yaml.safe_load((two / "run" / "run.yaml").read_text())
    assert record["processes"] == 2
    first = load_tensors(one, load_heads_config(one)).weights
    second = load_tensors(two, load_heads_config(two)).weights
    for layer in (1, 2):
        torch.testing.assert_close(first[layer], second[layer], rtol=1e-3, atol=1e-4)
    assert load_heads_config(two).memory == memory
    histories = [
        json.loads((heads / "run" / "history.json").read_text())["held_out"][-1]
        for heads in (one, two)
    ]
    assert histories[0]["loss"] == pytest.approx(histories[1]["loss"], rel=1e-2)
    assert ("agreement_by_draft" in histories[1]) == memory
