"""`baton bench`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from cluster.config import BUNDLED_MODEL

if TYPE_CHECKING:
    from cluster.bench.serve import ServeSettings

Run = Callable[..., Awaitable[tuple[Any, Any]]]
Summary = Callable[..., dict[str, Any]]
"""A benchmark's two sides measured, and its report of them."""
PLAIN_COLUMNS = ("ttft_ms", "second_token_ms", "inter_token_ms")


@click.group()
def bench() -> None:
    """Measure Baton on this machine."""


@bench.command(context_settings={"ignore_unknown_options": True})
@click.argument("vllm_args", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM FLAGS]...")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("--model", type=Path, help="model folder; a random Llama of 113M if not given")
@click.option("--prompt-tokens", help="prompt lengths, comma-separated  [256,1024,4096]")
@click.option("--repeats", type=click.IntRange(1), help="of each length, every round  [5; 3 long]")
@click.option("--rounds", type=click.IntRange(1), help="of plain vLLM, then Baton  [1]")
@click.option(
    "--free-front-end",
    is_flag=True,
    help="let the plain server's HTTP front end use the second core, as Baton's router may",
)
@click.option("--quick", is_flag=True, help="bundled model, few requests: does it work at all")
def serve(as_json: bool, quick: bool, model: Path | None, **given: Any) -> None:
    """Compare a prefill and a decode worker with one plain vLLM server.

    Any flag of `vllm serve` can follow, and is for both servers.
    """
    from cluster.bench.serve import run_serve, summary

    settings = _settings(quick, **given)
    if quick and model is None:
        model = BUNDLED_MODEL
    report = _compared(run_serve, summary, settings, model, settings.free_front_end)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report)


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
    """Compare time between tokens while long prompts arrive in bursts.

    Two plain vLLM servers, requests taking turns between them, and a prefill and a decode worker;
    one core each. Any flag of `vllm serve` can follow, and is for all of them.
    """
    from cluster.bench.isolation import QUICK, IsolationSettings, run_isolation, summary

    changes = {name: value for name, value in {**given, "window_s": seconds}.items() if value}
    settings = dataclasses.replace(
        QUICK if quick else IsolationSettings(),
        vllm_args=vllm_args,
        **changes,  # type: ignore[arg-type]
    )
    if quick and model is None:
        model = BUNDLED_MODEL
    # As Baton's router may use both cores, so may the plain servers' front ends.
    report = _compared(run_isolation, summary, settings, model, free_front_end=True)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show_isolation(report)


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
        report = run_scheduler(settings, _tell)
    except BadPolicy as error:
        raise click.BadParameter(str(error)) from error
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show_scheduler(report)


@bench.command()
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("--repeats", type=click.IntRange(1), help="of each size and way  [9]")
@click.option("--quick", is_flag=True, help="small hand-offs, few repeats: does it work at all")
def kv(as_json: bool, repeats: int | None, quick: bool) -> None:
    """Compare hand-offs of 1, 16 and 256 MB with a plain socket and with memcpy.

    Between two processes on this machine, through gRPC with each codec. No model is loaded.
    """
    from cluster.bench.kv import QUICK, KvSettings, run_kv, summary
    from cluster.bench.report import BenchFailed, machine

    settings = QUICK if quick else KvSettings()
    if repeats is not None:
        settings = dataclasses.replace(settings, repeats=repeats)
    host = machine()
    try:
        report = summary(host, settings, run_kv(settings, _tell))
    except BenchFailed as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show_kv(report)


def _settings(
    quick: bool,
    prompt_tokens: str | None,
    repeats: int | None,
    rounds: int | None,
    free_front_end: bool,
    vllm_args: tuple[str, ...],
) -> ServeSettings:
    from cluster.bench.serve import QUICK, ServeSettings

    given: dict[str, Any] = {"free_front_end": free_front_end, "vllm_args": vllm_args}
    if prompt_tokens is not None:
        lengths = prompt_tokens.split(",")
        if not all(length.isdigit() and int(length) for length in lengths):
            raise click.BadParameter(f"{prompt_tokens!r} is not like 256,1024,4096")
        given["prompt_tokens"] = tuple(dict.fromkeys(map(int, lengths)))
    if repeats is not None:
        given |= {"repeats": repeats, "repeats_long": repeats}
    if rounds is not None:
        given["rounds"] = rounds
    return dataclasses.replace(QUICK if quick else ServeSettings(), **given)


