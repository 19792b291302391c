# SPDX-License-Identifier: Apache-2.0
"""Workloads of the benchmarks: which prompts, as which token ids, and refusals."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adadecode_vllm.errors import AdaDecodeError
from benchmarks.workloads import PUBLISHED, WORKLOADS, Workload, load_workload
from tests.harness import DEMO, MODEL, demo_corpus
from tests.published_data import GSM8K, HUMANEVAL, XSUM, write_records

BUILT_IN = ("problems", "code", "prose", "random")


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo's tokenizer and configuration, without its chat template."""
    directory = tmp_path_factory.mktemp("plain")
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(DEMO / "model" / name, directory / name)
    values = json.loads((DEMO / "model" / "tokenizer_config.json").read_text())
    del values["chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    return str(directory)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def refusal(name: str, **options: Any) -> str:
    with pytest.raises(AdaDecodeError) as caught:
        load_workload(name, options.pop("model", MODEL), **options)
    text = str(caught.value)
    assert "\n" not in text
    assert "; " in text  # the remedy
    assert "--input" not in text
    assert "--task" not in text
    return text


def all_kinds(tmp_path: Path) -> dict[str, Path | None]:
    return {
        **dict.fromkeys(BUILT_IN),
        "xsum": write_records(
            tmp_path / "xsum/data/test-00000-of-00001.parquet", XSUM
        ).parent,
        "humaneval": write_records(tmp_path / "HumanEval.jsonl.gz", HUMANEVAL),
        "gsm8k": write_records(tmp_path / "gsm8k/test.jsonl", GSM8K).parent,
        "text": write_records(
            tmp_path / "own.jsonl", [{"text": f"one {i}"} for i in range(9)]
        ),
    }


# What all have in common


def test_all_workloads(tmp_path: Path) -> None:
    kinds = all_kinds(tmp_path)
    assert set(kinds) == set(WORKLOADS)
    hashes = set()
    for name, path in kinds.items():
        workload = load_workload(name, MODEL, path=path, count=5)
        assert workload == load_workload(name, MODEL, path=path, count=5)
        assert workload.name == name
        assert len(workload.prompts) == len(workload.texts) == 5
        assert all(0 <= i < 1024 for ids in workload.prompts for i in ids)
        assert all(workload.texts)
        assert "5 prompts" in workload.description
        assert "\n" not in workload.description
        assert "%" not in WORKLOADS[name]  # argparse would read it
        hashes.add(workload.sha256)
        other = load_workload(name, MODEL, path=path, count=5, seed=1)
        assert other.prompts != workload.prompts
        assert other.sha256 != workload.sha256
    assert len(hashes) == len(kinds)


def test_output_tokens(tmp_path: Path) -> None:
    kinds = all_kinds(tmp_path)
    found = {
        name: load_workload(name, MODEL, path=path, count=2).output_tokens
        for name, path in kinds.items()
    }
    assert found == {
        **dict.fromkeys(("problems", "code", "prose"), 96),
        **dict.fromkeys((*PUBLISHED, "text"), 512),
        "random": 128,
    }
    assert load_workload("random", MODEL, output_tokens=7).output_tokens == 7


# Published files


def test_xsum(tmp_path: Path, tokenizer: Any, plain_model: str) -> None:
    write_records(tmp_path / "data/test-00000-of-00001.parquet", XSUM)
    write_records(tmp_path / "data/train-00000-of-00001.parquet", XSUM * 2)
    workload = load_workload("xsum", MODEL, path=tmp_path)
    assert len(workload.prompts) == len(XSUM)
    assert workload.chat
    assert workload.texts[3] == (
        "Summarize this article in one sentence.\n\nArticle 3\nabout a town."
    )
    message = {"role": "user", "content": workload.texts[3]}
    assert workload.prompts[3] == tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, return_dict=False
    )
    plain = load_workload("xsum", plain_model, path=tmp_path)
    assert not plain.chat
    assert plain.texts[3].endswith("\n\nThe article in one sentence:")
    assert plain.prompts[3] == tokenizer(plain.texts[3])["input_ids"]


def test_humaneval(tmp_path: Path, tokenizer: Any, plain_model: str) -> None:
    path = write_records(tmp_path / "HumanEval.jsonl.gz", HUMANEVAL)
    workload = load_workload("humaneval", plain_model, path=path)
    assert not workload.chat
    assert workload.texts == [row["prompt"] for row in HUMANEVAL]
    assert workload.prompts[9] == tokenizer(HUMANEVAL[9]["prompt"])["input_ids"]
    assert "humaneval, split test of " in workload.description
    assert "164 prompts, plain" in workload.description


def test_the_hash_follows_the_content(tmp_path: Path) -> None:
    def sha256(records: list[dict[str, Any]]) -> str:
        path = write_records(tmp_path / "test.jsonl", records)
        return load_workload("gsm8k", MODEL, path=path).sha256

    before = sha256(GSM8K)
    changed = [*GSM8K[:-1], {**GSM8K[-1], "question": "Ann has none?"}]
    assert sha256(changed) != before
    # Published answers are no part of the prompts.
    assert sha256([{**row, "answer": "none"} for row in GSM8K]) == before


# Texts of one's own


