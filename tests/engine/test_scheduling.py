# SPDX-License-Identifier: Apache-2.0
"""What happens to requests from outside while tokens of theirs are pending (I2)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.harness import (
    MODEL,
    OUTPUT_TOKENS,
    Reference,
    adadecode_options,
    configure,
    generate,
    metric,
    start_engine,
    stats,
)

pytestmark = pytest.mark.engine

SOME = 6


@pytest.fixture(scope="module")
def changed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with other late layers and the same LM head."""
    directory = tmp_path_factory.mktemp("changed") / "model"
    shutil.copytree(MODEL, directory)
    path = directory / "model.safetensors"
    weights = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if any(f"layers.{layer}." in name for layer in range(8, 16)):
            noise = torch.randn(weight.shape, generator=generator)
            weights[name] = weight + (0.3 * weight.std() * noise).to(weight.dtype)
    save_file(weights, path, {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def changed_texts(
    changed_model: Path, reference: Reference, prompts: list[str]
) -> list[list[int]]:
    """Plain vLLM's, of the changed model."""
    with start_engine(str(changed_model)) as llm:
        texts = generate(llm, prompts[:SOME])
    assert texts != reference["texts"][:SOME]
    return texts


@pytest.fixture(scope="module")
def engine(changed_texts: list[list[int]]) -> Iterator[Any]:
    """Predicts early in every step, and wrongly often enough."""
    with start_engine(**adadecode_options(threshold=0.2)) as llm:
        yield llm


def in_steps(
    llm: Any,
    prompts: list[str],
    meanwhile: Callable[[int], None],
    max_tokens: int = OUTPUT_TOKENS,
) -> dict[str, list[int]]:
    """Generate step by step; texts of the requests that were finished, by number.

    Args:
        llm: The engine.
        prompts: Request `str(i)` has prompt i.
        meanwhile: Called after each step, with its number from 1.
        max_tokens: Most tokens of a text.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    core = llm.llm_engine
    for number, prompt in enumerate(prompts):
        core.add_request(str(number), prompt, params)
    texts, step = {}, 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                texts[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
        assert step < 500
        meanwhile(step)
    return texts


def numbered(texts: list[list[int]]) -> dict[str, list[int]]:
    return {str(number): text for number, text in enumerate(texts)}


def pending(llm: Any) -> int:
    """Requests whose pending tokens wait for the next step."""
    return llm.collective_rpc(lambda worker: len(worker._adadecode.ledger))[0]


@pytest.mark.feature("priority scheduling", "supported")
def test_priorities_in_a_small_kv_cache(
    prompts: list[str], reference: Reference
) -> None:
    """The most urgent come last and are served first."""
    with start_engine(
        **adadecode_options(threshold=0.3),
        scheduling_policy="priority",
        enable_prefix_caching=False,
        num_gpu_blocks_override=20,
        max_num_seqs=12,
    ) as llm:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS)
        urgency = [len(prompts) - number for number in range(len(prompts))]
        outputs = llm.generate(prompts, params, use_tqdm=False, priority=urgency)
        texts = [list(output.outputs[0].token_ids) for output in outputs]
        assert texts == reference["texts"]
        began = [output.metrics.first_token_ts for output in outputs]
        assert max(began[-4:]) < min(began[:4])
        assert metric(llm, "vllm:num_preemptions") > 0
        counted = stats(llm)
        assert sum(counted["accepted"]) > 0
        assert sum(counted["rejected"]) > 0
        assert counted["dropped"]["not_scheduled"] > 0


@pytest.mark.feature("request abort", "supported")
def test_an_aborted_request_takes_only_its_own_pending_tokens(
    engine: Any, prompts: list[str], reference: Reference
) -> None:
    configure(engine)

    def abort(step: int) -> None:
        if step == 3:
            assert pending(engine) > 1
            engine.llm_engine.abort_request(["1"])

    texts = in_steps(engine, prompts[:SOME], abort)
    expected = numbered(reference["texts"][:SOME])
    del expected["1"]
    assert texts == expected
    counted = stats(engine)
    assert counted["dropped"] == {"not_scheduled": 1}
    assert sum(counted["accepted"]) > 0
    assert sum(counted["rejected"]) > 0
    # Its number may come back, with another prompt.
    assert in_steps(engine, prompts[2:4], lambda step: None) == numbered(
        reference["texts"][2:4]
    )


@pytest.mark.feature("sleep and wake", "supported", "level 0, a pause")
def test_a_pause_keeps_what_is_pending(
    engine: Any, prompts: list[str], reference: Reference
) -> None:
    configure(engine)

    def pause(step: int) -> None:
        if step in (2, 5):
            assert pending(engine) > 0
            engine.sleep(level=0, mode="keep")
            engine.wake_up(tags=["scheduling"])

    texts = in_steps(engine, prompts[:SOME], pause)
    assert texts == numbered(reference["texts"][:SOME])
    counted = stats(engine)
    assert sum(counted["accepted"]) > 0
    assert sum(counted["rejected"]) > 0


@pytest.mark.feature(
    "sleep and wake", "not applicable", "levels 1 and 2 on CPUs, refused by vLLM"
)
def test_vllm_has_no_deeper_sleep_on_cpus() -> None:
    with pytest.raises(ValueError, match=r"[Ss]leep mode is not supported"):
        start_engine(**adadecode_options(), enable_sleep_mode=True).__enter__()


@pytest.mark.feature("weight reload", "supported")
def test_reloaded_weights_give_their_own_texts(
    engine: Any,
    prompts: list[str],
    reference: Reference,
    changed_model: Path,
    changed_texts: list[list[int]],
) -> None:
    """The heads stay, and are merely right less often."""

    def reload(path: str) -> None:
        engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
        assert engine.reset_prefix_cache()

    try:
        reload(str(changed_model))
        configure(engine)
        assert generate(engine, prompts[:SOME]) == changed_texts
        counted = stats(engine)
        assert sum(counted["accepted"]) > 0
        assert sum(counted["rejected"]) > 0
    finally:
        reload(MODEL)
    configure(engine)
    assert generate(engine, prompts[:SOME]) == reference["texts"][:SOME]


@pytest.mark.feature("weight reload", "supported")
def test_a_reload_in_the_middle_drops_what_is_pending(
    engine: Any, prompts: list[str], reference: Reference
) -> None:
    """The same weights, so that the texts are known; what they computed is dropped."""
    configure(engine)
    dropped = []

    def reload(step: int) -> None:
        if step == 4:
            dropped.append(pending(engine))
            engine.collective_rpc("reload_weights", kwargs={"weights_path": MODEL})
            assert pending(engine) == 0

    texts = in_steps(engine, prompts[:SOME], reload)
    assert texts == numbered(reference["texts"][:SOME])
    assert dropped[0] > 1
    counted = stats(engine)
    assert counted["dropped"] == {"weights_reloaded": dropped[0]}
    assert counted["dropped_tokens"]["weights_reloaded"] >= dropped[0]


@pytest.mark.feature("weight reload", "supported")
@pytest.mark.feature("preemption", "supported")
def test_new_weights_in_the_middle_of_texts(
    engine: Any, prompts: list[str], changed_model: Path
) -> None:
    """All requests are computed again and go on as the new weights would."""
    configure(engine)
    begun: dict[str, list[int]] = {}

    def reload(step: int) -> None:
        if step != 4:
            return
        assert pending(engine) > 1
        scheduler = engine.llm_engine.engine_core.engine_core.scheduler
        for request in scheduler.requests.values():
            number = request.request_id.split("-")[0]
            begun[number] = list(request.output_token_ids)
        path = str(changed_model)
        engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
        assert engine.llm_engine.reset_prefix_cache(reset_running_requests=True)

    try:
        texts = in_steps(engine, prompts[:SOME], reload)
        counted = stats(engine)
        assert counted["dropped"]["weights_reloaded"] > 1
        assert sum(counted["accepted"]) > 0
        assert sum(counted["rejected"]) > 0
        # What follows each begun text, without early predictions.
        configure(engine, threshold=1.0)
        tokenizer = engine.get_tokenizer()
        for number, prefix in begun.items():
            assert 0 < len(prefix) < OUTPUT_TOKENS
            prompt = tokenizer(prompts[int(number)])["input_ids"] + prefix
            (rest,) = generate(
                engine,
                [{"prompt_token_ids": prompt}],
                max_tokens=OUTPUT_TOKENS - len(prefix),
            )
            assert texts[number] == prefix + rest
        assert len(begun) == SOME
        assert sum(stats(engine)["early_predictions"]) == 0
    finally:
        engine.collective_rpc("reload_weights", kwargs={"weights_path": MODEL})
        assert engine.reset_prefix_cache()
        configure(engine, threshold=0.2)


@pytest.mark.feature("prefix caching", "supported")
def test_a_prefix_cache_that_is_reset(
    engine: Any, prompts: list[str], reference: Reference
) -> None:
    """With all running requests, whose pending tokens go with their KV."""
    configure(engine)

    def reset(step: int) -> None:
        if step in (3, 6):
            assert pending(engine) > 1
            assert engine.llm_engine.reset_prefix_cache(reset_running_requests=True)

    texts = in_steps(engine, prompts[:SOME], reset)
    assert texts == numbered(reference["texts"][:SOME])
    counted = stats(engine)
    assert sum(counted["dropped"].values()) > 2
    assert sum(counted["accepted"]) > 0
    assert sum(counted["rejected"]) > 0


@pytest.mark.feature("prompt embeds", "supported")
def test_prompt_embeds(prompts: list[str], reference: Reference) -> None:
    """Beside prompts of tokens, and with the same texts as those."""
    table = load_file(Path(MODEL) / "model.safetensors")["model.embed_tokens.weight"]
    with start_engine(
        **adadecode_options(threshold=0.2), enable_prompt_embeds=True
    ) as llm:
        tokenizer = llm.get_tokenizer()
        mixed: list[Any] = [
            {"prompt_embeds": table[tokenizer(prompt)["input_ids"]].float()}
            if number % 2
            else prompt
            for number, prompt in enumerate(prompts)
        ]
        assert generate(llm, mixed) == reference["texts"]
        counted = stats(llm)
        assert sum(counted["accepted"]) > 0
        assert sum(counted["rejected"]) > 0
        assert counted["resumed_tokens"] > 0


@pytest.mark.feature("prompt embeds", "supported")
def test_prompt_embeds_that_are_no_tokens(prompts: list[str]) -> None:
    """As a soft prompt's; plain vLLM with the same ones is the reference."""
    table = load_file(Path(MODEL) / "model.safetensors")["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(0)

    def answers(llm: Any) -> list[list[int]]:
        return generate(llm, [*embeds, *prompts[:4]])

    with start_engine(enable_prompt_embeds=True) as llm:
        tokenizer = llm.get_tokenizer()
        exact = [table[tokenizer(prompt)["input_ids"]].float() for prompt in prompts]
        embeds: list[Any] = [
            {
                "prompt_embeds": rows
                + 0.5 * rows.std() * torch.randn(rows.shape, generator=generator)
            }
            for rows in exact[:8]
        ]
        expected = answers(llm)
        assert expected[:8] != generate(llm, prompts[:8])
    with start_engine(
        **adadecode_options(threshold=0.2), enable_prompt_embeds=True
    ) as llm:
        assert answers(llm) == expected
        counted = stats(llm)
        assert sum(counted["accepted"]) > 0
        assert sum(counted["rejected"]) > 0
        assert counted["resumed_tokens"] > 0
