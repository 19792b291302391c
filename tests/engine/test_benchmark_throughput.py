# SPDX-License-Identifier: Apache-2.0
"""The throughput benchmark as a user runs it: real engines, taking turns."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.benchmark_throughput import main
from benchmarks.options import run_command
from tests.harness import HEADS, MODEL, ROOT

pytestmark = pytest.mark.engine

COMMON = [
    *("--model", MODEL, "--adadecode-heads", HEADS, "--dtype", "float32"),
    *("--enforce-eager", "--max-model-len", "256"),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "benchmark_throughput.py")),
            *(*COMMON, *arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        # Each variant's process has its engine in it: others would import vLLM again.
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )


def test_all_variants_give_the_same_text(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    answer = run(
        *("--num-prompts", "3", "--output-len", "24", "--repeats", "1"),
        *("--batch-sizes", "1,2", "--kv-cache-gib", "0.1"),
        *("--variants", "baseline,adadecode,draft-model,transformers-early-exit"),
        *("--output-json", str(output), "--plots", str(tmp_path)),
    )
    assert answer.returncode == 0, answer.stderr
    results: dict[str, Any] = json.loads(output.read_text())
    assert results["variants"]["draft-model"]["status"] == "skipped"
    cases = {(case["variant"], case["batch_size"]): case for case in results["cases"]}
    for variant in ("adadecode", "transformers-early-exit"):
        figures = cases[variant, 1]["figures"]
        assert figures["texts"] == {"same": 3, "ties": 0, "different": 0}, variant
        assert figures["ttft_ms"]["p50"] > 0
        assert figures["tpot_ms"]["p99"] >= figures["tpot_ms"]["p50"] > 0
        assert figures["peak_memory_mib"] > 100
    assert cases["adadecode", 2]["figures"]["texts"]["same"] == 3
    assert cases["baseline", 1]["figures"]["tokens_per_forward"] == 1
    assert cases["adadecode", 1]["figures"]["tokens_per_forward"] > 2
    assert cases["transformers-early-exit", 1]["figures"]["tokens_per_forward"] > 1
    # One request at a time only; the rest went on.
    assert ("transformers-early-exit", 2) not in cases
    assert cases["adadecode", 1]["figures"]["efficiency"]["median"] > 0
    assert "draft-model skipped" in answer.stdout
    assert (tmp_path / "variants.png").stat().st_size > 1000


@pytest.mark.slow  # its parts are tested without engines
def test_a_load_that_swings(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    answer = run(
        *("--num-prompts", "8", "--output-len", "12", "--repeats", "1"),
        *("--batch-sizes", "4", "--oscillate-to", "1", "--kv-cache-gib", "0.1"),
        *("--variants", "baseline,adadecode", "--output-json", str(output)),
    )
    assert answer.returncode == 0, answer.stderr
    results: dict[str, Any] = json.loads(output.read_text())
    assert results["job"]["oscillate_to"] == 1
    ours = next(case for case in results["cases"] if case["variant"] == "adadecode")
    assert ours["figures"]["texts"] == {"same": 8, "ties": 0, "different": 0}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--variants", "baseline,eagle"], "--variants: unknown variant 'eagle'"),
        (["--dataset-name", "xsum"], "--dataset-path"),
        (["--batch-sizes", "64"], "--num-prompts"),
        (["--adadecode-config", '{"cap": 3}'], "unknown option 'cap'"),
        (["--oscillate-to", "0"], "--oscillate-to: 0 is below 1"),
        (["--split-prompts", "--rounds", "2"], "--split-prompts: --rounds chooses"),
        (
            ["--split-prompts", "--num-prompts", "2", "--repeats", "3"],
            "--split-prompts: 2 prompts do not suffice for 3 repeats",
        ),
        (
            ["--oscillate-to", "1", "--variants", "baseline,transformers"],
            "transformers answers batch after batch",
        ),
    ],
)
def test_mistakes_end_with_a_sentence(
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_throughput.py", *COMMON, *arguments])
    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert sentence in errors
    assert "Traceback" not in errors
