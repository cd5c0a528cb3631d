"""`baton bench handoff`."""

from __future__ import annotations

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
)

PEER_FOLDER = Path(".peer")


@click.command(context_settings={"ignore_unknown_options": True})
@compare_options
@click.option(
    "--peer",
    type=Path,
    default=PEER_FOLDER,
    help="folder with nixl and vllm-router  [.peer, where 'make setup-peer' puts them]",
)
@click.option("--no-peer", is_flag=True, help="only Baton and one plain vLLM server")
def handoff(
    as_json: bool, quick: bool, model: Path | None, peer: Path, no_peer: bool, **given: Any
) -> None:
    """Compare the hand-off with that of vLLM's NixlConnector.

    Beside one plain vLLM server: two vLLM servers behind vllm-router, then Baton with a prefill and
    a decode worker. Any flag of `vllm serve` can follow, and is for all of them.
    """
    from cluster.bench.handoff import run_handoff, summary
    from cluster.bench.report import BenchFailed
    from cluster.bench.servers import peer_versions

    settings = compare_settings(quick, **given)
    packages = None if no_peer else peer.resolve()
    try:
        versions = peer_versions(packages) if packages else {}
    except BenchFailed as error:
        raise click.ClickException(str(error)) from error

    async def run(*of_run: Any) -> tuple[Any, ...]:
        return versions, await run_handoff(packages, *of_run)

    report = compared(run, summary, settings, model, quick, settings.free_front_end)
    show(report, as_json, _show)


def _show(console: Console, report: dict[str, Any]) -> None:
    show_head(console, report)
    table = Table(box=None, pad_edge=False)
    columns = ("TTFT", "1st after prefill", "2nd after prefill")
    for column in ("prompt", "server", *columns):
        table.add_column(column, justify="left" if column == "server" else "right")
    keys = ("ttft_ms", "first_token_after_prefill_ms", "second_token_after_prefill_ms")
    sides = tuple(report["throughput"])
    for tokens, result in report["results"].items():
        for name in sides:
            table.add_row(tokens, name, *(milliseconds(result[name][key]) for key in keys))
    console.print(table)
    show_throughput(console, report, sides)
    show_goals(console, report)