def _compared(
    run: Run, summary: Summary, settings: Any, model: Path | None, free_front_end: bool
) -> dict[str, Any]:
    """Run a benchmark of Baton beside plain vLLM, and give its report."""
    from cluster.bench.report import BenchFailed

    folder = model.resolve() if model else None
    try:
        return asyncio.run(_compare(run, summary, settings, folder, free_front_end))
    except asyncio.CancelledError as error:
        raise click.Abort from error
    except BenchFailed as error:
        raise click.ClickException(str(error)) from error


async def _compare(
    run: Run, summary: Summary, settings: Any, folder: Path | None, free_front_end: bool
) -> dict[str, Any]:
    from cluster.bench.model import describe_model
    from cluster.bench.report import machine
    from cluster.bench.servers import Servers

    task = asyncio.current_task()
    assert task is not None
    for signum in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
    host = machine()
    async with Servers(free_front_end) as servers:
        model = folder or servers.folder / "random-llama"
        if folder is None:
            _tell("making a random Llama")
            await _make_model(model)
        described = describe_model(model)
        name = "bundled" if folder == BUNDLED_MODEL else model.name
        plain, baton = await run(model, described["vocab_size"], settings, servers, _tell)
    return summary(host, {"name": name, **described}, settings, plain, baton)


async def _make_model(folder: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster.bench.model", str(folder)),
        stdout=subprocess.DEVNULL,
    )
    try:
        if await process.wait():
            raise click.ClickException("the model could not be made: see the messages above")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def _tell(what: str) -> None:
    click.echo(what, err=True)


def _show(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    host, model = report["machine"], report["model"]
    console.print(
        f"{model['name']}, {(model['parameters'] or 0) / 1e6:.0f}M parameters, float32; "
        f"{host['cpu_model']}, {host['cores']} cores, vLLM {host['vllm']}"
    )
    table = Table(box=None, pad_edge=False)
    columns = ("TTFT", "2nd token", "later tokens", "1st after prefill")
    for column in ("prompt", "server", *columns):
        table.add_column(column, justify="left" if column == "server" else "right")
    for tokens, result in report["results"].items():
        for name in ("plain", "baton"):
            times = result[name]
            keys = (*PLAIN_COLUMNS, "first_token_after_prefill_ms")
            table.add_row(tokens, name, *(_milliseconds(times.get(key)) for key in keys))
    console.print(table)
    throughput, settings = report["throughput"], report["settings"]
    console.print(f"\n{settings['streams']} streams of {settings['stream_prompt_tokens']} tokens:")
    for name in ("plain", "baton"):
        side = throughput[name]
        console.print(
            f"  {name:<6} {side['tokens_per_s']:.1f} tokens/s, "
            f"between tokens {_milliseconds(side['inter_token_ms'])}, "
            f"p99 {_milliseconds(side['inter_token_p99_ms'])}"
        )
    console.print()
    _show_goals(console, report)


def _show_scheduler(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
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
    _show_goals(console, report)


def _show_kv(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    host = report["machine"]
    console.print(f"{host['cpu_model']}, {host['cores']} cores; GB/s of KV, medians")
    table = Table(box=None, pad_edge=False)
    ways = list(dict.fromkeys(way for result in report["results"].values() for way in result))
    for column in ("hand-off", *(way.replace("_", " ") for way in ways)):
        table.add_column(column, justify="right")
    for size, result in report["results"].items():
        table.add_row(f"{size} MB", *(f"{result[way]['gb_s']:.2f}" for way in ways))
    console.print(table)
    console.print()
    _show_goals(console, report, "at least")


def _show_isolation(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    host, model, settings = report["machine"], report["model"], report["settings"]
    console.print(
        f"{model['name']}, {(model['parameters'] or 0) / 1e6:.0f}M parameters, float32; "
        f"{host['cpu_model']}, {host['cores']} cores, vLLM {host['vllm']}\n"
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
        times = [_milliseconds(result[f"{key}_ms"]) for key in keys]
        table.add_row(name, *times, f"{result['tokens_per_s']:.1f}")
    console.print(table)
    console.print()
    _show_goals(console, report, "at least")


def _show_goals(console: Console, report: dict[str, Any], bound: str = "at most") -> None:
    for goal in report["goals"]:
        mark = "[green]met[/green]   " if goal["met"] else "[red]missed[/red]"
        console.print(f"  {mark} {goal['name']}: {goal['value']} ({bound} {goal['goal']})")


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} ms"
