# SPDX-License-Identifier: Apache-2.0
"""What cannot work with early predictions, refused at start-up.

Every message names the flag, the reason and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adadecode_vllm.config import CONFIG_KEY, AdaDecodeConfig
from adadecode_vllm.engine.additional_config import AdditionalConfig
from adadecode_vllm.engine.arguments import expects_v2
from adadecode_vllm.engine.families import SUPPORTED_ARCHITECTURES
from adadecode_vllm.errors import AdaDecodeError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from adadecode_vllm.heads import Heads

_CONNECTOR = "a connector would save KV of layers that have not run yet"


def check_arguments(args: EngineArgs) -> None:
    """Refuse engine arguments that conflict, before vLLM acts on them.

    Args:
        args: The user's arguments.

    Raises:
        AdaDecodeError: On the first conflict.
    """
    if args.pipeline_parallel_size > 1:
        raise _refusal(
            f"--pipeline-parallel-size {args.pipeline_parallel_size}",
            "early predictions need the embedding, every layer and the LM head in one "
            "process",
            "Use --tensor-parallel-size instead",
        )
    if args.enable_lora:
        raise _refusal(
            "--enable-lora",
            "exit heads are trained for one set of weights and an adapter changes them",
            "Merge the adapter into the model and train heads for the result",
        )
    speculative = {
        "--speculative-config": args.speculative_config,
        "--spec-method": args.spec_method,
        "--spec-model": args.spec_model,
        "--spec-tokens": args.spec_tokens,
    }
    for flag, value in speculative.items():
        if value is not None:
            raise _refusal(
                f"{flag} {value}",
                "AdaDecode is itself a speculative method and vLLM runs one at a time",
                f"Remove {flag}, or remove --plugin adadecode",
            )
    if args.worker_cls != "auto":
        raise _refusal(
            f"--worker-cls {args.worker_cls}",
            "AdaDecode brings its own worker",
            "Remove --worker-cls",
        )
    if args.scheduler_cls is not None:
        raise _refusal(
            f"--scheduler-cls {args.scheduler_cls}",
            "AdaDecode brings its own scheduler",
            "Remove --scheduler-cls",
        )
    if args.watermark_config is not None:
        raise _refusal(
            "--watermark-config",
            "vLLM watermarks drafts while a draft model samples them, and early "
            "predictions are not sampled",
            "Remove --watermark-config, or start without --plugin adadecode",
        )
    if args.kv_offloading_size is not None:
        raise _refusal(
            f"--kv-offloading-size {args.kv_offloading_size}",
            _CONNECTOR,
            "Remove --kv-offloading-size, or start without --plugin adadecode",
        )
    _check_experts(args)
    _check_runner(args)


def _check_experts(args: EngineArgs) -> None:
    if args.enable_eplb:
        raise _refusal(
            "--enable-eplb",
            "moving experts counts on one forward in every engine step, and early "
            "predictions run further ones",
            "Remove --enable-eplb",
        )
    if args.enable_expert_parallel:
        raise _refusal(
            "--enable-expert-parallel",
            "it has not been tested with steps that run a part of the layers",
            "Use --tensor-parallel-size, which splits every expert",
        )
    # The second is what vLLM reads; it copies the first there, and never back.
    for flag, given in (
        ("--enable-return-routed-experts", args.enable_return_routed_experts),
        ("--aux-output-config", args.aux_output_config.enable_return_routed_experts),
    ):
        if given:
            raise _refusal(
                flag,
                "a token's experts are collected in one forward, and pending tokens "
                "pass their layers in several",
                f"Remove {flag}",
            )


def _check_runner(args: EngineArgs) -> None:
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    requested = envs.VLLM_USE_V2_MODEL_RUNNER
    if current_platform.is_cuda() and requested is False:
        raise _refusal(
            "VLLM_USE_V2_MODEL_RUNNER=0",
            "on CUDA it works in Model Runner V2, vLLM's default there",
            "Unset the variable",
        )
    # vLLM would refuse it itself, with another remedy.
    if requested and not HAS_TRITON:
        raise _refusal(
            "VLLM_USE_V2_MODEL_RUNNER=1",
            "Model Runner V2 needs Triton, which has no backend for this machine",
            "Unset the variable",
        )
    if args.async_scheduling and not expects_v2():
        raise _refusal(
            "--async-scheduling",
            "Model Runner V1 schedules the next step only after its early predictions "
            "are known",
            "Remove --async-scheduling",
        )


def check_engine(
    vllm_config: VllmConfig, config: AdaDecodeConfig, heads: Heads | None = None
) -> None:
    """Refuse models, features and heads that do not fit, with all of it known.

    Resolves the exits and the heads' name and writes them into ``additional_config``,
    which goes to all workers: the name says the same on every machine. The segments
    are part of the compile cache's key, see :class:`AdditionalConfig`.

    Args:
        vllm_config: The engine's configuration.
        config: The user's options.
        heads: Those that the options name, where they were found before.

    Raises:
        AdaDecodeError: On the first thing that does not fit.
    """
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise _refusal(
            "--plugin adadecode",
            "this version predicts early on CPUs and CUDA devices, not on "
            f"{current_platform.device_name}",
            "Start without --plugin adadecode on this machine",
        )
    _check_speculator(vllm_config)
    _check_model(vllm_config.model_config)
    _check_features(vllm_config)
    _check_mixture_of_experts(vllm_config)
    _check_ranks(vllm_config.parallel_config, config)
    from adadecode_vllm.engine.heads_fit import (
        check_heads_fit,
        resolve_draft_vocabulary,
        resolve_exit_layers,
    )
    from adadecode_vllm.engine.suffix import is_installed
    from adadecode_vllm.heads import Heads

    if config.lookup == "suffix" and not is_installed():
        raise AdaDecodeError(
            '--adadecode-config: "lookup": "suffix" needs the package '
            "arctic-inference, which is not installed. Install it as docs/tune.md "
            "says, or leave the option out."
        )
    heads = heads or Heads.find(config.heads)
    heads.check()
    model = vllm_config.model_config
    check_heads_fit(heads, model.hf_text_config, model.model)
    # Refuses heads that the option `gate` cannot use.
    heads.config.thresholds(config.gate, config.threshold)
    # Refuses more tokens than are ranked. By default the loaded LM head has a say.
    resolve_draft_vocabulary(config, heads.config)
    resolved = config.model_copy(
        update={
            "heads": heads.pinned,
            "exit_layers": resolve_exit_layers(config, heads.config),
        }
    )
    additional_config = vllm_config.additional_config
    assert isinstance(additional_config, Mapping), "the options came from it"
    vllm_config.additional_config = AdditionalConfig(
        {**additional_config, CONFIG_KEY: resolved.model_dump(mode="json")}
    )


def _check_speculator(vllm_config: VllmConfig) -> None:
    """MODEL may be a speculator's checkpoint, which names its model and its method."""
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "custom_class":
        raise _refusal(
            f"--model {speculative.model}",
            f"it is a checkpoint of the speculative method {speculative.method}, and "
            "vLLM runs one at a time",
            f"Name the model itself, {vllm_config.model_config.model}, or start "
            "without --plugin adadecode",
        )


