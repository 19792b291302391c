# SPDX-License-Identifier: Apache-2.0
"""Flags and settings that start-up refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import (
    CompilationMode,
    ECTransferConfig,
    KVTransferConfig,
    OffloadConfig,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from adadecode_vllm.config import parse_config
from adadecode_vllm.engine import refusals, suffix
from adadecode_vllm.errors import AdaDecodeError
from tests.start_up import create, refusal


@pytest.mark.parametrize(
    ("arguments", "flag", "reason", "remedy"),
    [
        pytest.param(
            {"pipeline_parallel_size": 2},
            "--pipeline-parallel-size 2",
            "in one process",
            "Use --tensor-parallel-size instead",
            marks=pytest.mark.feature("pipeline parallel", "refused"),
        ),
        pytest.param(
            {"enable_lora": True},
            "--enable-lora",
            "an adapter changes them",
            "Merge the adapter",
            marks=pytest.mark.feature("LoRA", "refused"),
        ),
        pytest.param(
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "--speculative-config",
            "one at a time",
            "Remove --speculative-config",
            marks=pytest.mark.feature("other speculative methods", "refused"),
        ),
        pytest.param(
            {"enable_expert_parallel": True},
            "--enable-expert-parallel",
            "has not been tested with steps that run a part of the layers",
            "Use --tensor-parallel-size",
            marks=pytest.mark.feature("expert parallel", "refused"),
        ),
        pytest.param(
            {"enable_expert_parallel": True, "enable_eplb": True},
            "--enable-eplb",
            "on one forward in every engine step",
            "Remove --enable-eplb",
            marks=pytest.mark.feature("expert parallel", "refused"),
        ),
        (
            {"enable_return_routed_experts": True},
            "--enable-return-routed-experts",
            "pending tokens pass their layers in several",
            "Remove --enable-return-routed-experts",
        ),
        (
            {"aux_output_config": {"enable_return_routed_experts": True}},
            "--aux-output-config",
            "pending tokens pass their layers in several",
            "Remove --aux-output-config",
        ),
        (
            {"spec_method": "ngram", "spec_tokens": 2},
            "--spec-method ngram",
            "one at a time",
            "Remove --spec-method",
        ),
        (
            {"spec_model": "some/draft"},
            "--spec-model some/draft",
            "one at a time",
            "Remove --spec-model",
        ),
        (
            {"spec_tokens": 2},
            "--spec-tokens 2",
            "one at a time",
            "Remove --spec-tokens",
        ),
        (
            {"scheduler_cls": "some.Scheduler"},
            "--scheduler-cls some.Scheduler",
            "its own scheduler",
            "Remove --scheduler-cls",
        ),
        (
            {"worker_cls": "some.Worker"},
            "--worker-cls some.Worker",
            "its own worker",
            "Remove --worker-cls",
        ),
        (
            {"async_scheduling": True},
            "--async-scheduling",
            "only after its early predictions are known",
            "Remove --async-scheduling",
        ),
        pytest.param(
            {"watermark_config": {"key": 1}},
            "--watermark-config",
            "early predictions are not sampled",
            "Remove --watermark-config, or start without --plugin adadecode",
            marks=pytest.mark.feature("watermarks", "refused"),
        ),
        pytest.param(
            {"kv_offloading_size": 1.0},
            "--kv-offloading-size 1.0",
            "KV of layers that have not run yet",
            "Remove --kv-offloading-size, or start without --plugin adadecode",
            marks=pytest.mark.feature("KV connectors", "refused"),
        ),
        pytest.param(
            {"runner": "pooling"},
            "--runner pooling",
            "only text generation decodes tokens",
            "Start without --plugin adadecode",
            marks=pytest.mark.feature("pooling models", "refused"),
        ),
        (
            {"offload_group_size": 2},
            "--offload-group-size 2",
            "each layer loads the weights of one behind it",
            "Remove it, or use --cpu-offload-gb",
        ),
        (
            {"model_impl": "transformers"},
            "--model-impl transformers",
            "vLLM's own implementation",
            "Remove --model-impl",
        ),
    ],
)
def test_refused_arguments(
    model: Path,
    heads: Path,
    arguments: dict[str, Any],
    flag: str,
    reason: str,
    remedy: str,
) -> None:
    message = refusal(model, heads, **arguments)
    assert message.startswith(flag)
    before, after = message.split(": not with AdaDecode, because ")
    assert before.startswith(flag)
    assert reason in after
    assert f". {remedy}" in after
    assert message.endswith(".")


def test_model_runner_v2(
    model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs Triton, which has no CPU backend here."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(AdaDecodeError, match=r"^VLLM_USE_V2_MODEL_RUNNER=1: .* Triton"):
        create(model, heads)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert not create(model, heads).use_v2_model_runner


def test_model_runner_v1_on_cuda(
    model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(AdaDecodeError, match=r"^VLLM_USE_V2_MODEL_RUNNER=0: not with"):
        refusals.check_arguments(EngineArgs(model=str(model)))
    # Another setting that V2 cannot run makes vLLM fall back to V1.
    v1: Any = SimpleNamespace(use_v2_model_runner=False)
    with pytest.raises(AdaDecodeError, match=r"^the model runner: not with AdaDecode"):
        refusals._check_features(v1)


@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_tensor_parallelism_is_for_both_executors(
    model: Path, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA; vLLM itself refuses Ray on CPUs."""
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    arguments = EngineArgs(
        model=str(model),
        tensor_parallel_size=2,
        distributed_executor_backend=executor,
    )
    refusals.check_arguments(arguments)
    ones = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    config: Any = SimpleNamespace(
        use_v2_model_runner=True,
        compilation_config=SimpleNamespace(mode=CompilationMode.VLLM_COMPILE),
        parallel_config=SimpleNamespace(**ones),
        kv_transfer_config=None,
        ec_transfer_config=None,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        offload_config=OffloadConfig(),
    )
    refusals._check_features(config)


