# SPDX-License-Identifier: Apache-2.0
"""The model families that are served; importing this costs nothing."""

# Architectures (Hugging Face names) whose vLLM model runs the shared layer loop.
# Known before a model is loaded, so that start-up can refuse early;
# `segments.find_decoder` checks the loaded model itself.
SUPPORTED_ARCHITECTURES = frozenset(
    {
        "Cohere2ForCausalLM",
        "CohereForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "GemmaForCausalLM",
        "Glm4ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "NemotronForCausalLM",
        "OlmoeForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)
