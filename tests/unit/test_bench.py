"""`baton bench`: medians, goals and the shape of the report, without a server."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
import pytest

from cluster.bench.client import Stream, random_prompt
from cluster.bench.model import describe_model, pad_vocabulary
from cluster.bench.report import BenchFailed, Goal, machine, median, percentile, ratio
from cluster.bench.serve import goals_of, summary
from cluster.bench.sides import QUICK, CompareSettings, LengthSamples, SideSamples
from cluster.cli.bench_common import compare_settings
from cluster.config import BUNDLED_MODEL

SETTINGS = CompareSettings(prompt_tokens=(256,))


def stream(*token_times_s: float, text: str = "same") -> Stream:
    return Stream(started_s=10.0, token_times_s=list(token_times_s), text=text)


def side(first_s: float, second_s: float, step_s: float, text: str = "same") -> SideSamples:
    """One request of four tokens."""
    at = 10.0 + first_s
    samples = LengthSamples()
    tokens = (at, at + second_s, at + second_s + step_s, at + second_s + 2 * step_s)
    samples.add(stream(*tokens, text=text))
    return SideSamples(lengths={256: samples}, tokens_per_s=[40.0], stream_gaps_s=[0.05, 0.15])


def test_a_median_is_scaled_and_rounded() -> None:
    assert median([0.3, 0.1, 0.2], 1e3) == 200.0
    assert median([1.0, 2.0]) == 1.5
    assert median([]) is None


@pytest.mark.parametrize(("percent", "value"), [(1, 1.0), (50, 2.0), (75, 3.0), (99, 4.0)])
def test_a_percentile_is_one_of_the_values(percent: float, value: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == value
    assert percentile([], percent) is None


def test_a_ratio_needs_both_values() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(None, 2.0) is None
    assert ratio(3.0, None) is None
    assert ratio(3.0, 0.0) is None


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("a", 20.0, 20.0), True),
        (Goal("a", 20.1, 20.0), False),
        (Goal("a", 20.0, 20.0, at_most=False), True),
        (Goal("a", 19.9, 20.0, at_most=False), False),
        (Goal("a", None, 20.0), False),
        (Goal("a", None, 20.0, at_most=False), False),
    ],
)
def test_a_goal_is_met_at_its_bound_and_never_without_a_value(goal: Goal, met: bool) -> None:
    assert goal.met is met
    assert goal.to_json() == {"name": "a", "value": goal.value, "goal": 20.0, "met": met}


def test_a_stream_counts_tokens_not_events() -> None:
    taken = Stream(started_s=1.0)
    events = [("a", 1, 1.5), ("bc", 3, 2.0), ("", 3, 2.5)]
    for text, tokens, at_s in events:
        event = {
            "id": "cmpl-1",
            "choices": [{"text": text}],
            "usage": {"completion_tokens": tokens},
        }
        taken.take(event, at_s)
    assert taken.token_times_s == [1.5, 2.0, 2.0]
    assert (taken.first_token_s, taken.gaps_s) == (0.5, [0.5, 0.0])
    assert (taken.request_id, taken.text) == ("cmpl-1", "abc")


def test_an_error_in_a_stream_ends_the_benchmark() -> None:
    with pytest.raises(BenchFailed, match="no more"):
        Stream(started_s=1.0).take({"error": {"message": "no more"}}, 2.0)


def test_prompts_are_repeatable_and_share_no_prefix() -> None:
    assert random_prompt("a", 64, 859) == random_prompt("a", 64, 859)
    prompts = [random_prompt(f"0/64/{i}", 64, 859) for i in range(20)]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 20
    assert all(2 <= token < 859 for prompt in prompts for token in prompt)


def test_both_servers_have_room_for_the_longest_sequence() -> None:
    assert CompareSettings().max_model_len == 4608
    assert QUICK.max_model_len == 512
    streams = dataclasses.replace(SETTINGS, stream_prompt_tokens=1000, stream_output_tokens=100)
    assert streams.max_model_len == 1536


def test_what_the_user_gives_vllm_comes_last() -> None:
    settings = dataclasses.replace(SETTINGS, vllm_args=("--kv-cache-memory-bytes", "1"))
    assert settings.server_args()[-2:] == ["--kv-cache-memory-bytes", "1"]


def test_the_report_has_medians_ratios_and_goals() -> None:
    plain, baton = side(0.2, 0.08, 0.07), side(0.21, 0.105, 0.07)
    baton.lengths[256].after_prefill_s.append(0.005)
    baton.requests_by_path = {"handed_over": 1}
    report = json.loads(json.dumps(summary({"cores": 2}, {"name": "m"}, SETTINGS, plain, baton)))
    assert list(report) == [
        "bench",
        "machine",
        "model",
        "settings",
        "rounds",
        "results",
        "requests_by_path",
        "throughput",
        "goals",
    ]
    assert report["results"] == {
        "256": {
            "plain": {
                "ttft_ms": 200.0,
                "second_token_ms": 80.0,
                "inter_token_ms": 70.0,
                "decode_step_ms": 70.0,
            },
            "baton": {
                "ttft_ms": 210.0,
                "second_token_ms": 105.0,
                "inter_token_ms": 70.0,
                "first_token_after_prefill_ms": 5.0,
            },
            "ratios": {"ttft": 1.05, "second_token_plain_steps": 1.5, "inter_token": 1.0},
            "requests": 1,
            "same_text": 1,
        }
    }
    assert report["throughput"]["tokens_per_s_ratio"] == 1.0
    assert report["throughput"]["plain"]["inter_token_p99_ms"] == 150.0
    assert report["goals"] == [
        {"name": "first_token_after_prefill_ms_256", "value": 5.0, "goal": 20.0, "met": True},
        {"name": "ttft_ratio_256", "value": 1.05, "goal": 1.1, "met": True},
        {"name": "second_token_plain_steps_256", "value": 1.5, "goal": 2.0, "met": True},
    ]


def test_what_was_not_measured_is_no_goal_met_and_another_text_is_seen() -> None:
    plain, baton = side(0.2, 0.07, 0.07), side(0.2, 0.07, 0.07, text="another")
    results = summary({}, {}, SETTINGS, plain, baton)["results"]
    assert results["256"]["same_text"] == 0
    assert [goal.met for goal in goals_of(results)] == [False, True, True]


def test_the_machine_is_described_without_paths() -> None:
    described = machine()
    assert described["cores"] >= 1
    assert described["vllm"]
    assert not any("/" in str(value) for value in described.values())


def test_a_model_is_described_by_its_shape_and_its_parameters() -> None:
    described = describe_model(BUNDLED_MODEL)
    assert described["parameters"] == 1_007_488
    assert described["vocab_size"] == 859


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchFailed, match=r"config\.json"):
        describe_model(tmp_path)


def test_every_id_of_a_padded_tokenizer_has_a_name() -> None:
    tokenizer = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text())
    pad_vocabulary(tokenizer, 1000)
    added = {token["id"] for token in tokenizer["added_tokens"]}
    assert {*tokenizer["model"]["vocab"].values()} | added == set(range(1000))
    assert len(tokenizer["model"]["vocab"].values()) == len({*tokenizer["model"]["vocab"].values()})


@pytest.mark.parametrize(
    ("given", "lengths"),
    [((), (256, 1024, 4096)), (("64,256", "512", "64"), (64, 256, 512))],
)
def test_prompt_lengths_given_again_add_up(
    given: tuple[str, ...], lengths: tuple[int, ...]
) -> None:
    settings = compare_settings(False, given, None, None, False, ())
    assert settings.prompt_tokens == lengths


def test_prompt_lengths_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(click.BadParameter, match="64,many"):
        compare_settings(False, ("64", "many"), None, None, False, ())
