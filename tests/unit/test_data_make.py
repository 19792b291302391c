# SPDX-License-Identifier: Apache-2.0
"""`adadecode data` without an engine: resuming, refusing and limits."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.data import generate as generate_module
from adadecode_vllm.toolkit.data.command import data_command
from adadecode_vllm.toolkit.data.generate import EngineSpec, Shards, dtype_here
from adadecode_vllm.toolkit.data.make import make_data
from adadecode_vllm.toolkit.data.options import DataOptions
from adadecode_vllm.toolkit.data.shards import (
    load_dataset_info,
    read_rows,
    rows_fingerprint,
)
from adadecode_vllm.toolkit.data.tasks import Selection
from tests.fake_answers import fail_after, fake_answers
from tests.harness import MODEL

pytestmark = pytest.mark.usefixtures("no_engine")


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("part-*")}


def refusal(options: DataOptions) -> str:
    with pytest.raises(AdaDecodeError) as caught:
        make_data(options)
    text = str(caught.value)
    assert "\n" not in text
    assert "; " in text
    return text


# Rows


def test_rows(options: DataOptions) -> None:
    from transformers import AutoTokenizer

    info = make_data(options)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = list(read_rows(options.out))
    assert len(rows) == 20
    for i, row in enumerate(rows):
        text = f"Ann has {i} apples. {'How many? ' * (i % 5)}"
        assert row.row_id == i
        assert row.source == "questions.jsonl"
        assert row.prompt_ids == tokenizer(text)["input_ids"]
        assert row.response_ids == [sum(row.prompt_ids) % 1000, len(row.prompt_ids), 1]
    assert info == load_dataset_info(options.out)
    assert info.fingerprint == rows_fingerprint(rows)
    assert info.vocab_size == 1024
    assert info.model == MODEL
    assert info.argv == ["data", "out"]
    assert info.sources["arguments"]["max-new-tokens"] == 100
    assert info.sources["inputs"][0]["name"] == "questions.jsonl"
    assert len(list(options.out.glob("part-*.parquet"))) == 7
    assert "adadecode-vllm" in info.versions


def test_finished(options: DataOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(generate_module, "generate", fail_after(0))
    monkeypatch.setattr(generate_module, "model_length", fail_after(0))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    options = replace(options, finished=True, chat=None, max_length=16)
    info = make_data(options)
    rows = list(read_rows(options.out))
    assert not any(row.prompt_ids for row in rows)
    assert max(len(row.response_ids) for row in rows) == 16
    assert info.sources["skipped"]["cut"] > 0
    texts = json.loads(
        "[" + options.inputs[0].read_text().strip().replace("\n", ",") + "]"
    )
    expected = [i for t in texts for i in tokenizer(t["text"])["input_ids"]]
    assert [i for row in rows for i in row.response_ids] == expected


def test_finished_with_published_answers(options: DataOptions, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "1+1?", "answer": "2"}\n')
    options = replace(
        options, finished=True, inputs=(path,), selection=Selection("gsm8k")
    )
    make_data(options)
    row = next(read_rows(options.out))
    assert row.source == "gsm8k/train"
    assert row.response_ids == tokenizer("Question: 1+1?\nAnswer: 2")["input_ids"]
    chat = replace(options, out=tmp_path / "chat", chat=True)
    make_data(chat)
    text = tokenizer.decode(next(read_rows(chat.out)).response_ids)
    assert text.startswith("<s>Problem: 1+1?")
    assert text.endswith("Steps:\n2</s>")


def test_long_prompts_are_skipped(options: DataOptions) -> None:
    info = make_data(replace(options, max_length=20))
    rows = list(read_rows(options.out))
    assert 0 < len(rows) < 20
    assert [row.row_id for row in rows] == list(range(len(rows)))
    assert max(len(row.prompt_ids) for row in rows) <= 20
    assert info.sources["skipped"]["too_long"] == 20 - len(rows)


# Resuming


@pytest.mark.parametrize("shards_done", [0, 1, 4])
def test_resume_after_an_error(
    options: DataOptions, shards_done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_data(replace(options, out=options.out.with_name("whole")))
    monkeypatch.setattr(generate_module, "generate", fail_after(shards_done))
    with pytest.raises(RuntimeError, match="out of power"):
        make_data(options)
    assert len(content(options.out)) == shards_done
    with pytest.raises(AdaDecodeError, match="incomplete"):
        load_dataset_info(options.out)
    asked: list[int] = []

    def recording(spec: EngineSpec, shards: Shards, on_tokens: Any) -> Any:
        asked.extend(shards)
        return fake_answers(spec, shards, on_tokens)

    monkeypatch.setattr(generate_module, "generate", recording)
    info = make_data(options)
    assert asked == list(range(shards_done, 7))
    assert info.fingerprint == whole.fingerprint
    assert content(options.out) == content(options.out.with_name("whole"))
    asked.clear()
    assert make_data(options) == info  # nothing to do
    assert not asked


def test_resume_out_of_order(
    options: DataOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray gives shards back."""

    def backwards(*args: Any) -> Any:
        return reversed(list(fake_answers(*args)))

    whole = make_data(replace(options, out=options.out.with_name("whole")))
    monkeypatch.setattr(
        generate_module,
        "generate",
        lambda *args: (s for i, s in enumerate(backwards(*args)) if i < 9),
    )
    with pytest.raises(RuntimeError, match="have not been written"):
        make_data(options)
    monkeypatch.setattr(generate_module, "generate", backwards)
    assert make_data(options).fingerprint == whole.fingerprint