def test_text(tmp_path: Path, tokenizer: Any, plain_model: str) -> None:
    write_records(
        tmp_path / "a.jsonl", [{"text": "one"}, {"text": " "}, {"text": "two"}]
    )
    (tmp_path / "b.json").write_text('[{"text": "three"}]')
    (tmp_path / "c.txt").write_text("four\n\nstill four\n")
    workload = load_workload("text", plain_model, path=tmp_path)
    assert workload.texts == ["one", "two", "three", "four\n\nstill four\n"]
    assert workload.prompts == tokenizer(workload.texts)["input_ids"]


# Without files


def test_problems_and_code_are_the_demos(tokenizer: Any) -> None:
    corpus = demo_corpus()
    problems = load_workload("problems", MODEL, count=8)
    assert problems.texts == corpus.heldout_problems(8)
    code = load_workload("code", MODEL, count=8)
    assert code.texts == corpus.heldout_code_prompts(8)
    for workload in (problems, code):
        assert workload.prompts == tokenizer(workload.texts)["input_ids"]
        assert not workload.chat
    assert len(load_workload("problems", MODEL).prompts) == 32


def test_prose_is_long_and_was_never_trained_on() -> None:
    texts = load_workload("prose", MODEL, count=200).texts
    assert len(set(texts)) == 200
    assert all(150 < len(text) <= 240 and text[0].isupper() for text in texts)
    trained = "\n".join(demo_corpus().training_code())
    known = [text for text in texts if text[:60] in trained]
    assert len(known) <= 4


def test_random_tokens_are_no_special_ones() -> None:
    workload = load_workload("random", MODEL, count=200)
    assert {len(ids) for ids in workload.prompts} == {32}
    found = set(itertools.chain.from_iterable(workload.prompts))
    assert not found & {0, 1, 2}
    assert len(found) > 900


# Lengths


def test_long_prompts_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, plain_model: str
) -> None:
    path = write_records(
        tmp_path / "a.jsonl", [{"text": "x" + " y" * n} for n in (5, 30, 6, 40)]
    )
    options: dict[str, Any] = {"path": path, "output_tokens": 20}
    workload = load_workload("text", plain_model, max_model_len=40, **options)
    assert [len(text) for text in workload.texts] == [11, 13]
    assert "2 of 4 prompts were left out: more than 20 tokens" in caplog.text
    assert "2 prompts" in workload.description
    # Without a limit, or with vLLM's word for none, the model's own holds.
    for limit, kept in ((None, 4), (-1, 4), (len(workload.prompts[1]) + 20, 2)):
        found = load_workload("text", plain_model, max_model_len=limit, **options)
        assert len(found.prompts) == kept
    text = refusal("text", model=plain_model, max_model_len=21, **options)
    assert text.startswith("--max-model-len 21: none of the 4 prompts fits beside 20")
    assert "--dataset-name" in text
    assert "none of the 4" in refusal("text", path=path, output_tokens=1024)


# Refusals


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cnn", {}, "--dataset-name cnn: unknown workload; choose one of xsum, "),
        ("random", {"count": 0}, "--num-prompts 0: nothing would be measured; "),
        ("random", {"output_tokens": 0}, "--output-len 0: nothing would be measured"),
        ("xsum", {}, "--dataset-path: the workload xsum is read from files; give"),
        ("text", {}, "--dataset-path: the workload text is read from files; give"),
        ("code", {"path": Path("x")}, "--dataset-path x: the workload code makes its"),
        ("prose", {"count": 9999}, "--num-prompts 9999: the workload prose has only"),
        ("gsm8k", {"path": Path("no/where")}, "--dataset-path no/where: there is no"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    assert refusal(name, **options).startswith(message)


def test_refused_files(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "x", "answer": \n')
    text = refusal("gsm8k", path=path)
    assert text.startswith(f"--dataset-path {path}:1: not JSON (")
    write_records(path, GSM8K)
    text = refusal("xsum", path=path)
    assert "there is no field 'document'" in text
    assert text.endswith("; give the right --dataset-name")
    text = refusal("gsm8k", path=path, count=41)
    assert text.startswith("--num-prompts 41: the files hold only 40 usable records; ")
    text = refusal("gsm8k", path=write_records(tmp_path / "train.jsonl", GSM8K))
    assert "this is the train split and the workload needs test; give" in text
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no file with an extension" in refusal("xsum", path=empty)
    write_records(empty / "train.jsonl", GSM8K)
    text = refusal("gsm8k", path=empty)
    assert text.endswith("for the test split of gsm8k; name the file itself")
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    text = refusal("text", path=path)
    assert text.startswith(f"--dataset-path {path}: not a whole Parquet file (")
    path = write_records(tmp_path / "a.jsonl", [{"text": " "}])
    assert "no record has any text" in refusal("text", path=path)


def test_without_a_template_prompts_are_plain(tmp_path: Path, plain_model: str) -> None:
    path = write_records(tmp_path / "test.jsonl", GSM8K)
    workload: Workload = load_workload("gsm8k", plain_model, path=path)
    assert workload.texts[2] == "Question: Ann has 2 apples?\nAnswer:"


def test_parquet_without_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_records(tmp_path / "a.parquet", [{"text": "x"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    text = refusal("text", path=path)
    assert text.startswith(f"--dataset-path {path}: pyarrow is needed to read Parquet")
