# SPDX-License-Identifier: Apache-2.0
"""`adadecode data` with real engines: its answers are plain vLLM's."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.data import generate as generate_module
from adadecode_vllm.toolkit.data import ray_generate
from adadecode_vllm.toolkit.data.generate import EngineSpec
from adadecode_vllm.toolkit.data.make import make_data
from adadecode_vllm.toolkit.data.options import DataOptions, Progress
from adadecode_vllm.toolkit.data.ray_generate import import_ray
from adadecode_vllm.toolkit.data.shards import load_dataset_info, read_rows
from tests.harness import MAX_MODEL_LEN, MODEL, demo_corpus, generate, start_engine

pytestmark = pytest.mark.engine

ENGINE = {
    "enforce_eager": True,
    "max_model_len": MAX_MODEL_LEN,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 16,
}
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"
)
MAX_NEW_TOKENS = 120  # enough for some answers to end by themselves


@pytest.fixture(scope="module")
def problems() -> list[str]:
    return demo_corpus().heldout_problems(10)


@pytest.fixture(scope="module")
def options(
    problems: list[str], tmp_path_factory: pytest.TempPathFactory
) -> DataOptions:
    directory = tmp_path_factory.mktemp("data")
    path = directory / "problems.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in problems))
    return DataOptions(
        out=directory / "out",
        model=MODEL,
        inputs=(path,),
        chat=False,
        max_new_tokens=MAX_NEW_TOKENS,
        rows_per_shard=4,
        dtype="float32",
        engine=ENGINE,
    )


@pytest.fixture(scope="module")
def made(options: DataOptions) -> DataOptions:
    make_data(options)
    return options


def test_answers_are_plain_generation(made: DataOptions, problems: list[str]) -> None:
    rows = list(read_rows(made.out))
    with start_engine() as llm:
        tokenizer = llm.get_tokenizer()
        expected = generate(llm, problems, max_tokens=MAX_NEW_TOKENS)
    assert [row.response_ids for row in rows] == expected
    assert [row.prompt_ids for row in rows] == tokenizer(problems)["input_ids"]
    ends = [row.response_ids[-1] == tokenizer.eos_token_id for row in rows]
    assert all(
        ended or len(row.response_ids) == MAX_NEW_TOKENS
        for ended, row in zip(ends, rows, strict=True)
    )
    assert any(ends)  # the end of a sequence is kept


def test_chat_is_vllms_chat(options: DataOptions, problems: list[str]) -> None:
    options = replace(options, out=options.out.with_name("chat"), chat=True)
    make_data(options)
    from vllm import SamplingParams

    with start_engine() as llm:
        outputs = llm.chat(
            [[{"role": "user", "content": text}] for text in problems],
            SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS),
            use_tqdm=False,
        )
    for row, output in zip(read_rows(options.out), outputs, strict=True):
        assert row.prompt_ids == list(output.prompt_token_ids)
        assert row.response_ids == list(output.outputs[0].token_ids)


# Of shards of four.
@pytest.mark.parametrize("answers", [pytest.param(2, marks=pytest.mark.slow), 7])
def test_continued_rows_are_the_same(
    made: DataOptions, monkeypatch: pytest.MonkeyPatch, answers: int
) -> None:
    original = generate_module.generate

    def broken(*args: Any) -> Iterator[Any]:
        for number, answer in enumerate(original(*args)):
            if number == answers:
                raise RuntimeError("out of power")
            yield answer

    options = replace(made, out=made.out.with_name(f"continued-{answers}"))
    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "generate", broken)
        with pytest.raises(RuntimeError, match="out of power"):
            make_data(options)
    assert len(list(options.out.glob("part-*.parquet"))) == answers // 4
    assert len(list(options.out.glob("part-*.jsonl"))) == bool(answers % 4)
    asked: list[int] = []

    def recording(spec: Any, shards: Any, *args: Any) -> Iterator[Any]:
        for rows in shards.values():
            asked.extend(rows)
        return original(spec, shards, *args)

    monkeypatch.setattr(generate_module, "generate", recording)
    info = make_data(options)
    assert len(asked) == len(set(asked)) == 10 - answers
    assert info.fingerprint == load_dataset_info(made.out).fingerprint


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"block_sise": 32}, "--engine: vLLM has no engine argument block_sise; use"),
        ({"dtype": "float32"}, "--engine: 'dtype' has a flag of its own; pass --dtype"),
        ({"max_model_len": 1 << 20}, f"--model {MODEL}: vLLM cannot serve it ("),
        ({"kv_cache_memory_bytes": 1}, f"--model {MODEL}: vLLM cannot serve it ("),
    ],
)
def test_what_vllm_refuses(
    options: DataOptions, engine: dict[str, Any], message: str
) -> None:
    options = replace(
        options, out=options.out.with_name("no"), engine={**ENGINE, **engine}
    )
    with pytest.raises(AdaDecodeError) as caught:
        make_data(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized(), "the next engine would find it"


def test_a_damaged_model(options: DataOptions, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    options = replace(options, out=options.out.with_name("damaged"), model=str(model))
    with pytest.raises(AdaDecodeError, match="vLLM cannot serve it"):
        make_data(options)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of this machine's that is already there: starting one takes long."""
    ray = import_ray()
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@needs_ray
def test_a_ray_that_does_not_answer(made: DataOptions) -> None:
    options = replace(made, out=made.out.with_name("mistakes"), ray_actors=1)
    with pytest.raises(AdaDecodeError, match=r"--ray-address 127\.0\.0\.1:1: nobody"):
        make_data(replace(options, ray_address="127.0.0.1:1"))


