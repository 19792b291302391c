# SPDX-License-Identifier: Apache-2.0
"""What this package relies on in vLLM, so that another version says what moved.

Three kinds of reliance: names that are imported, methods that are overridden, and
internals that are called or read. docs/upgrading.md tells what to do when one fails.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.utils.import_utils import resolve_obj_by_qualname

from adadecode_vllm.engine.segments import SHARED_LOOPS, runs_shared_loop

ROOT = Path(__file__).parents[2]


def _imports() -> Iterator[tuple[str, str, str]]:
    """File, module and name of everything imported from vLLM, also within functions."""
    for directory in ("adadecode_vllm", "patches"):
        for path in sorted((ROOT / directory).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module:
                    if node.module.split(".")[0] != "vllm":
                        continue
                    for alias in node.names:
                        yield str(path.relative_to(ROOT)), node.module, alias.name


IMPORTS = sorted(set(_imports()))


@pytest.mark.parametrize(
    ("module", "name", "files"),
    [
        (module, name, [file for file, *rest in IMPORTS if rest == [module, name]])
        for module, name in sorted({(module, name) for _, module, name in IMPORTS})
    ],
)
def test_imported_names_exist(module: str, name: str, files: list[str]) -> None:
    found = importlib.import_module(module)
    if not hasattr(found, name):
        importlib.import_module(f"{module}.{name}")  # a submodule, or the error
    assert files


OVERRIDES = {
    ("adadecode_vllm.engine.runner_v1.AdaDecodeCPUModelRunner", "vllm.v1.worker."): [
        "initialize_kv_cache",
        "warming_up_model",
        "_sample",
        "reload_weights",
        "execute_model",
        "sample_tokens",
        "_model_forward",
        "propose_draft_token_ids",
    ],
    ("adadecode_vllm.engine.runner_v2.AdaDecodeModelRunner", "vllm.v1.worker."): [
        "load_model",
        "initialize_kv_cache",
        "execute_model",
        "add_requests",
        "prepare_inputs",
        "sample_tokens",
        "take_draft_token_ids",
        "reload_weights",
    ],
    ("adadecode_vllm.engine.speculator.AdaDecodeSpeculator", "vllm.v1.worker."): [
        "init_cudagraph_manager",
        "capture",
        "propose",
    ],
    ("adadecode_vllm.engine.worker_cpu.AdaDecodeCPUWorker", "vllm.v1.worker."): [
        "init_device",
        "update_weights",
        "finish_weight_update",
        "reset_weights",
        "sleep",
        "wake_up",
    ],
    ("adadecode_vllm.engine.scheduler.AdaDecodeScheduler", "vllm.v1.core."): [
        "schedule",
        "_update_after_schedule",
        "update_from_output",
        "make_stats",
        "_free_request",
    ],
    ("adadecode_vllm.engine.metric_loggers.AdaDecodeProm", "vllm.distributed."): [
        "observe"
    ],
    ("adadecode_vllm.engine.metric_loggers.AdaDecodeLogging", "vllm.distributed."): [
        "reset",
        "observe",
        "log",
    ],
    ("adadecode_vllm.engine.scheduler.AdaDecodeAsyncScheduler", "vllm.v1.core."): [
        "update_from_output",
        "make_spec_decoding_stats",
    ],
}


@pytest.mark.parametrize(
    ("ours", "prefix", "name"),
    [(*key, name) for key, names in OVERRIDES.items() for name in names],
)
def test_overridden_methods_exist(ours: str, prefix: str, name: str) -> None:
    """A method that vLLM renamed would never be called again."""
    cls = resolve_obj_by_qualname(ours)
    bases = [
        base
        for base in cls.__mro__
        if base.__module__.startswith(prefix) and name in vars(base)
    ]
    assert bases, f"{ours}.{name} overrides nothing: vLLM renamed or removed it"
    theirs = inspect.signature(vars(bases[0])[name]).parameters
    for parameter in inspect.signature(getattr(cls, name)).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        assert parameter.name in theirs, f"{name}() of vLLM has no {parameter.name!r}"


def test_every_way_to_change_weights_is_known() -> None:
    """What is new here may change an LM head that the exit scorer keeps rows of."""
    cls = resolve_obj_by_qualname("vllm.v1.worker.gpu_worker.Worker")
    found = {name for name in dir(cls) if "weight" in name}
    assert found == {
        "_check_weight_transfer_engine",
        "_set_draft_weight_update_target",
        "_start_weight_update",
        "_weight_checksum_prefix",
        "compute_weight_checksums",
        "finish_weight_update",  # ours follows
        "init_weight_transfer_engine",
        "reload_weights",  # the runner's, ours follows
        "reset_weights",  # ours follows
        "shutdown_weight_transfer_engine",
        "start_draft_weight_update",
        "start_weight_update",
        "supports_draft_weight_updates",
        "update_weights",  # ends with finish_weight_update
    }


def test_propose_takes_what_the_runner_gives() -> None:
    from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

    from adadecode_vllm.engine.speculator import AdaDecodeSpeculator

    theirs = list(inspect.signature(BaseSpeculator.propose).parameters)
    assert list(inspect.signature(AdaDecodeSpeculator.propose).parameters) == theirs


# Callables and the arguments that are given to them by name.
CALLS = {
    "vllm.forward_context.set_forward_context": (
        "num_tokens cudagraph_runtime_mode batch_descriptor slot_mapping"
    ),
    "vllm.forward_context.BatchDescriptor": "num_tokens",
    "vllm.v1.worker.gpu.attn_utils.build_attn_metadata": (
        "attn_groups num_reqs num_tokens query_start_loc_gpu query_start_loc_cpu "
        "max_query_len seq_lens max_seq_len block_tables slot_mappings kv_cache_config "
        "seq_lens_cpu_upper_bound positions is_prefilling for_cudagraph_capture"
    ),
    "vllm.v1.worker.gpu.attn_utils.build_slot_mappings_by_layer": (
        "slot_mappings kv_cache_config"
    ),
    "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.__init__": (
        "vllm_config device cudagraph_mode decode_query_len varlen_decode"
    ),
    "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.dispatch": (
        "num_reqs num_tokens uniform_token_count num_active_loras max_query_len"
    ),
    "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.capture": (
        "create_forward_fn progress_bar_desc"
    ),
    "vllm.v1.worker.gpu.cudagraph_utils.BatchExecutionDescriptor": (
        "cg_mode num_tokens num_reqs max_query_len"
    ),
    "vllm.v1.worker.gpu.attn_utils.get_varlen_cudagraph_unsupported_backend": (
        "attn_groups vllm_config max_query_len"
    ),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.prepare_inputs": (
        "scheduler_output batch_req_state batch_desc num_active_loras"
    ),
    "vllm.v1.worker.gpu.spec_decode.init_speculator": "vllm_config device req_states",
    "vllm.v1.attention.backend.CommonAttentionMetadata": (
        "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound "
        "num_reqs num_actual_tokens max_query_len max_seq_len block_table_tensor "
        "slot_mapping causal positions"
    ),
    "vllm.v1.worker.utils.AttentionGroup.build_metadata": "common_attn_metadata",
    "vllm.v1.worker.utils.AttentionGroup.map_to_kernel_block_table": "block_table",
    "vllm.v1.worker.utils.AttentionGroup.update_draft_decode_metadata": "attn_metadata",
    "vllm.utils.torch_utils.async_tensor_h2d": "data device out",
    "vllm.compilation.decorators.support_torch_compile": "dynamic_arg_dims",
    "vllm.v1.outputs.DraftTokenIds": "req_ids draft_token_ids",
}


@pytest.mark.parametrize(("name", "arguments"), sorted(CALLS.items()))
def test_callables_take_our_arguments(name: str, arguments: str) -> None:
    owner, _, attribute = name.rpartition(".")
    found = (
        getattr(resolve_obj_by_qualname(owner), attribute)
        if owner.split(".")[-1][0].isupper()
        else resolve_obj_by_qualname(name)
    )
    parameters = inspect.signature(found).parameters
    missing = [argument for argument in arguments.split() if argument not in parameters]
    assert not missing, f"{name} takes no {', '.join(missing)}"


FIELDS = {
    "vllm.v1.core.sched.output.SchedulerOutput": (
        "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens "
        "total_num_scheduled_tokens scheduled_spec_decode_tokens finished_req_ids "
        "preempted_req_ids num_invalid_spec_tokens num_spec_tokens_to_schedule"
    ),
    "vllm.v1.core.sched.output.NewRequestData": (
        "req_id sampling_params num_computed_tokens"
    ),
    "vllm.v1.core.sched.output.CachedRequestData": "req_ids resumed_req_ids",
    "vllm.v1.core.sched.output.GrammarOutput": (
        "structured_output_request_ids grammar_bitmask num_acceptable_drafts"
    ),
    "vllm.v1.worker.gpu.input_batch.InputBatch": (
        "req_ids num_reqs idx_mapping idx_mapping_np num_scheduled_tokens num_tokens "
        "num_draft_tokens num_draft_tokens_per_req num_computed_tokens_np "
        "prefill_len_np input_ids positions"
    ),
    "vllm.v1.outputs.ModelRunnerOutput": "req_ids sampled_token_ids",
    "vllm.v1.metrics.stats.SchedulerStats": "ec_connector_stats",
    "vllm.config.ParallelConfig": "_api_process_count data_parallel_size",
    "vllm.engine.arg_utils.EngineArgs": (
        "enable_eplb enable_expert_parallel enable_return_routed_experts "
        "kv_offloading_size watermark_config"
    ),
    "vllm.config.VllmConfig": "ec_transfer_config kv_transfer_config",
    "vllm.config.CompilationConfig": "fast_moe_cold_start",
}


@pytest.mark.parametrize(("name", "fields"), sorted(FIELDS.items()))
def test_data_classes_have_the_fields_we_read(name: str, fields: str) -> None:
    found: Any = resolve_obj_by_qualname(name)
    present = {field.name for field in dataclasses.fields(found)}
    missing = [field for field in fields.split() if field not in present]
    assert not missing, f"{name} has no {', '.join(missing)}"


# Source lines that a decision of ours rests on: the object, the text, and whose it is.
SOURCES = [
    (
        "vllm.v1.core.sched.scheduler.Scheduler.update_from_output",
        "ec_connector_stats=ec_connector_stats",
        "engine/scheduler.py: `make_stats` is called with a step's outcome",
    ),
    (
        "vllm.v1.core.sched.scheduler.Scheduler.finish_requests",
        "self._free_request(request,",
        "engine/scheduler.py: `_free_request` sees the end of every request",
    ),
    (
        "vllm.v1.metrics.loggers.LoggingStatLogger.record",
        "self.ec_connector_logging.observe(ec_connector_stats)",
        "patches/stat_loggers.py: the log's reader of our counters",
    ),
    (
        "vllm.v1.metrics.loggers.PrometheusStatLogger.record",
        "self.ec_connector_prom.observe(scheduler_stats.ec_connector_stats,",
        "patches/stat_loggers.py: Prometheus's reader of our counters",
    ),
    (
        "vllm.v1.worker.worker_base.WorkerWrapperBase.init_worker",
        "current_platform.register_triton_kernel_overrides()",
        "patches/cpu_expand_kernel.py: registered before the worker sets itself up",
    ),
    (
        "vllm.triton_utils.dispatcher.register_kernels",
        "if name in _registry:",
        "patches/cpu_expand_kernel.py: what is registered already is warned of",
    ),
    (
        "vllm.entrypoints.cli.serve.run_multi_api_server",
        "engine_args = vllm.AsyncEngineArgs.from_cli_args(args)",
        "patches/engine_args.py: the options are put into the arguments here",
    ),
    (
        "vllm.entrypoints.cli.serve.run_multi_api_server",
        "args=args, num_servers=num_api_servers,",
        "patches/engine_args.py: API servers are started with the same arguments",
    ),
    (
        "vllm.v1.utils.APIServerProcessManager.__init__",
        "args=(listen_address, sock, args, client_config),",
        "patches/engine_args.py: API servers are started with the same arguments",
    ),
    (
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model",
        "need_eager=is_profile",
        "engine/runner_v2.py: `is_profile` makes vLLM call the model itself",
    ),
    (
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model",
        "self.model(**model_inputs)",
        "engine/runner_v2.py: the resumed forward stands in the model's forward",
    ),
    (
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner.initialize_kv_cache",
        "decode_query_len=self.decode_query_len",
        "engine/runner_v2.py: whole-model graphs hold one token a request",
    ),
    (
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner.sample_tokens",
        "self.req_states.draft_tokens[input_batch.idx_mapping] = draft_tokens",
        "engine/speculator.py: drafts are kept by row",
    ),
    (
        "vllm.v1.worker.gpu.cudagraph_utils.profile_cudagraph_memory",
        "isinstance(value, CudaGraphManager)",
        "engine/segment_graphs.py: graphs of the memory profile are dropped",
    ),
    (
        "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.capture",
        "descs = self._capture_descs[mode]",
        "engine/verification_graphs.py: graphs that are added are captured",
    ),
    (
        "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.dispatch",
        "for desc in self._candidates[key]",
        "engine/verification_graphs.py: graphs are chosen by preference",
    ),
    (
        "vllm.v1.worker.gpu.model_states.default.DefaultModelState.prepare_attn",
        "max_query_len = input_batch.max_query_len",
        "engine/runner_v2.py: the longest a graph was captured for",
    ),
    (
        "vllm.v1.worker.gpu.states.RequestState.__init__",
        "self.last_sampled_tokens",
        "engine/speculator.py: the newest tokens by row",
    ),
    (
        "vllm.v1.worker.gpu.states.RequestState.__init__",
        "self.max_seq_len",
        "engine/speculator.py: what a request may still generate",
    ),
    (
        "vllm.v1.worker.gpu.block_table.BlockTables.__init__",
        "self.num_blocks",
        "engine/speculator.py: blocks that a request owns",
    ),
    (
        "vllm.v1.core.sched.scheduler.Scheduler.schedule",
        "num_lookahead_tokens=self.num_lookahead_tokens",
        "engine/scheduler.py: slots for drafting",
    ),
    (
        "vllm.v1.core.sched.scheduler.Scheduler.schedule",
        "request_queue = self.kv_holding_waiting",
        "engine/scheduler.py: requests that hold KV are admitted first",
    ),
    (
        "vllm.v1.core.sched.scheduler.Scheduler.schedule",
        "num_running = len(self.running) + self.num_waiting_for_streaming_input",
        "engine/scheduler.py: sessions between turns take a place in the batch",
    ),
    (
        "vllm.v1.core.sched.async_scheduler.AsyncScheduler._update_after_schedule",
        "scheduler_output.num_spec_tokens_to_schedule",
        "engine/scheduler.py: no placeholders above a load",
    ),
    (
        "vllm.v1.core.sched.scheduler.Scheduler.update_from_output",
        "num_rejected = num_draft_tokens - num_accepted",
        "engine/placeholder_drafts.py: empty ones count as rejected",
    ),
    (
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner._model_forward",
        "return self.model(",
        "engine/runner_v1.py: the resumed forward",
    ),
    (
        "vllm.config.VllmConfig.compute_hash",
        "additional_config_hash = additional_config.compute_hash()",
        "engine/additional_config.py: asked for the hash of the options",
    ),
    (
        "vllm.v1.worker.startup_plan.compute_plan_fingerprint",
        "vllm_config.compute_hash()",
        "engine/additional_config.py: all options count where plans are kept",
    ),
    (
        "vllm.v1.worker.cpu_worker.CPUWorker.init_device",
        "CPUModelRunner(",
        "patches/cpu_model_runner.py",
    ),
    (
        "vllm.forward_context.create_forward_context",
        "if vllm_config.compilation_config.fast_moe_cold_start:",
        "engine/refusals.py: otherwise an operation finds its experts by name",
    ),
    (
        "vllm.forward_context.set_forward_context",
        "vllm_config.parallel_config.is_moe_model is not False",
        "engine/refusals.py: ranks of dense models run forwards of their own",
    ),
]


@pytest.mark.parametrize(("name", "text", "reliance"), SOURCES)
def test_sources_read_as_we_rely_on(name: str, text: str, reliance: str) -> None:
    owner, _, attribute = name.rpartition(".")
    found = (
        getattr(resolve_obj_by_qualname(owner), attribute)
        if owner.split(".")[-1][0].isupper()
        else resolve_obj_by_qualname(name)
    )
    source = "".join(inspect.getsource(inspect.unwrap(found)).split())
    assert "".join(text.split()) in source, f"{name} changed; {reliance}"


@pytest.mark.parametrize("name", sorted(SHARED_LOOPS))
def test_shared_loops_are_still_that(name: str) -> None:
    cls: Any = resolve_obj_by_qualname(name)
    source = "".join(inspect.getsource(vars(cls)["forward"]).split())
    if "super().forward(" in source:  # Mistral's, which adds an argument
        assert runs_shared_loop(cls.__mro__[1])
        return
    call = r"layer\(positions,hidden_states,residual,?(\*\*\w+,?)?\)"
    assert re.search(f"hidden_states,residual={call}", source)
    assert "hidden_states=self.embed_input_ids(input_ids)" in source
    assert "hidden_states,_=self.norm(hidden_states,residual)" in source
    # Whatever else scaled them would be missing from our segments.
    assert "hidden_states*" not in source
    assert "hidden_states=hidden_states" not in source
