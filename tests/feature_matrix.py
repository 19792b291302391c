# SPDX-License-Identifier: Apache-2.0
"""docs/features.md, made from the tests' `feature` markers.

    python -m tests.feature_matrix --write

A test says `@pytest.mark.feature("prefix caching", "supported")`, with one of
:data:`STATUSES` and perhaps a note. What every feature needs is a test.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "features.md"
STATUSES = ("supported", "refused", "not applicable")

SECTIONS: dict[str, tuple[str, ...]] = {
    "Scheduling and KV cache": (
        "chunked prefill",
        "prefix caching",
        "preemption",
        "priority scheduling",
        "request abort",
        "sleep and wake",
        "weight reload",
        "sliding-window attention",
        "fp8 KV cache",
        "KV connectors",
        "encoder-cache connectors",
    ),
    "Requests": (
        "seeds",
        "temperature, top-p, top-k",
        "min-p",
        "n > 1",
        "beam search",
        "penalties",
        "bad words",
        "logit bias",
        "stop strings",
        "stop token ids",
        "min and max tokens",
        "logprobs",
        "prompt logprobs",
        "logprobs of chosen tokens",
        "custom logits processors",
        "thinking budgets",
        "watermarks",
        "structured output: JSON schema",
        "structured output: regex",
        "structured output: grammar",
        "tool calls",
        "prompt embeds",
        "options of a request",
    ),
    "Serving": (
        "streaming",
        "streaming input",
        "chat",
        "metrics",
        "live page",
        "metrics of a request",
        "several API processes",
        "asynchronous scheduling",
        "torch.compile",
        "tensor parallel",
        "data parallel",
        "pipeline parallel",
        "context parallel",
        "expert parallel",
        "ranks that schedule themselves (external launcher)",
        "n-gram drafts beside the exits'",
        "exits before the first layer, heads with memory",
        "drafting that adapts to its speed",
        "drafts bounded by what they cost",
        "other speculative methods",
    ),
    "Models": (
        "Llama",
        "Mistral",
        "Qwen2",
        "Qwen3",
        "Phi-3",
        "Gemma",
        "Gemma 2",
        "Gemma 3",
        "Cohere",
        "Cohere 2",
        "GLM-4",
        "Nemotron",
        "Mixtral (mixture of experts)",
        "Qwen2-MoE (mixture of experts)",
        "Qwen3-MoE (mixture of experts)",
        "OLMoE (mixture of experts)",
        "tied embeddings",
        "quantized: W8A8 int8",
        "quantized: AWQ",
        "quantized: GPTQ",
        "LoRA",
        "multimodal models",
        "encoder-decoder models",
        "hybrid and state-space models",
        "pooling models",
    ),
}

_HEAD = """\
# Every feature

What becomes of vLLM's features with `--plugin adadecode`. This page is generated from
the tests (`python -m tests.feature_matrix --write`), and a test keeps the two in step.
Each row names the tests that prove it.

- *supported*: greedy output equals plain vLLM's token for token in float32, in a run
  where early predictions were both accepted and rejected. Sampled text is drawn from
  the same distribution.
- *refused*: with a sentence that names the flag or option, the reason and a remedy, at
  start-up or, where the row says so, for the request.
- *not applicable*: vLLM itself does not do it, on this device or with any speculative
  method.

Tests marked (GPU) need a CUDA device; [GPU](gpu.md) says which have been run on one.
"""


@dataclass(frozen=True)
class Claim:
    """What one test says of one feature."""

    feature: str
    status: str
    note: str
    test: str


COLLECTED: pytest.StashKey[set[Claim]] = pytest.StashKey()
"""Where a run of pytest keeps what its tests say."""


class Collector:
    """A plugin of pytest that reads the markers of all collected tests."""

    def __init__(self) -> None:
        self.claims: set[Claim] = set()

    def pytest_configure(self, config: pytest.Config) -> None:
        """Leave them where the run's own test finds them."""
        config.stash[COLLECTED] = self.claims

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Read one test's markers, before any is deselected."""
        test = item.nodeid.split("[")[0]
        if item.get_closest_marker("gpu"):
            test += " (GPU)"
        for marker in item.iter_markers("feature"):
            feature, status, *note = marker.args
            self.claims.add(Claim(feature, status, " ".join(note), test))


def document(claims: Iterable[Claim]) -> str:
    """Write the document.

    Raises:
        ValueError: If a marker is wrong or a feature has no test.
    """
    rows: dict[str, dict[tuple[str, str], list[str]]] = {
        name: {} for names in SECTIONS.values() for name in names
    }
    for claim in sorted(claims, key=lambda claim: claim.test):
        if claim.feature not in rows or claim.status not in STATUSES:
            raise ValueError(f"{claim.test}: unknown feature or status: {claim}")
        tests = rows[claim.feature].setdefault((claim.status, claim.note), [])
        tests.append(claim.test)
    if untested := [name for name, found in rows.items() if not found]:
        raise ValueError(f"no test is marked for: {', '.join(untested)}")
    text = _HEAD
    for section, names in SECTIONS.items():
        text += f"\n## {section}\n\n| feature | | tests |\n|---|---|---|\n"
        for name in names:
            ordered = sorted(rows[name], key=lambda key: (STATUSES.index(key[0]), key))
            for status, note in ordered:
                word = f"{status}: {note}" if note else status
                tests = "<br>".join(map(_link, rows[name][status, note]))
                text += f"| {name} | {word} | {tests} |\n"
    return text


def _link(test: str) -> str:
    path, name = test.split("::", 1)
    return f"[{path.removeprefix('tests/')}](../{path}): {name.replace('::', '.')}"


def collect() -> set[Claim]:
    """Collect all tests and read their markers."""
    collector = Collector()
    arguments = [str(ROOT / "tests"), "--collect-only", "-qq", f"--rootdir={ROOT}"]
    with redirect_stdout(sys.stderr):
        code = pytest.main(arguments, plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise SystemExit(int(code))
    return collector.claims


def main() -> None:
    """Write the document, or say that it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    wanted = document(collect())
    if parser.parse_args().write:
        DOCUMENT.write_text(wanted, encoding="utf-8")
    elif not DOCUMENT.exists() or DOCUMENT.read_text(encoding="utf-8") != wanted:
        sys.exit(
            "docs/features.md is not what the tests say. Run "
            "`python -m tests.feature_matrix --write`."
        )


if __name__ == "__main__":
    main()