def _check_model(model: ModelConfig) -> None:
    if model.runner_type != "generate":
        raise _refusal(
            f"--runner {model.runner_type}",
            "only text generation decodes tokens",
            "Start without --plugin adadecode",
        )
    if model.is_encoder_decoder:
        raise _unsupported(model, "it is an encoder-decoder model")
    if model.is_multimodal_model:
        raise _unsupported(model, "it is a multimodal model")
    if model.is_hybrid or model.has_inner_state or model.is_attention_free:
        raise _unsupported(
            model,
            "it has recurrent (Mamba or linear attention) layers, whose state cannot "
            "be taken back after a rejected prediction",
        )
    if not SUPPORTED_ARCHITECTURES.intersection(model.architectures):
        raise _unsupported(
            model,
            "its layers are not known to have the form (positions, hidden_states, "
            "residual)",
        )
    if model.model_impl == "transformers":
        raise _refusal(
            "--model-impl transformers",
            "early exits need the layers of vLLM's own implementation",
            "Remove --model-impl",
        )


def _check_features(vllm_config: VllmConfig) -> None:
    from vllm.config import CompilationMode

    if vllm_config.use_v2_model_runner != expects_v2():
        raise _refusal(
            "the model runner",
            "it works in Model Runner V2 on this device and another setting makes vLLM "
            "fall back to V1 (vLLM's log names it)",
            "Remove that setting",
        )
    if vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        raise _refusal(
            "--compilation-config mode 1",
            "torch.compile would take in the step that resumes pending tokens",
            "Remove it, or use mode 3, vLLM's default",
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name) > 1:
            raise _refusal(
                f"--{name.replace('_', '-')} {getattr(parallel, name)}",
                "pending tokens are resumed on the rank that holds their KV",
                "Use --tensor-parallel-size instead",
            )
    if vllm_config.kv_transfer_config is not None:
        raise _refusal(
            "--kv-transfer-config",
            _CONNECTOR,
            "Remove it, or start without --plugin adadecode",
        )
    if vllm_config.ec_transfer_config is not None:
        raise _refusal(
            "--ec-transfer-config",
            "an encoder cache belongs to a multimodal model, and those are not served",
            "Remove it, or start without --plugin adadecode",
        )
    offload = vllm_config.offload_config
    groups = offload.prefetch.offload_group_size
    if groups and offload.offload_backend in ("auto", "prefetch"):
        raise _refusal(
            f"--offload-group-size {groups}",
            "each layer loads the weights of one behind it, and early predictions run "
            "a part of the layers again",
            "Remove it, or use --cpu-offload-gb, which loads a layer's own",
        )
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise _refusal(
            "--kv-sharing-fast-prefill",
            "it skips layers of prompt tokens on its own terms",
            "Remove it",
        )