def test_suffix_trees_that_are_not_installed(
    model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suffix, "is_installed", lambda: False)
    with pytest.raises(AdaDecodeError) as caught:
        create(model, heads, {"lookup": "suffix"})
    assert str(caught.value) == (
        '--adadecode-config: "lookup": "suffix" needs the package arctic-inference, '
        "which is not installed. Install it as docs/tune.md says, or leave the option "
        "out."
    )


@pytest.mark.feature(
    "ranks that schedule themselves (external launcher)",
    "refused",
    "with the cost policy; thresholds work",
)
def test_ranks_with_clocks_of_their_own(
    model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    launched: dict[str, Any] = {
        "distributed_executor_backend": "external_launcher",
        "tensor_parallel_size": 2,
    }
    with pytest.raises(AdaDecodeError) as caught:
        create(model, heads, **launched)
    assert str(caught.value) == (
        "--distributed-executor-backend external_launcher with 2 ranks: not with "
        "AdaDecode, because each rank schedules by itself, and would time its own "
        'steps to decide what to draft. Set "policy": "threshold" in '
        "--adadecode-config."
    )
    create(model, heads, {"policy": "threshold"}, **launched)
    create(model, heads, **{**launched, "tensor_parallel_size": 1})


def test_stock_torch_compile(model: Path, heads: Path) -> None:
    with pytest.raises(AdaDecodeError, match=r"^--compilation-config mode 1: not with"):
        create(model, heads, compilation_config={"mode": 1}, enforce_eager=False)


def test_other_devices(
    model: Path, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = create(model, heads)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(AdaDecodeError, match="on CPUs and CUDA devices, not on"):
        refusals.check_engine(config, parse_config({"heads": str(heads)}))


@pytest.mark.feature("context parallel", "refused")
@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("decode_context_parallel_size", "--decode-context-parallel-size 2"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size 2"),
    ],
)
def test_context_parallelism(name: str, flag: str) -> None:
    sizes = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    config: Any = SimpleNamespace(
        use_v2_model_runner=False,
        compilation_config=SimpleNamespace(mode=CompilationMode.NONE),
        parallel_config=SimpleNamespace(**sizes | {name: 2}),
    )
    with pytest.raises(AdaDecodeError, match=f"^{flag}: not with AdaDecode"):
        refusals._check_features(config)


@pytest.mark.feature("KV connectors", "refused")
def test_kv_connectors(model: Path, heads: Path) -> None:
    message = refusal(
        model,
        heads,
        kv_transfer_config=KVTransferConfig(
            kv_connector="ExampleConnector", kv_role="kv_both"
        ),
    )
    assert message.startswith(
        "--kv-transfer-config: not with AdaDecode, because a connector would save KV "
    )


@pytest.mark.feature("encoder-cache connectors", "refused")
def test_encoder_cache_connectors(model: Path, heads: Path) -> None:
    message = refusal(
        model,
        heads,
        ec_transfer_config=ECTransferConfig(
            ec_connector="ECExampleConnector", ec_role="ec_both"
        ),
    )
    assert message.startswith(
        "--ec-transfer-config: not with AdaDecode, because an encoder cache belongs to "
        "a multimodal model"
    )


def test_checkpoints_of_speculators() -> None:
    """vLLM takes their method in place of ours, and MODEL is then their model."""
    config: Any = SimpleNamespace(
        speculative_config=SimpleNamespace(method="eagle3", model="some/speculator"),
        model_config=SimpleNamespace(model="some/model"),
    )
    with pytest.raises(AdaDecodeError) as caught:
        refusals._check_speculator(config)
    assert str(caught.value) == (
        "--model some/speculator: not with AdaDecode, because it is a checkpoint of "
        "the speculative method eagle3, and vLLM runs one at a time. Name the model "
        "itself, some/model, or start without --plugin adadecode."
    )


def test_fast_prefill(model: Path, heads: Path) -> None:
    message = refusal(model, heads, kv_sharing_fast_prefill=True)
    assert message.startswith("--kv-sharing-fast-prefill: not with AdaDecode")