@needs_ray
def test_ray_makes_the_same_rows(made: DataOptions) -> None:
    options = replace(made, out=made.out.with_name("ray"), ray_actors=2)
    info = make_data(options)
    assert info.fingerprint == load_dataset_info(made.out).fingerprint
    assert list(read_rows(options.out)) == list(read_rows(made.out))


@pytest.mark.slow
@needs_ray
def test_ray_continues_what_was_begun_without(made: DataOptions, cluster: None) -> None:
    """Of the directory nothing tells how it was made."""
    options = replace(made, out=made.out.with_name("ray-continues"), ray_actors=1)
    shutil.copytree(made.out, options.out)
    (options.out / "part-00001.parquet").unlink()
    assert make_data(options) == load_dataset_info(made.out)
    assert list(read_rows(options.out)) == list(read_rows(made.out))


@pytest.mark.slow
@needs_ray
def test_ray_keeps_the_answers_of_an_unfinished_shard(
    made: DataOptions, cluster: None
) -> None:
    """Answers come from an actor as they finish, not at the end of its shard."""
    options = replace(
        made,
        out=made.out.with_name("ray-broken"),
        ray_actors=1,
        rows_per_shard=10,
        engine={**ENGINE, "max_num_seqs": 1},  # one after the other
    )

    class Interrupting(Progress):
        came: ClassVar[list[float]] = []  # since the actor took up the shard

        def answered(self, tokens: int, began: float) -> None:
            self.came.append(time.time() - began)
            if len(self.came) == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_data(options, Interrupting())
    assert Interrupting.came[0] < 0.5 * Interrupting.came[-1]
    (journal,) = options.out.glob("part-*.jsonl")
    assert len(journal.read_bytes().splitlines()) == 1 + 8
    info = make_data(replace(options, ray_actors=None))
    assert info.fingerprint == load_dataset_info(made.out).fingerprint


@pytest.mark.slow
@needs_ray
def test_mistakes_with_ray(made: DataOptions, cluster: None) -> None:
    options = replace(made, out=made.out.with_name("mistakes"), ray_actors=1)
    # Only the actor can tell that this is too little.
    engine = {**ENGINE, "kv_cache_memory_bytes": 1}
    with pytest.raises(AdaDecodeError, match="vLLM cannot serve it") as caught:
        make_data(replace(options, engine=engine))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@needs_ray
def test_engines_that_end_again_and_again(
    made: DataOptions, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ending:  # of a function: actors get it by value
        def __init__(self, spec: EngineSpec) -> None:
            pass

        def start(self) -> None:
            os._exit(1)

    monkeypatch.setattr(ray_generate, "ShardActor", Ending)
    options = replace(made, out=made.out.with_name("ending"), ray_actors=1)
    with pytest.raises(AdaDecodeError, match=r"--ray: an actor failed \(") as caught:
        make_data(options)
    assert "run the command again to continue" in str(caught.value)


@pytest.mark.slow
@needs_ray
def test_too_many_actors(made: DataOptions, cluster: None) -> None:
    options = replace(
        made, out=made.out.with_name("many"), rows_per_shard=1, ray_actors=999
    )
    # For ten shards.
    if (os.cpu_count() or 1) >= 10:
        pytest.skip("this machine has room for them")
    with pytest.raises(AdaDecodeError, match=r"--ray-actors 10: they need 10 CPUs"):
        make_data(options)