def _check_mixture_of_experts(vllm_config: VllmConfig) -> None:
    if not vllm_config.model_config.is_moe:
        return
    ranks = vllm_config.parallel_config.data_parallel_size
    if ranks > 1:
        raise _refusal(
            f"--data-parallel-size {ranks} with a mixture of experts",
            "its ranks run every forward together, and each predicts early on its own",
            "Start engines of their own behind a load balancer, or use "
            "--tensor-parallel-size",
        )
    if vllm_config.compilation_config.fast_moe_cold_start:
        raise _refusal(
            "--compilation-config fast_moe_cold_start",
            "it finds a layer's experts by counting the layers of a whole forward, and "
            "early predictions run a part of them",
            "Remove it",
        )


def _check_ranks(parallel: ParallelConfig, config: AdaDecodeConfig) -> None:
    launcher = parallel.distributed_executor_backend == "external_launcher"
    if launcher and parallel.world_size > 1 and config.policy == "cost":
        raise _refusal(
            f"--distributed-executor-backend external_launcher with "
            f"{parallel.world_size} ranks",
            "each rank schedules by itself, and would time its own steps to decide "
            "what to draft",
            'Set "policy": "threshold" in --adadecode-config',
        )


def _unsupported(model: ModelConfig, reason: str) -> AdaDecodeError:
    return _refusal(
        f"--model {model.model} ({', '.join(model.architectures)})",
        reason,
        f"Serve one of {', '.join(sorted(SUPPORTED_ARCHITECTURES))}, or start without "
        "--plugin adadecode",
    )


def _refusal(flag: str, reason: str, remedy: str) -> AdaDecodeError:
    return AdaDecodeError(f"{flag}: not with AdaDecode, because {reason}. {remedy}.")