def test_a_damaged_shard_is_made_again(options: DataOptions) -> None:
    info = make_data(options)
    path = options.out / "part-00002.parquet"
    before = path.read_bytes()
    path.write_bytes(before[:50])
    assert make_data(options) == info
    assert path.read_bytes() == before


def test_changed_token_ids_are_refused(
    options: DataOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_module, "generate", fail_after(2))
    with pytest.raises(RuntimeError):
        make_data(options)
    monkeypatch.setattr(
        "adadecode_vllm.toolkit.data.make.ids_hash", lambda ids: "other"
    )
    assert "now makes other token ids" in refusal(options)


# Another request


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 50}, "--max-new-tokens was 100, now 50"),
        ({"rows_per_shard": 4}, "--rows-per-shard was 3, now 4"),
        ({"max_length": 50}, "--max-length was null, now 50"),
        ({"dtype": "float32"}, '--dtype was "auto", now "float32"'),
        ({"chat": True}, "--chat was false, now true"),
        ({"finished": True}, "--finished was false, now true"),
        ({"engine": {"block_size": 32}}, '--engine was {}, now {"block_size": 32}'),
        ({"selection": Selection("text", count=5)}, "--count was null, now 5"),
        ({"selection": Selection("text", seed=5)}, "--seed was 0, now 5"),
    ],
)
def test_another_request_is_refused(
    options: DataOptions, change: dict[str, Any], message: str
) -> None:
    make_data(options)
    before = content(options.out)
    text = refusal(replace(options, **change))
    assert f"made differently ({message})" in text
    assert content(options.out) == before
    info = make_data(replace(options, **change, overwrite=True))
    assert load_dataset_info(options.out) == info
    list(read_rows(options.out))


@pytest.mark.parametrize("shards_done", [0, 1])
def test_another_request_after_nothing_was_made(
    options: DataOptions, monkeypatch: pytest.MonkeyPatch, shards_done: int
) -> None:
    """An engine option that was wrong may be mended without --overwrite."""
    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "generate", fail_after(shards_done))
        with pytest.raises(RuntimeError):
            make_data(options)
    other = replace(options, engine={"block_size": 16})
    if shards_done:
        assert "--engine was {}" in refusal(other)
    else:
        assert make_data(other).complete


def test_memory_options_may_change(
    options: DataOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_data(replace(options, out=options.out.with_name("whole")))
    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "generate", fail_after(1))
        with pytest.raises(RuntimeError):
            make_data(options)
    options = replace(options, engine={"kv_cache_memory_bytes": 1 << 30})
    assert make_data(options).fingerprint == whole.fingerprint


def test_changed_input_is_refused(options: DataOptions) -> None:
    make_data(options)
    with options.inputs[0].open("a") as file:
        file.write('{"text": "one more"}\n')
    assert "the input files are others, or have changed" in refusal(options)


