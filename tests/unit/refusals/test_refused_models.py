# SPDX-License-Identifier: Apache-2.0
"""Models that start-up refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from vllm.model_executor.models.glm4 import Glm4Model
from vllm.model_executor.models.granite import GraniteModel
from vllm.model_executor.models.llama import LlamaModel

from adadecode_vllm.engine import refusals
from adadecode_vllm.engine.segments import find_decoder, runs_shared_loop
from adadecode_vllm.errors import AdaDecodeError
from tests.start_up import refusal
from tests.tiny_configs import save_config

SUPPORTED = (
    "Serve one of Cohere2ForCausalLM, CohereForCausalLM, Gemma2ForCausalLM, "
    "Gemma3ForCausalLM, GemmaForCausalLM, Glm4ForCausalLM, LlamaForCausalLM, "
    "MistralForCausalLM, MixtralForCausalLM, NemotronForCausalLM, OlmoeForCausalLM, "
    "Phi3ForCausalLM, Qwen2ForCausalLM, Qwen2MoeForCausalLM, Qwen3ForCausalLM, "
    "Qwen3MoeForCausalLM, or start without --plugin adadecode."
)
RECURRENT = "it has recurrent (Mamba or linear attention) layers"
OTHER_LOOP = "its layers are not known to have the form (positions"


def _refused(architecture: str, reason: str, feature: str | None = None) -> Any:
    marks = [pytest.mark.feature(feature, "refused")] if feature else []
    return pytest.param(architecture, reason, marks=marks)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        _refused("MambaForCausalLM", RECURRENT, "hybrid and state-space models"),
        _refused("FalconH1ForCausalLM", RECURRENT, "hybrid and state-space models"),
        _refused(
            "WhisperForConditionalGeneration",
            "it is an encoder-decoder model",
            "encoder-decoder models",
        ),
        _refused(
            "Qwen2AudioForConditionalGeneration",
            "it is a multimodal model",
            "multimodal models",
        ),
        _refused("GPT2LMHeadModel", OTHER_LOOP),
        _refused("GraniteForCausalLM", OTHER_LOOP),
        _refused("Olmo2ForCausalLM", OTHER_LOOP),
    ],
)
def test_refused_architectures(
    tmp_path: Path, heads: Path, architecture: str, reason: str
) -> None:
    directory = tmp_path / "model"
    save_config(directory, architecture)
    message = refusal(directory, heads)
    assert message.startswith(
        f"--model {directory} ({architecture}): not with AdaDecode, because {reason}"
    )
    assert message.endswith(SUPPORTED)


@pytest.mark.feature("expert parallel", "refused")
def test_experts_of_several_data_parallel_ranks(tmp_path: Path, heads: Path) -> None:
    """Their ranks run every forward together; those of dense models do not."""
    directory = tmp_path / "model"
    save_config(directory, "MixtralForCausalLM")
    message = refusal(directory, heads, data_parallel_size=2)
    assert message.startswith("--data-parallel-size 2 with a mixture of experts: not")
    assert "each predicts early on its own. Start engines of their own" in message


def test_experts_found_by_counting() -> None:
    """vLLM itself forces the option off with the torch that it pins."""
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(is_moe=True),
        parallel_config=SimpleNamespace(data_parallel_size=1),
        compilation_config=SimpleNamespace(fast_moe_cold_start=False),
    )
    refusals._check_mixture_of_experts(config)
    config.compilation_config.fast_moe_cold_start = True
    with pytest.raises(AdaDecodeError, match=r"^--compilation-config fast_moe_cold_s"):
        refusals._check_mixture_of_experts(config)
    config.model_config.is_moe = False
    refusals._check_mixture_of_experts(config)


class _OwnLoop(LlamaModel):
    """Inherits everything but the loop."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_loaded_model_with_another_loop_is_refused() -> None:
    assert runs_shared_loop(LlamaModel)
    assert runs_shared_loop(Glm4Model)  # inherits Llama's
    assert not runs_shared_loop(_OwnLoop)
    assert not runs_shared_loop(GraniteModel)
    assert not runs_shared_loop(dict)
    with pytest.raises(AdaDecodeError, match="does not run the layer loop"):
        find_decoder(nn.Module())
