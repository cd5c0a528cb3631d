"""`baton bench`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cluster.cli.bench_common import (
    compare_options,
    compare_settings,
    compared,
    milliseconds,
    show,
    show_goals,
    show_head,
    show_throughput,
    tell,
)
from cluster.cli.bench_handoff import handoff
from cluster.cli.bench_router import router

PLAIN_COLUMNS = ("ttft_ms", "second_token_ms", "inter_token_ms")


@click.group()
def bench() -> None:
    """Measure Baton on this machine."""


bench.add_command(handoff)
bench.add_command(router)


@bench.command(context_settings={"ignore_unknown_options": True})
@compare_options
def serve(as_json: bool, quick: bool, model: Path | None, **given: Any) -> None:
    """Compare Baton with one plain vLLM server.

    Baton has a prefill and a decode worker. Any flag of `vllm serve` can follow, and is for both
    servers.
    """
    from cluster.bench.serve import run_serve, summary

    settings = compare_settings(quick, **given)
    report = compared(run_serve, summary, settings, model, quick, settings.free_front_end)
    show(report, as_json, _show)


@bench.command(context_settings={"ignore_unknown_options": True})
@click.argument("vllm_args", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM FLAGS]...")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("--model", type=Path, help="model folder; a random Llama of 113M if not given")
@click.option("--seconds", type=click.FloatRange(1), help="that are measured, every round  [60]")
@click.option("--streams", type=click.IntRange(1), help="that decode all the time  [8]")
@click.option("--burst-prompts", type=click.IntRange(1), help="long prompts in a burst  [4]")
@click.option("--burst-every-s", type=click.FloatRange(0.1), help="from burst to burst  [6]")
@click.option("--rounds", type=click.IntRange(1), help="of plain vLLM, then Baton  [1]")
@click.option("--quick", is_flag=True, help="bundled model, few seconds: does it work at all")
def isolation(
    as_json: bool,
    quick: bool,
    model: Path | None,
    seconds: float | None,
    vllm_args: tuple[str, ...],
    **given: int | float | None,
) -> None:
    """Compare decoding under bursts of long prompts.

    Time between tokens at two plain vLLM servers, requests taking turns between them, and at a
    prefill and a decode worker; one core each. Any flag of `vllm serve` can follow, and is for
    all of them.
    """
    from cluster.bench.isolation import QUICK, IsolationSettings, run_isolation, summary

    changes = {name: value for name, value in {**given, "window_s": seconds}.items() if value}
    settings = dataclasses.replace(
        QUICK if quick else IsolationSettings(),
        vllm_args=vllm_args,
        **changes,  # type: ignore[arg-type]
    )
    # As Baton's router may use both cores, so may the plain servers' front ends.
    report = compared(run_isolation, summary, settings, model, quick, free_front_end=True)
    show(report, as_json, _show_isolation)


@bench.command()
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("--policy", help="placement policy  [splitwise]")
@click.option("--quick", is_flag=True, help="small clusters, few placements: does it work at all")
def scheduler(as_json: bool, policy: str | None, quick: bool) -> None:
    """Time placements in clusters of 10, 100 and 1,000 workers.

    Starts no servers: it is the scheduler alone.
    """
    from cluster.bench.scheduler import QUICK, SchedulerSettings, run_scheduler
    from cluster.scheduler.policies import BadPolicy

    settings = QUICK if quick else SchedulerSettings()
    if policy is not None:
        settings = dataclasses.replace(settings, policy=policy)
    try:
        report = run_scheduler(settings, tell)
    except BadPolicy as error:
        raise click.BadParameter(str(error)) from error
    show(report, as_json, _show_scheduler)


@bench.command()
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("--repeats", type=click.IntRange(1), help="of each size and way  [9]")
@click.option("--quick", is_flag=True, help="small hand-offs, few repeats: does it work at all")
def kv(as_json: bool, repeats: int | None, quick: bool) -> None:
    """Compare hand-offs with a socket and memcpy.

    Of 1, 16 and 256 MB, between two processes on this machine, by each transport and codec. No
    model is loaded.
    """
    from cluster.bench.kv import QUICK, KvSettings, run_kv, summary
    from cluster.bench.report import BenchFailed, machine

    settings = QUICK if quick else KvSettings()
    if repeats is not None:
        settings = dataclasses.replace(settings, repeats=repeats)
    host = machine()
    try:
        report = summary(host, settings, run_kv(settings, tell))
    except BenchFailed as error:
        raise click.ClickException(str(error)) from error
    show(report, as_json, _show_kv)


def _show(console: Console, report: dict[str, Any]) -> None:
    show_head(console, report)
    table = Table(box=None, pad_edge=False)
    columns = ("TTFT", "2nd token", "later tokens", "1st after prefill")
    for column in ("prompt", "server", *columns):
        table.add_column(column, justify="left" if column == "server" else "right")
    for tokens, result in report["results"].items():
        for name in ("plain", "baton"):
            times = result[name]
            keys = (*PLAIN_COLUMNS, "first_token_after_prefill_ms")
            table.add_row(tokens, name, *(milliseconds(times.get(key)) for key in keys))
    console.print(table)
    show_throughput(console, report, ("plain", "baton"))
    show_goals(console, report)


def _show_scheduler(console: Console, report: dict[str, Any]) -> None:
    host, settings = report["machine"], report["settings"]
    console.print(
        f"policy {settings['policy']}, {settings['requests_per_worker']} requests a worker; "
        f"{host['cpu_model']}, Python {host['python']}"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("workers", "placement", "p99", "of that, arrival", "a later token"):
        table.add_column(column, justify="right")
    for workers, result in report["results"].items():
        keys = ("request_us", "request_p99_us", "arrival_us", "token_us")
        table.add_row(workers, *(f"{result[key]:.1f} us" for key in keys))
    console.print(table)
    console.print()
    show_goals(console, report)


def _show_kv(console: Console, report: dict[str, Any]) -> None:
    host = report["machine"]
    console.print(f"{host['cpu_model']}, {host['cores']} cores; GB/s of KV, medians")
    table = Table(box=None, pad_edge=False)
    ways = list(dict.fromkeys(way for result in report["results"].values() for way in result))
    for column in ("hand-off", *(way.replace("_", " ") for way in ways)):
        table.add_column(column, justify="right")
    for size, result in report["results"].items():
        table.add_row(f"{size} MB", *(f"{result[way]['gb_s']:.2f}" for way in ways))
    console.print(table)
    for transport, why in report["missing"].items():
        console.print(f"without {transport}: {why}", style="dim")
    console.print()
    show_goals(console, report, "at least")


def _show_isolation(console: Console, report: dict[str, Any]) -> None:
    settings = report["settings"]
    show_head(console, report)
    console.print(
        f"{settings['streams']} streams; every {settings['burst_every_s']:g} s "
        f"{settings['burst_prompts']} prompts of {settings['long_tokens_min']} to "
        f"{settings['long_tokens_max']} tokens"
    )
    table = Table(box=None, pad_edge=False)
    columns = ("between tokens", "p99", "longest", "TTFT of long", "p99")
    for column in ("server", *columns, "tokens/s"):
        table.add_column(column, justify="left" if column == "server" else "right")
    for name, result in report["results"].items():
        keys = (
            "inter_token_p50",
            "inter_token_p99",
            "inter_token_max",
            "long_ttft",
            "long_ttft_p99",
        )
        times = [milliseconds(result[f"{key}_ms"]) for key in keys]
        table.add_row(name, *times, f"{result['tokens_per_s']:.1f}")
    console.print(table)
    console.print()
    show_goals(console, report, "at least")
