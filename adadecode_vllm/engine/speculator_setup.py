# SPDX-License-Identifier: Apache-2.0
"""What a speculator on Model Runner V2 does before requests are served."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import graph_capture
from vllm.logger import init_logger
from vllm.v1.worker.gpu.cudagraph_utils import has_compiled_submodule
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from adadecode_vllm.config import engine_config
from adadecode_vllm.engine.adadecode import AdaDecode
from adadecode_vllm.engine.batch import AttentionBatcher, KVGroup, window_reach
from adadecode_vllm.engine.draft_cycle import DraftCycle
from adadecode_vllm.engine.piecewise import PiecewiseInputs
from adadecode_vllm.engine.segment_graphs import (
    MAX_TOKENS,
    GraphedSteps,
    SegmentGraphs,
    StepKind,
    Steps,
    graph_support,
    step_kinds,
)
from adadecode_vllm.engine.step_buffers import StepBuffers
from adadecode_vllm.engine.vllm_executor import Backend

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

logger = init_logger("vllm.adadecode")


class SpeculatorSetup(BaseSpeculator):
    """Loads the heads, learns the KV cache and captures CUDA graphs.

    Attributes:
        adadecode: The method's parts; exists after :meth:`load`.
        cycle: Counts steps and drafts; exists after :meth:`load`.
    """

    adadecode: AdaDecode
    cycle: DraftCycle
    # Both exist after `bind`.
    _runner: GPUModelRunner
    _backend: Backend

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, max_model_len: int
    ) -> None:
        """Read the options that start-up resolved.

        Args:
            vllm_config: The engine's configuration.
            device: The model's device.
            max_model_len: The model's length.
        """
        self.vllm_config = vllm_config
        self.device = device
        config = engine_config(vllm_config)
        assert config is not None, "start-up named this class for AdaDecode only"
        self.config = config
        self._max_model_len = max_model_len
        self._kinds: list[StepKind] = []
        self._piecewise = False

    def load(self, target_model: nn.Module) -> None:
        """Assemble the method around the loaded model.

        Args:
            target_model: The model as vLLM loaded it.
        """
        self.adadecode = AdaDecode(target_model, self.config, self.vllm_config)
        self.cycle = DraftCycle(self.adadecode, self._max_model_len)

    def bind(self, runner: GPUModelRunner) -> None:
        """Learn the runner's KV cache groups; called whenever they change.

        Args:
            runner: The model runner.
        """
        groups = [
            _kv_group(runner, index)
            for index in range(len(runner.kv_cache_config.kv_cache_groups))
        ]
        self._backend = Backend(AttentionBatcher(groups, self.device))
        self.adadecode.bind(self._backend)
        self._runner = runner
        if has_custom_logits_processors(runner):
            self.adadecode.settings.forbid_all_drafts()
            logger.warning_once(
                "adadecode: nothing is drafted, because custom logits processors are "
                "loaded, and drafts would change what they see in Model Runner V2"
            )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Plan the CUDA graphs of draft steps and of the segments' pieces.

        vLLM calls it whenever the KV cache is set up, also while it measures how much
        memory graphs take; it then finds the managers among the attributes.

        Args:
            cudagraph_mode: What the attention backends allow.
        """
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        self._piecewise = cudagraph_mode.has_piecewise_cudagraphs()
        model = self.adadecode.model
        self._kinds = step_kinds(
            model.num_segments, model.exits_at_embedding, self.adadecode.states.window
        )
        for kind in self._kinds:
            graphs = SegmentGraphs(kind, self.vllm_config, self.device, full)
            setattr(self, kind.name, graphs)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture them; vLLM calls it after its own graphs."""
        runner = self._runner
        model, states = self.adadecode.model, self.adadecode.states
        backend = self._backend
        if self._piecewise and all(map(has_compiled_submodule, model.segments)):
            sizes = self.vllm_config.compilation_config.cudagraph_capture_sizes
            inputs = PiecewiseInputs(
                sizes or (), states.hidden.shape[1], states.hidden.dtype, self.device
            )
            with graph_capture(device=self.device):
                model.capture_piecewise(inputs)
            backend = replace(backend, piecewise=inputs)
            self.adadecode.bind(backend)
        support = graph_support(runner)
        kinds = [
            kind
            for kind in self._kinds
            if (kind.segment < 0 or support == 2 or kind.max_query_len <= support)
            and self._graphs(kind).largest
        ]
        if not kinds:
            return
        buffers = StepBuffers(
            runner,
            states,
            max(runner.max_num_reqs, MAX_TOKENS),
            model.num_segments,
        )
        steps = Steps(buffers, model)
        for kind in kinds:
            self._graphs(kind).capture_steps(steps)
        # By name: vLLM drops the managers it profiled with, and these with them.
        graphed = GraphedSteps(
            buffers,
            {kind: partial(self._graphs, kind) for kind in kinds},
            states.window,
            self.adadecode.measure,
        )
        self.adadecode.bind(replace(backend, steps=graphed))

    def _graphs(self, kind: StepKind) -> SegmentGraphs:
        return getattr(self, kind.name)


def has_custom_logits_processors(runner: GPUModelRunner) -> bool:
    """Whether a model runner has logits processors that are not vLLM's own.

    vLLM gives them a row for every draft. One that takes rows for requests, or reads
    verified tokens only, would change texts, those of other requests included.

    Args:
        runner: The model runner, with its model loaded.
    """
    processors = [] if runner.sampler is None else runner.sampler.logits_processors
    return any(not type(own).__module__.startswith("vllm.") for own in processors)


def _kv_group(runner: GPUModelRunner, index: int) -> KVGroup:
    tables = runner.block_tables
    group = runner.kv_cache_config.kv_cache_groups[index]
    return KVGroup(
        block_table=lambda: tables.block_tables[index].gpu,
        block_size=tables.block_sizes[index],
        blocks_owned=lambda: tables.num_blocks.np[index],
        layer_names=group.layer_names,
        attention_groups=runner.attn_groups[index],
        window_reach=window_reach(group.kv_cache_spec),
    )
