# SPDX-License-Identifier: Apache-2.0
"""All checks, in the order in which they would stop somebody."""

from __future__ import annotations

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import Heads
from adadecode_vllm.toolkit.doctor.finding import Finding
from adadecode_vllm.toolkit.doctor.fit import (
    check_fit,
    check_heads,
    failure,
    identity_exits,
    look_up_heads,
    read_heads,
)
from adadecode_vllm.toolkit.doctor.installation import check_installation, vllm_build
from adadecode_vllm.toolkit.doctor.machine import Device, check_cpu, find_device
from adadecode_vllm.toolkit.doctor.memory import (
    check_memory,
    default_requests,
    memory_needed,
)
from adadecode_vllm.toolkit.doctor.model import (
    ModelFacts,
    check_architecture,
    read_model,
)
from adadecode_vllm.toolkit.doctor.speed import expected_speed


def examine(model: str | None = None, heads: str | None = None) -> list[Finding]:
    """Look for what would stop or slow a server.

    Args:
        model: A directory or a name on the Hub; None to look at the machine only.
        heads: The same of heads; None for those that are registered for the model.

    Returns:
        The findings. What could not be looked at because of a problem is left out.
    """
    findings = list(check_installation())
    device, finding = find_device(vllm_build())
    findings.append(finding)
    if device.kind == "cpu":
        findings += check_cpu()
    model_facts = heads_facts = None
    if model is not None:
        try:
            model_facts = read_model(model)
        except AdaDecodeError as error:
            findings.append(failure("model", error))
        else:
            findings.append(check_architecture(model_facts))
            if heads is None:
                heads, finding = look_up_heads(model)
                findings.append(finding)
    if heads is not None:
        try:
            heads_facts = read_heads(heads)
        except AdaDecodeError as error:
            findings.append(failure("heads", error))
        else:
            findings.append(check_heads(heads_facts))
    if heads_facts is not None:
        findings += _of_heads(heads_facts, model_facts, device)
    return findings


def _of_heads(heads: Heads, model: ModelFacts | None, device: Device) -> list[Finding]:
    findings: list[Finding] = []
    if model is not None:
        findings += check_fit(heads, model)
    try:
        identities = identity_exits(heads)
    except AdaDecodeError as error:
        return [*findings, failure("heads", error)]
    if model is not None:
        requests = default_requests(device)
        need = memory_needed(model, heads.config, len(identities), requests)
        findings += check_memory(need, device)
    return [*findings, expected_speed(heads, identities)]
