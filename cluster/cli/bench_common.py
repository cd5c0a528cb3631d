"""What the commands of `baton bench` that start servers have in common."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from cluster.config import BUNDLED_MODEL

if TYPE_CHECKING:
    from cluster.bench.sides import CompareSettings


Run = Callable[..., Awaitable[tuple[Any, ...]]]
Summary = Callable[..., dict[str, Any]]
"""A benchmark's sides measured, and its report of them."""


def compare_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a comparison, in the order of its help."""
    for option in reversed(
        (
            click.argument(
                "vllm_args", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM FLAGS]..."
            ),
            click.option("--json", "as_json", is_flag=True, help="print one JSON object"),
            click.option(
                "--model", type=Path, help="model folder; a random Llama of 113M if not given"
            ),
            click.option(
                "--prompt-tokens",
                multiple=True,
                help="prompt lengths, comma-separated or given again  [256,1024,4096]",
            ),
            click.option(
                "--repeats", type=click.IntRange(1), help="of each length, every round  [5; 3 long]"
            ),
            click.option("--rounds", type=click.IntRange(1), help="of each side in turn  [1]"),
            click.option(
                "--free-front-end",
                is_flag=True,
                help="let vLLM servers' HTTP front ends use both cores, as Baton's router may",
            ),
            click.option(
                "--quick", is_flag=True, help="bundled model, few requests: does it work at all"
            ),
        )
    ):
        command = option(command)
    return command


def compare_settings(
    quick: bool,
    prompt_tokens: tuple[str, ...],
    repeats: int | None,
    rounds: int | None,
    free_front_end: bool,
    vllm_args: tuple[str, ...],
) -> CompareSettings:
    from cluster.bench.sides import QUICK, CompareSettings

    given: dict[str, Any] = {"free_front_end": free_front_end, "vllm_args": vllm_args}
    if prompt_tokens:
        lengths = ",".join(prompt_tokens).split(",")
        if not all(length.isdigit() and int(length) for length in lengths):
            raise click.BadParameter(f"{','.join(prompt_tokens)!r} is not like 256,1024,4096")
        given["prompt_tokens"] = tuple(dict.fromkeys(map(int, lengths)))
    if repeats is not None:
        given |= {"repeats": repeats, "repeats_long": repeats}
    if rounds is not None:
        given["rounds"] = rounds
    return dataclasses.replace(QUICK if quick else CompareSettings(), **given)


def compared(
    run: Run,
    summary: Summary,
    settings: Any,
    model: Path | None,
    quick: bool,
    free_front_end: bool,
) -> dict[str, Any]:
    """Run a benchmark of Baton beside others, and give its report."""
    if quick and model is None:
        model = BUNDLED_MODEL
    folder = model.resolve() if model else None
    return measured(_compare(run, summary, settings, folder, free_front_end))


def measured(measuring: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Run a benchmark to its report, or to its error in one line."""
    from cluster.bench.report import BenchFailed

    try:
        return asyncio.run(_until_told_to_end(measuring))
    except asyncio.CancelledError as error:
        raise click.Abort from error
    except BenchFailed as error:
        raise click.ClickException(str(error)) from error


async def _until_told_to_end(
    measuring: Coroutine[Any, Any, dict[str, Any]],
) -> dict[str, Any]:
    """SIGTERM and SIGHUP end it as Ctrl-C does: the servers that it started end with it."""
    task = asyncio.current_task()
    assert task is not None
    for signum in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
    return await measuring


async def _compare(
    run: Run, summary: Summary, settings: Any, folder: Path | None, free_front_end: bool
) -> dict[str, Any]:
    from cluster.bench.model import describe_model
    from cluster.bench.report import machine
    from cluster.bench.servers import Servers

    host = machine()
    async with Servers(free_front_end) as servers:
        model = folder or servers.folder / "random-llama"
        if folder is None:
            tell("making a random Llama")
            await _make_model(model)
        described = describe_model(model)
        name = "bundled" if folder == BUNDLED_MODEL else model.name
        sides = await run(model, described["vocab_size"], settings, servers, tell)
    return summary(host, {"name": name, **described}, settings, *sides)


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


def tell(what: str) -> None:
    click.echo(what, err=True)


def show(
    report: dict[str, Any], as_json: bool, human: Callable[[Console, dict[str, Any]], None]
) -> None:
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        human(Console(highlight=False), report)


def show_head(console: Console, report: dict[str, Any]) -> None:
    host, model = report["machine"], report["model"]
    console.print(
        f"{model['name']}, {(model['parameters'] or 0) / 1e6:.0f}M parameters, float32; "
        f"{host['cpu_model']}, {host['cores']} cores, vLLM {host['vllm']}"
    )


def show_throughput(console: Console, report: dict[str, Any], sides: tuple[str, ...]) -> None:
    throughput, settings = report["throughput"], report["settings"]
    console.print(f"\n{settings['streams']} streams of {settings['stream_prompt_tokens']} tokens:")
    for name in sides:
        side = throughput[name]
        console.print(
            f"  {name:<6} {side['tokens_per_s']:.1f} tokens/s, "
            f"between tokens {milliseconds(side['inter_token_ms'])}, "
            f"p99 {milliseconds(side['inter_token_p99_ms'])}"
        )
    console.print()


def show_goals(console: Console, report: dict[str, Any], bound: str = "at most") -> None:
    for goal in report["goals"]:
        mark = "[green]met[/green]   " if goal["met"] else "[red]missed[/red]"
        console.print(f"  {mark} {goal['name']}: {goal['value']} ({bound} {goal['goal']})")


def milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} ms"
