# SPDX-License-Identifier: Apache-2.0
"""Engines on the demo model, for tests and their fixtures."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "demo"
MODEL = str(DEMO / "model")
HEADS = str(DEMO / "heads")
MAX_MODEL_LEN = 256
OUTPUT_TOKENS = 40

Reference = dict[str, list[list[int]]]
"""Plain vLLM's token ids, by kind and prompt."""


def demo_corpus() -> ModuleType:
    """The demo's module with held-out prompts; a script's neighbour, not a package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEMO))
        return importlib.import_module("corpus")


@contextmanager
def start_engine(
    model: str = MODEL, *, multiprocessing: bool = False, **options: Any
) -> Iterator[Any]:
    """An engine with the tests' defaults, shut down afterwards.

    By default it runs in this process, so that tests can reach into it.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.tokenizers.registry import cached_get_tokenizer

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": MAX_MODEL_LEN,
        "block_size": 32,
        "kv_cache_memory_bytes": 64 << 20,
        "max_num_seqs": 16,
        "disable_log_stats": False,
    }
    with _modules_are_no_garbage():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(multiprocessing)))
            llm = LLM(model, **{**defaults, **options})
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            # An engine with prompt embeds adds a token to the tokenizer it shares.
            cached_get_tokenizer.cache_clear()
            cleanup_dist_env_and_memory()  # collects garbage


@contextmanager
def _modules_are_no_garbage() -> Iterator[None]:
    """Spare the collector the objects of the modules.

    vLLM collects garbage eight times for an engine, which takes longer than all else of
    a small one, where it is to look through everything that was ever imported.
    """
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        # An engine's own objects stay in sight, so that its end collects them.
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


def adadecode_options(heads: str = HEADS, **options: Any) -> dict[str, Any]:
    from adadecode_vllm import engine_args

    return engine_args(heads, **options)


def make_memory_heads(directory: Path) -> Path:
    """Heads with memory: the demo's T, one for the embedding, and made-up U.

    The U are large enough to change predictions.
    """
    import torch

    from adadecode_vllm.heads import load_heads_config, load_tensors, save_heads

    trained = load_heads_config(HEADS)
    weights = load_tensors(HEADS, trained).weights
    generator = torch.Generator().manual_seed(0)
    size = trained.hidden_size

    def noise(scale: float) -> torch.Tensor:
        return torch.randn(size, size, generator=generator) * scale / size**0.5

    weights[0] = torch.eye(size) + noise(0.3)
    layers = sorted(weights)
    save_heads(
        directory,
        {layer: weight.float() for layer, weight in weights.items()},
        trained.model_copy(
            update={
                "exit_layers": layers,
                "calibration": None,
                "draft_vocabulary": None,
                "dtype": "float32",
            }
        ),
        memory={layer: noise(0.7) for layer in layers},
    )
    return directory


def generate(
    llm: Any, prompts: list[Any], max_tokens: int | None = OUTPUT_TOKENS, **options: Any
) -> list[list[int]]:
    """Greedy token ids of one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, **options)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def baseline_texts(prompts: list[str], max_tokens: int) -> list[str]:
    """Greedy texts of plain vLLM."""
    from vllm import SamplingParams

    with start_engine() as llm:
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]


def set_policy(llm: Any, threshold: float, max_early_predictions: int) -> None:
    """Give a running engine another threshold and a cap up to its own; reset stats."""
    configure(llm, threshold=threshold, max_early_predictions=max_early_predictions)


def configure(llm: Any, **options: Any) -> None:
    """Change the policy of a running engine; reset stats."""
    llm.collective_rpc("adadecode_configure", kwargs=options)
    llm.collective_rpc("adadecode_stats", kwargs={"reset": True})


def stats(llm: Any) -> dict[str, Any]:
    return llm.collective_rpc("adadecode_stats")[0]


def metric(llm: Any, name: str) -> float:
    """The sum of a counter of vLLM's own metrics."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def drafts_of_requests(llm: Any, prompts: list[Any]) -> list[list[int]]:
    """Drafts of each step of each request, from vLLM's metrics of requests.

    The engine was started with ``per_request_spec_decode_metrics="detailed"``.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    found = [output.outputs[0].spec_decode_metrics for output in outputs]
    assert all(
        sum(metrics.per_step_drafted) == metrics.num_draft_tokens for metrics in found
    )
    return [metrics.per_step_drafted for metrics in found]
