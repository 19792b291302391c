# SPDX-License-Identifier: Apache-2.0
"""``VllmConfig`` lets Model Runner V2 run this plugin's speculative method.

Symptom without it: vLLM counts every ``custom_class`` method among the features that V2
lacks. It then falls back to the deprecated V1, or refuses the engine where V2 was asked
for (``Model Runner V2 does not yet support: speculative method 'custom_class'``). The
list is made by a private method of a dataclass that vLLM itself instantiates, in every
process, so there is nothing to subclass.

Upstream: ``_get_v2_model_runner_unsupported_features`` in
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/config/vllm.py
The change to propose there: leave ``custom_class`` out of the tuple of methods, and let
the runner raise where the named class is not a ``BaseSpeculator``.

Can go when vLLM does. Other ``custom_class`` methods are reported as before.
"""

from __future__ import annotations

import functools
from typing import Any

from adadecode_vllm.compat import SUPPORTED_NAMES

_MARK = "_adadecode_original"
_UNSUPPORTED = "speculative method 'custom_class'"


def install() -> None:
    """Wrap one method of ``VllmConfig``; a second call does nothing.

    A ``VllmConfig`` that does not look as expected is left alone with a warning:
    this runs in every vLLM process, also in those that never ask for the plugin.
    """
    from vllm.config import VllmConfig
    from vllm.logger import init_logger

    logger = init_logger("vllm.adadecode")
    original = vars(VllmConfig).get("_get_v2_model_runner_unsupported_features")
    if original is None:
        logger.warning(
            "adadecode: vLLM's VllmConfig has no "
            "_get_v2_model_runner_unsupported_features. The plugin was written for "
            "vLLM %s and stays off; install one of them to use it.",
            SUPPORTED_NAMES,
        )
        return
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def unsupported_features(self: Any) -> list[str]:
        from adadecode_vllm.engine.arguments import SPECULATOR

        features = original(self)
        speculative_config = self.speculative_config
        if speculative_config is not None and speculative_config.model == SPECULATOR:
            return [feature for feature in features if feature != _UNSUPPORTED]
        return features

    setattr(unsupported_features, _MARK, original)
    VllmConfig._get_v2_model_runner_unsupported_features = unsupported_features
    logger.debug("Model Runner V2 accepts the adadecode speculator")
