# SPDX-License-Identifier: Apache-2.0
"""Reading the published file formats, choosing rows, and every refusal's sentence."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.data.readers import read_records
from adadecode_vllm.toolkit.data.tasks import (
    Example,
    Selection,
    check_selection,
    input_files,
    select_examples,
)
from tests.published_data import GSM8K, HUMANEVAL, XSUM, write_records

MBPP = [
    {
        "task_id": i,
        "text": f"Write a function to add {i}.",
        "code": f"def add(x):\r\n  return x + {i}",
        "test_list": [f"assert add(1) == {1 + i}", f"assert add(2) == {2 + i}"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for i in range(1, 975)
]


def select(selection: Selection, *inputs: Path) -> list[Example]:
    selection = check_selection(selection)
    return select_examples(selection, input_files(selection, inputs))[0]


# The published formats


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_xsum(tmp_path: Path, suffix: str) -> None:
    write_records(tmp_path / f"data/train-00000-of-00001.{suffix}", XSUM)
    write_records(tmp_path / f"data/test-00000-of-00001.{suffix}", XSUM[:3])
    write_records(tmp_path / f"data/validation-00000-of-00001.{suffix}", XSUM[:5])
    (tmp_path / "README.md").write_text("about the data")
    examples = select(Selection("xsum"), tmp_path)
    assert len(examples) == 30
    first = examples[0]
    assert first.source == "xsum/train"
    assert "Article 0\nabout a town." in first.plain
    assert "Article 0\nabout a town." in first.message
    assert first.reference == " Town 0."
    assert first.reply == "Town 0."
    assert len(select(Selection("xsum", "test"), tmp_path)) == 3


def test_mbpp(tmp_path: Path) -> None:
    path = write_records(tmp_path / "mbpp.jsonl", MBPP)
    examples = select(Selection("mbpp"), path)
    assert len(examples) == 974
    assert "Write a function to add 1." in examples[0].plain
    assert "assert add(1) == 2\nassert add(2) == 3" in examples[0].plain
    assert "assert add(1) == 2\nassert add(2) == 3" in examples[0].message
    assert "\r" not in examples[0].reference
    published_test = select(Selection("mbpp", "test"), path)
    assert len(published_test) == 500
    assert "add 11." in published_test[0].plain


def test_mbpp_of_the_hub(tmp_path: Path) -> None:
    splits = {
        "prompt": MBPP[:10],
        "test": MBPP[10:510],
        "train": MBPP[600:],
        "validation": MBPP[510:600],
    }
    for name, records in splits.items():
        write_records(tmp_path / f"full/{name}-00000-of-00001.parquet", records)
        write_records(
            tmp_path / f"sanitized/{name}-00000-of-00001.parquet",
            [{"task_id": r["task_id"], "prompt": r["text"]} for r in records],
        )
    assert len(select(Selection("mbpp", "train"), tmp_path)) == 974
    assert len(select(Selection("mbpp", "test"), tmp_path)) == 500


def test_humaneval(tmp_path: Path) -> None:
    path = write_records(tmp_path / "HumanEval.jsonl.gz", HUMANEVAL)
    examples = select(Selection("humaneval"), path)
    assert len(examples) == 164
    assert examples[3].plain == HUMANEVAL[3]["prompt"]
    assert examples[3].source == "humaneval/test"
    assert examples[3].reply.startswith("```python\ndef f3(")
    write_records(tmp_path / "hub" / "test-00000-of-00001.parquet", HUMANEVAL)
    assert select(Selection("humaneval"), tmp_path / "hub") == examples


def test_gsm8k(tmp_path: Path) -> None:
    for name in ("train", "train_socratic", "test", "test_socratic"):
        write_records(tmp_path / f"{name}.jsonl", GSM8K[: 40 if "train" in name else 7])
    write_records(tmp_path / "example_model_solutions.jsonl", [{"question": "x"}])
    examples = select(Selection("gsm8k"), tmp_path)
    assert len(examples) == 40
    assert examples[2].plain == "Question: Ann has 2 apples?\nAnswer:"
    assert examples[2].reference == " She has <<2=2>>2.\n#### 2"
    assert len(select(Selection("gsm8k", "test"), tmp_path)) == 7


def test_text(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two", "x": 1}])
    write_records(tmp_path / "b.jsonl.gz", [{"text": "three"}])
    (tmp_path / "c.json").write_text('[{"text": "four"}]')
    write_records(tmp_path / "d.parquet", [{"text": "five", "x": 1}])
    (tmp_path / "e.txt").write_text("six\n\nstill six\n")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "f.csv").write_text("not,read")
    examples = select(Selection("text"), tmp_path)
    assert [e.plain for e in examples] == [
        *("one", "two", "three", "four", "five", "six\n\nstill six\n")
    ]
    assert [e.source for e in examples][-2:] == ["d.parquet", "e.txt"]
    with_field = Selection("text", text_field="body")
    write_records(tmp_path / "sub" / "a.jsonl", [{"body": "seven"}])
    assert select(with_field, tmp_path / "sub")[0].plain == "seven"
    # In the order in which they are named.
    named = select(Selection("text"), tmp_path / "d.parquet", tmp_path / "a.jsonl")
    assert [e.plain for e in named] == ["five", "one", "two"]


# Which rows


def test_the_seed_decides_and_order_stays(tmp_path: Path) -> None:
    path = write_records(tmp_path / "train.jsonl", GSM8K)
    picked = [e.plain for e in select(Selection("gsm8k", count=10), path)]
    assert picked == [e.plain for e in select(Selection("gsm8k", count=10), path)]
    other = [e.plain for e in select(Selection("gsm8k", count=10, seed=1), path)]
    assert picked != other
    everything = [e.plain for e in select(Selection("gsm8k"), path)]
    assert [text for text in everything if text in picked] == picked
    # More rows of the same seed contain the fewer ones.
    more = [e.plain for e in select(Selection("gsm8k", count=20), path)]
    assert set(picked) < set(more)


def test_the_papers_counts(tmp_path: Path) -> None:
    many = [{"question": f"q{i}", "answer": "a"} for i in range(1319)]
    assert len(select(Selection("gsm8k", "test"), _jsonl(tmp_path, "test", many))) == (
        1000
    )
    many = [{"question": f"q{i}", "answer": "a"} for i in range(7473)]
    assert len(select(Selection("gsm8k"), _jsonl(tmp_path, "train", many))) == 7473
    many = [{"document": f"d{i}", "summary": "s", "id": "x"} for i in range(10_050)]
    assert len(select(Selection("xsum"), _jsonl(tmp_path, "train", many))) == 10_000


def _jsonl(directory: Path, name: str, records: list[dict[str, Any]]) -> Path:
    return write_records(directory / f"{name}.jsonl", records)


def test_fewer_than_the_paper_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    select(Selection("xsum"), write_records(tmp_path / "train.jsonl", XSUM))
    assert "hold 30 records of xsum train; the paper used 10,000" in caplog.text


def test_blank_records_are_counted(tmp_path: Path) -> None:
    records = [XSUM[0], {**XSUM[1], "document": " \n"}, XSUM[2]]
    selection = check_selection(Selection("xsum"))
    files = [write_records(tmp_path / "train.jsonl", records)]
    examples, blank = select_examples(selection, files)
    assert (len(examples), blank) == (2, 1)


# Refusals


def refusal(selection: Selection, *inputs: Path) -> str:
    with pytest.raises(AdaDecodeError) as caught:
        select(selection, *inputs)
    text = str(caught.value)
    assert "\n" not in text
    assert "; " in text  # the remedy
    return text


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection("cnn"), "--task cnn: unknown task; choose one of xsum, mbpp"),
        (Selection("humaneval", "train"), "humaneval has only test; use --task mbpp"),
        (Selection("xsum", "dev"), "--split dev: xsum has only train and test; choose"),
        (Selection("text", "train"), "--split train: files of --task text have no"),
    ],
)
def test_bad_selections(selection: Selection, message: str) -> None:
    assert message in refusal(selection, Path("nowhere"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl:3: not JSON ("),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl:2: not a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1: not JSON ("),
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl: the file is empty"),
        ("a.jsonl", b'{"body": "x", "b": 1}\n', "a.jsonl:1: there is no field 'text'"),
        ("a.jsonl", b'{"body": "x", "b": 1}\n', "fields are b, body; give"),
        ("a.jsonl", b'{"text": null}\n', "the field 'text' is NoneType instead"),
        ("a.jsonl", b'{"text": " "}\n', "no record has any text"),
        (
            "a.jsonl",
            rb'{"text": "a \ud83d"}',
            r"'text' has half a character, '\ud83d';",
        ),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: not a whole gzip file"),
        (
            "a.jsonl.gz",
            gzip.compress(b"x" * 999, mtime=0)[:20],
            "not a whole gzip file",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b"x" * 999, mtime=0)[:10] + b"\x07" + b"x" * 99,
            "not a whole gzip file (Error -3 while decompressing",
        ),
        ("a.json", b'{"text": "x"}', "a.json: not a JSON array"),
        ("a.json", b"[", "a.json: not JSON ("),
        ("a.json", b"[1]", "a.json, element 0: not a JSON object"),
        ("a.json", b"[]", "a.json: the file is empty"),
        ("a.parquet", b"PAR1", "a.parquet: not a whole Parquet file ("),
        ("a.parquet", b"", "a.parquet: not a whole Parquet file ("),
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b"\xff\xfe\xfa", "a.txt: not UTF-8 ("),
        ("a.csv", b"a,b", "a.csv: unknown extension; rename or convert it to one of"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    text = refusal(Selection("text"), path)
    assert text.startswith(f"--input {path}")
    assert message in text


def test_missing_columns_of_parquet(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.parquet", [{"body": "x"}])
    assert "a.parquet, row 0: there is no field 'text'" in (
        refusal(Selection("text"), path)
    )


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "the file is empty" in refusal(Selection("text"), path)


def test_fields_of_tasks(tmp_path: Path) -> None:
    path = write_records(tmp_path / "mbpp.jsonl", [{**MBPP[0], "test_list": "assert"}])
    assert "'test_list' is not a list of texts" in refusal(Selection("mbpp"), path)
    path = write_records(tmp_path / "mbpp.jsonl", [{**MBPP[0], "task_id": "1"}])
    assert "'task_id' is not an integer" in refusal(Selection("mbpp", "test"), path)
    path = write_records(tmp_path / "train.jsonl", GSM8K)
    assert "there is no field 'document'" in refusal(Selection("xsum"), path)


def test_missing_files(tmp_path: Path) -> None:
    assert "there is no such file or directory" in (
        refusal(Selection("text"), tmp_path / "no")
    )
    (tmp_path / "a.csv").touch()
    assert "holds no file with an extension of .jsonl" in (
        refusal(Selection("text"), tmp_path)
    )
    assert "--input: no file or directory" in refusal(Selection("text"))


def test_the_wrong_split(tmp_path: Path) -> None:
    path = write_records(tmp_path / "test.jsonl", GSM8K)
    text = refusal(Selection("gsm8k", "train"), path)
    assert "by its name this is the test split and --split is train" in text
    text = refusal(Selection("gsm8k", "train"), tmp_path)
    assert "no file there is named for the train split of gsm8k" in text
    # A name that says nothing is believed.
    path = write_records(tmp_path / "questions.jsonl", GSM8K)
    assert len(select(Selection("gsm8k", "train"), path)) == 40


def test_too_few_records(tmp_path: Path) -> None:
    path = write_records(tmp_path / "train.jsonl", GSM8K)
    text = refusal(Selection("gsm8k", count=41), path)
    assert "--count 41: the files hold only 40 usable records" in text


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_records(tmp_path / "a.jsonl", [{"text": "x"}])

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(AdaDecodeError, match=r"cannot be read \(Permission denied\)"):
        list(read_records(path))
