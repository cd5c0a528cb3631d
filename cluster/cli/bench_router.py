"""`baton bench router`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from cluster.cli.bench_common import measured, milliseconds, show, show_goals, tell

if TYPE_CHECKING:
    from cluster.bench.router import RouterSettings


@click.command()
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("--streams", type=click.IntRange(1), help="concurrent  [64]")
@click.option("--rounds", type=click.IntRange(1), help="of vLLM's API server, then Baton  [5]")
@click.option("--quick", is_flag=True, help="few streams, short: does it work at all")
def router(as_json: bool, streams: int | None, rounds: int | None, quick: bool) -> None:
    """Compare Baton's router with vLLM's own API server.

    Over engines without a model that answer at once. Each server has one core; client, stub workers
    and Redis share a second.
    """
    from cluster.bench.router import QUICK, RouterSettings

    given = {"streams": streams, "rounds": rounds}
    settings = dataclasses.replace(
        QUICK if quick else RouterSettings(), **{k: v for k, v in given.items() if v}
    )
    show(measured(_measure(settings)), as_json, _show)


async def _measure(settings: RouterSettings) -> dict[str, Any]:
    from cluster.bench.report import machine
    from cluster.bench.router import run_router, summary
    from cluster.bench.servers import Servers

    host = machine()
    async with Servers() as servers:
        return summary(host, settings, await run_router(settings, servers, tell))


def _show(console: Console, report: dict[str, Any]) -> None:
    host, settings = report["machine"], report["settings"]
    console.print(
        f"{settings['streams']} streams; {host['cpu_model']}, one core a server, "
        f"vLLM {host['vllm']}\n"
        f"latency at a step every {settings['interval_s'] * 1e3:g} ms, from step to client"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("server", "tokens/s", "tokens an event", "CPU a token", "latency", "p99"):
        table.add_column(column, justify="left" if column == "server" else "right")
    for name, result in report["results"].items():
        times = (milliseconds(result[f"latency_{key}_ms"]) for key in ("p50", "p99"))
        table.add_row(
            name,
            f"{result['tokens_per_s']:.0f}",
            f"{result['tokens_per_event']:.2f}",
            f"{result['cpu_us_per_token']:.1f} us",
            *times,
        )
    console.print(table)
    console.print()
    show_goals(console, report, "at least")
