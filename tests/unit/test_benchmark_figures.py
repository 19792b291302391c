# SPDX-License-Identifier: Apache-2.0
"""From runs to figures: parity, ratios, acceptance, tables, result files."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.evaluation.cost import CostModel
from benchmarks import analysis
from benchmarks.backend_transformers import TransformersBackend
from benchmarks.parity import (
    BaselineLogits,
    Parity,
    bfloat16_ulp,
    compare,
    divergences,
    first_difference,
    is_tie,
    judge,
)
from benchmarks.plot_cases import read_cases
from benchmarks.result_files import provenance, read_results, write_results
from benchmarks.roofline import cost_model, predicted_speedup
from benchmarks.tables import results_table
from benchmarks.variants import EngineSettings, Variant
from tests.harness import HEADS, MODEL, ROOT
from tests.throughput_benchmark import stats


def run(seconds: float, tokens: int = 12, **changes: Any) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "token_ids": [list(range(tokens))],
        "ttft_s": [0.01],
        "tpot_s": [0.02],
        "speculation": {"drafts": 0, "draft_tokens": 0, "accepted": 0},
        "stats": None,
        "peak_memory_mib": 100.0,
        "private_memory_mib": 50.0,
        **changes,
    }


@pytest.mark.parametrize(
    ("value", "ulp"),
    [(1.0, 2**-7), (1.99, 2**-7), (2.0, 2**-6), (-40.0, 0.25), (0.6, 2**-8)],
)
def test_the_distance_of_bfloat16_numbers(value: float, ulp: float) -> None:
    assert bfloat16_ulp(value) == ulp


def test_the_distance_is_torchs() -> None:
    import torch

    for value in (0.3, 1.0, 17.5, 100.0):
        x = torch.tensor(value, dtype=torch.bfloat16)
        above = torch.nextafter(x, torch.tensor(1e30, dtype=torch.bfloat16))
        assert (above - x).item() == bfloat16_ulp(x.item())


@pytest.mark.parametrize(
    ("a", "b", "index"),
    [
        ([1, 2], [1, 2], None),
        ([1, 2], [1, 3], 1),
        ([1, 2], [1], 1),
        ([], [4], 0),
    ],
)
def test_where_texts_part(a: list[int], b: list[int], index: int | None) -> None:
    assert first_difference(a, b) == index


def logits_at(difference: float) -> list[list[list[float]]]:
    sure = [[5, 20.0], [6, 1.0]]
    return [sure, [[7, 16.0], [8, 16.0 - difference]], sure]


def test_two_ulp_apart_is_a_tie_and_more_is_not() -> None:
    # One ULP at 16 is 1/8.
    assert is_tie([5, 7, 5], [5, 8, 9], logits_at(0.25))
    assert not is_tie([5, 7, 5], [5, 8, 9], logits_at(0.26))


def test_several_tokens_may_be_as_good() -> None:
    logits = [[[7, 16.0], [8, 16.0], [9, 15.75], [4, 15.7]]]
    assert is_tie([7], [9], logits)
    assert is_tie([8], [9], logits)
    assert not is_tie([7], [4], logits)
    assert not is_tie([4], [7], logits)


def test_a_third_token_or_another_length_is_no_tie() -> None:
    assert not is_tie([5, 7, 5], [5, 9, 5], logits_at(0.0))
    assert not is_tie([5, 7, 5], [5, 7], logits_at(0.0))


def test_where_texts_part_is_kept() -> None:
    baseline, texts = [[5, 7, 5], [1]], [[5, 8, 9], [1]]
    (found,) = divergences(baseline, texts, [logits_at(0.25), []])
    assert found["text"] == 0
    assert (found["token"], found["found"]) == (1, 8)
    assert found["ulps"] == pytest.approx(2)
    assert divergences(baseline, [[5], [1]], None) == [
        {"text": 0, "token": 1, "found": None}
    ]


def test_ties_count_only_where_logits_are_given() -> None:
    baseline, texts = [[5, 7, 5], [1]], [[5, 8, 5], [1]]
    logits = [logits_at(0.0), [[[1, 3.0], [2, 0.0]]]]
    assert compare(baseline, texts, logits) == Parity(same=1, ties=1)
    assert compare(baseline, texts, None) == Parity(same=1, different=1)
    # Unknown logits excuse nothing.
    assert compare(baseline, texts, [[], []]) == Parity(same=1, different=1)


@pytest.mark.parametrize("alone", [True, False])
def test_a_baseline_is_asked_again_where_it_gave_another_text(alone: bool) -> None:
    asked: list[list[int]] = []

    def generate(prompts: Sequence[int]) -> dict[str, Any]:
        asked.append(list(prompts))
        texts = {0: [5, 7, len(asked)], 1: [1], 2: [4 + len(asked), 7, 5]}
        return {
            "token_ids": [texts[number] for number in prompts],
            "top_logits": [logits_at(len(asked)) for _ in prompts],
        }

    logits = BaselineLogits(generate, alone)
    base = {"token_ids": [[5, 7, 5], [1], [5, 7, 5]]}
    same, other = dict(base), {"token_ids": [[5, 8, 9], [1], [5, 8, 9]]}
    assert logits.where_texts_part([0, 1, 2], base, [same]) is None
    for _ in range(2):
        again = logits.where_texts_part([0, 1, 2], base, [same, other])
        assert asked == [[0, 2] if alone else [0, 1, 2]]
    assert again is not None
    assert again["token_ids"][2] == [5, 7, 5]
    # In another run the last text is another.
    base = {"token_ids": [[5, 7, 5], [1], [6, 7, 5]]}
    other = {"token_ids": [[5, 8, 9], [1], [6, 8, 9]]}
    again = logits.where_texts_part([0, 1, 2], base, [other])
    assert asked[1:] == [[2] if alone else [0, 1, 2]]
    assert again is not None
    assert again["token_ids"][2] == [6, 7, 5]
    # What told already is kept.
    assert again["token_ids"][0] == [5, 7, 1]
    assert judge(base, other, again)["parity"]["different"] == 2


@pytest.mark.parametrize(
    ("again", "parity"),
    [
        ([5, 7, 5], Parity(ties=1)),
        # Its logits follow the same tokens up to where it parts itself.
        ([5, 7, 4], Parity(ties=1)),
        ([5, 8, 4], Parity(ties=1)),
        ([4, 7, 5], Parity(different=1)),
    ],
)
def test_a_baseline_that_parts_from_itself(again: list[int], parity: Parity) -> None:
    found = judge(
        {"token_ids": [[5, 7, 5]]},
        {"token_ids": [[5, 8, 9]]},
        {"token_ids": [again], "top_logits": [logits_at(0.25)]},
    )
    assert found["parity"] == vars(parity)


def test_ratios_are_taken_pair_by_pair() -> None:
    slow, fast = [run(2.0), run(8.0)], [run(1.0), run(2.0)]
    figures = analysis.summarize(fast, slow)
    assert figures["ratio"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert figures["tokens_per_s"]["max"] == 12.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1.0),
        ({"stats": stats()}, 3.0),
        ({"speculation": {"drafts": 3, "draft_tokens": 9, "accepted": 6}}, 2.0),
        # 15 accepted, of which 6 lie beyond the end: 12 tokens in 3 + 1 forwards.
        ({"speculation": {"drafts": 3, "draft_tokens": 15, "accepted": 15}}, 3.0),
        ({"forwards": 5}, 2.4),
    ],
)
def test_tokens_per_forward(changes: dict[str, Any], expected: float) -> None:
    assert analysis.tokens_per_forward(run(1.0, **changes)) == pytest.approx(expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_transformers_forwards_are_counted_per_request(batch_size: int) -> None:
    """Plain decoding yields one token with each, however large the batch is."""
    settings = EngineSettings(MODEL, HEADS, dtype="float32")
    backend = TransformersBackend(Variant("transformers", "transformers"), settings)
    found = backend.generate(
        [[1, 5, 9], [1, 7], [1, 4, 8, 6]],
        batch_size=batch_size,
        output_tokens=3,
        ignore_eos=True,
    )
    assert found["forwards"] == 9
    assert analysis.tokens_per_forward(found) == 1.0


def test_early_predictions_by_exit() -> None:
    early = analysis.early_predictions(run(1.0, stats=stats()))
    assert early is not None
    assert early["rate"] == 9 / 12
    assert early["coverage"] == 8 / 12
    assert early["acceptance"] == 8 / 9
    assert early["by_exit"] == [[2, 7, 1.0], [4, 2, 0.5]]
    assert early["contradicted_texts"] == 1.0
    nothing = stats(accepted=[0, 0], rejected=[0, 0])
    early = analysis.early_predictions(run(1.0, stats=nothing))
    assert early is not None
    assert early["acceptance"] is None


def test_early_predictions_of_all_runs() -> None:
    other = stats(early_predictions=[3, 0], accepted=[1, 0], rejected=[2, 0])
    whole = analysis.pooled([run(1.0, stats=stats()), run(1.0, stats=other)])
    early = analysis.early_predictions(whole)
    assert early is not None
    assert early["coverage"] == 9 / 24
    assert early["by_exit"] == [[2, 10, 8 / 10], [4, 2, 0.5]]


def test_the_parts_of_the_time_add_up() -> None:
    split = analysis.time_split(run(1.0, stats=stats()))
    assert split is not None
    assert sum(split.values()) == pytest.approx(1.0)
    assert split["draft bookkeeping"] == pytest.approx(0.1)
    assert split["rest"] == pytest.approx(0.2)


def test_on_cuda_the_parts_are_the_devices() -> None:
    device = {"draft steps": [0.4, 13], "resumed forwards": [0.35, 3]}
    measured = run(1.0, stats=stats(device_seconds=device))
    split = analysis.time_split(measured)
    assert split is not None
    assert sum(split.values()) == pytest.approx(1.0)
    assert split["segments"] == 0.4
    assert split["verification"] == 0.35
    assert split["draft bookkeeping"] == pytest.approx(0.1)
    assert analysis.draft_step_overhead(measured) == pytest.approx(0.1 / 13)


def test_overhead_is_told_only_where_every_step_was_measured() -> None:
    assert analysis.draft_step_overhead(run(1.0)) is None
    assert analysis.draft_step_overhead(run(1.0, stats=stats())) is None
    some = stats(device_seconds={"draft steps": [0.4, 12]})
    assert analysis.draft_step_overhead(run(1.0, stats=some)) is None


def test_latencies_leave_out_what_is_unknown() -> None:
    found = analysis.percentiles([run(1.0, tpot_s=[None, 0.5])], "tpot_s")
    assert found == {"p50": 500.0, "p99": 500.0}
    assert analysis.percentiles([run(1.0, tpot_s=[None])], "tpot_s")["p50"] is None


def test_the_roofline_counts_what_was_read() -> None:
    cost = CostModel(head_share=0.2, transform_share=0.05)
    # Segments of 2, 2 and 4 of 8 layers; one forward was ordinary.
    layers = (14 * 2 + 7 * 2 + 4 * 4) / 8
    steps = 0.8 * layers + 0.25 * 13 + 0.2 * 4
    assert predicted_speedup(stats(), cost) == pytest.approx(12 / steps)


def test_a_reduced_draft_vocabulary_makes_gates_cheaper() -> None:
    whole = cost_model(MODEL, identity=False, draft_vocabulary=None)
    some = cost_model(MODEL, identity=False, draft_vocabulary=256)
    assert whole.gate_head_share is None
    assert some.gate_head_share == pytest.approx(whole.head_share / 4)
    assert predicted_speedup(stats(), some) > predicted_speedup(stats(), whole)


def case(variant: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    figures = analysis.summarize(runs, runs)
    memory = {"peak_memory_mib": 100.0, "private_memory_mib": 50.0}
    return {
        "variant": variant,
        "label": variant,
        "batch_size": 1,
        "policy": {},
        "figures": {**figures, **memory},
        "runs": [],
    }


def results(**changes: Any) -> dict[str, Any]:
    parity = {"same": 3, "ties": 1, "different": 0}
    return {
        "hardware": {"cpu": "one"},
        "workload": {"sha256": "ab"},
        "variants": {
            "baseline": {"status": "ran"},
            "suffix": {"status": "skipped", "reason": "needs a package; install it"},
            "ngram": {"status": "failed", "reason": "ValueError: no"},
        },
        "cases": [
            case("baseline", [run(2.0)]),
            case("adadecode", [run(1.0, stats=stats(), parity=parity)]),
        ],
        **changes,
    }


def test_the_table_names_every_variant() -> None:
    table = results_table([results()])
    lines = table.splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "3/4, 1 at ties" in lines[3]
    assert "100.0 % / 50.0 %" in lines[3]
    assert "suffix skipped: it needs a package; install it." in lines
    assert "ngram failed: ValueError: no" in lines
    assert "right answers" not in table


def test_the_table_says_how_many_answers_are_right() -> None:
    right = {"right": [True, False, True], "prompts": [0, 3]}
    cases = [case("baseline", [run(2.0)]), case("ngram", [run(1.0, **right)])]
    lines = results_table([results(cases=cases)]).splitlines()
    assert lines[0].endswith("| right answers |")
    assert [line.split("|")[-2].strip() for line in lines[2:4]] == ["-", "2/3"]
    assert len({line.count("|") for line in lines[:4]}) == 1


def test_results_say_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/home/somebody")
    found = provenance()
    assert found["environment"]["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"
    assert "VLLM_CACHE_ROOT" not in found["environment"]
    assert found["command"].startswith("python ")
    assert {"torch", "transformers", "adadecode-vllm"} <= found["versions"].keys()
    assert found["hardware"]["cores"] >= 1
    assert found["commit"]


def test_results_of_one_machine_stand_together(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "deep" / "b.json"]
    for path in paths:
        write_results(path, results())
    assert len(read_results(paths)) == 2


def test_what_was_measured_earlier_is_read() -> None:
    (found,) = read_results([ROOT / "benchmarks" / "results" / "study_exits.json"])
    assert next(iter(found["variants"])) == "baseline"
    first = found["cases"][0]
    assert first["variant"] == first["label"] == "baseline"
    assert [case.variant for case in read_cases([found])][:2] == ["baseline", "exits:2"]
    assert results_table([found]).splitlines()[2].startswith("| 1 | baseline |")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hardware": {"cpu": "two"}}, "another machine"),
        ({"workload": {"sha256": "cd"}}, "other prompts"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    write_results(paths[0], results())
    write_results(paths[1], results(**change))
    with pytest.raises(AdaDecodeError, match=reason):
        read_results(paths)


def report(*paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "report.py"), *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_files_are_put_into_one_table(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.json", "b.json", "other.json")]
    for path in paths[:2]:
        write_results(path, results())
    write_results(paths[2], results(hardware={"cpu": "two"}))
    answer = report(*paths[:2])
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("| adadecode |") == 2
    refused = report(*paths)
    assert refused.returncode == 2
    assert "another machine" in refused.stderr


@pytest.mark.parametrize("content", ["", "[]", '{"hardware": {}}', "{"])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(AdaDecodeError, match="not a result file"):
        read_results([path])


def test_results_are_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_results(path, {**provenance(), **results()})
    assert json.loads(path.read_text())["cases"][1]["variant"] == "adadecode"