def test_overwriting_leaves_other_files(options: DataOptions) -> None:
    options.out.mkdir()
    (options.out / "notes.md").write_text("mine")
    assert "it holds notes.md but no dataset.json; choose another" in refusal(options)
    make_data(replace(options, overwrite=True))
    assert (options.out / "notes.md").read_text() == "mine"
    assert len(content(options.out)) == 7
    (options.out / "dataset.json").write_text("{")
    assert "dataset.json is not JSON" in refusal(options)
    make_data(replace(options, overwrite=True))
    assert (options.out / "notes.md").read_text() == "mine"


def test_a_refusal_leaves_old_data(options: DataOptions) -> None:
    info = make_data(options)
    bad = replace(options, max_length=1, overwrite=True)
    assert "all 20 prompts are longer" in refusal(bad)
    assert load_dataset_info(options.out) == info


# Limits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 256}, "--max-new-tokens 256: the model's 256 tokens leave"),
        (
            {"max_length": 157},
            "--max-length 157: it exceeds together with --max-new-tokens 100 the "
            "model's 256 tokens; pass at most 156",
        ),
        ({"max_length": 2}, "--max-length 2: all 20 prompts are longer, the shortest"),
        (
            {"finished": True, "max_length": 1025},
            "--max-length 1025: it exceeds the model's 1024 tokens; pass at most 1024",
        ),
        ({"finished": True, "chat": True}, "--chat: with --finished --task text"),
        ({"finished": True, "ray_actors": 1}, "--ray: with --finished there is"),
        ({"model": "/no/such/model"}, "--model /no/such/model: its configuration or"),
    ],
)
def test_limits(options: DataOptions, change: dict[str, Any], message: str) -> None:
    assert message in refusal(replace(options, **change))
    assert not options.out.exists()


def test_out_is_not_among_what_is_read(options: DataOptions) -> None:
    inputs = options.inputs[0].parent
    within = replace(options, inputs=[inputs], out=inputs / "made" / "out")
    assert f"--input {inputs}: OUT, {within.out}, lies in it" in refusal(within)
    assert not within.out.exists()


def test_out_is_a_file(options: DataOptions) -> None:
    options.out.write_text("")
    assert "OUT" in refusal(options)


def test_without_ray(options: DataOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    text = refusal(replace(options, ray_actors=2))
    assert "--ray: Ray is not installed" in text
    assert "pip install 'adadecode-vllm[ray]'" in text


# The command


def run(*argv: object) -> tuple[str, AdaDecodeError | None]:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(data_command)
    result = CliRunner().invoke(app, [str(arg) for arg in argv])
    if result.exception is None:
        return result.stdout, None
    assert isinstance(result.exception, AdaDecodeError), result.output
    return result.stdout, result.exception


def test_command(options: DataOptions) -> None:
    argv = [options.out, "--model", MODEL, "--input", options.inputs[0], "--plain"]
    argv += ["--max-new-tokens", 100, "--rows-per-shard", 8, "--seed", 3, "--count", 9]
    out, error = run(*argv)
    assert error is None
    assert out.startswith(f"{options.out}: 9 rows, ")
    assert "9 rows made in " in out
    assert load_dataset_info(options.out).sources["arguments"]["seed"] == 3
    out, error = run(*argv)
    assert "complete already" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ray-actors", 2], "--ray-actors: it has no effect without --ray"),
        (["--ray-address", "auto"], "--ray-address: it has no effect without --ray"),
        (["--task", "xsum", "--field", "x"], "--field x: the fields of xsum are known"),
        (["--engine", "{"], "--engine: not JSON ("),
        (["--engine", "[]"], "--engine: not a JSON object"),
        (["--task", "cnn"], "--task cnn: unknown task"),
    ],
)
def test_bad_flags(options: DataOptions, flags: list[object], message: str) -> None:
    argv = [options.out, "--model", MODEL, "--input", options.inputs[0], *flags]
    _, error = run(*argv)
    assert message in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("dtype", "has_gpu", "capability", "expected"),
    [
        ("auto", False, "AVX2", "float32"),
        ("auto", False, "AVX512", "auto"),
        ("auto", True, "AVX2", "auto"),
        ("bfloat16", False, "AVX2", "bfloat16"),
    ],
)
def test_bfloat16_is_not_taken_where_it_is_slow(
    dtype: str,
    has_gpu: bool,
    capability: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert dtype_here(dtype) == expected
