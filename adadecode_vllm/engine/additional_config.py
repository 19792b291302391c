# SPDX-License-Identifier: Apache-2.0
"""vLLM's ``additional_config``, hashed by what changes compiled graphs."""

from __future__ import annotations

import hashlib
import json
from collections import UserDict
from typing import Any

import torch
from pydantic_core import SchemaSerializer, core_schema
from vllm import envs

from adadecode_vllm import __version__
from adadecode_vllm.config import CONFIG_KEY


class AdditionalConfig(UserDict[str, Any]):
    """The entries of an engine's ``additional_config``, with a hash of its own.

    vLLM finds compiled graphs again by ``VllmConfig.compute_hash()``, which takes a
    dictionary here in whole: with another threshold the model would be compiled anew.
    An object that is no ``dict`` it asks for ``compute_hash()``. Since it would take a
    subclass of ``dict`` for a dictionary, this is another mapping.

    Of our options only the segments between exits are compiled. Gates are not, and
    caps, thresholds and policies are the host's. The entries of others count in whole.
    """

    # As a dictionary in JSON, for pydantic, which vLLM shows its configuration by.
    __pydantic_serializer__ = SchemaSerializer(
        core_schema.any_schema(
            serialization=core_schema.plain_serializer_function_ser_schema(dict)
        )
    )

    def compute_hash(self) -> str:
        """Hash what vLLM has to tell apart; called by ``VllmConfig.compute_hash()``.

        Returns:
            A hexadecimal digest, the same in every process on machines of a kind.

        Raises:
            TypeError: If another's entry is not JSON, as vLLM itself does.
        """
        factors = dict(self)
        # By the same hash vLLM finds how much memory an earlier start had left, where
        # it may keep that. Caps, heads and gates change it, and so may the next version
        # of this package, so all of that counts then.
        if envs.VLLM_ENABLE_STARTUP_PLAN:
            factors["adadecode_vllm"] = __version__
        elif CONFIG_KEY in factors:
            exits = factors[CONFIG_KEY]["exit_layers"]
            # An exit at the embedding ends no segment.
            ends = [layer for layer in exits if layer > 0]
            factors[CONFIG_KEY] = {"exit_layers": ends}
        # Code for vectors of another width would read past the ends of its own. torch
        # does not look when it loads what was compiled, see `patches/aot_artifacts.py`.
        factors["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        text = json.dumps(factors, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
