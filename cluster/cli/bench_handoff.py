"""`baton bench handoff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from cluster.bench.sides import CompareSettings

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
@click.option(
    "--link-gbit-s",
    type=click.FloatRange(0, min_open=True),
    help="only Baton, its workers at the ends of a link of this rate (needs root)",
)
@click.option(
    "--link-delay-ms", type=click.FloatRange(0), default=2.0, help="of that link, each way  [2]"
)
def handoff(
    as_json: bool,
    quick: bool,
    model: Path | None,
    peer: Path,
    no_peer: bool,
    link_gbit_s: float | None,
    link_delay_ms: float,
    **given: Any,
) -> None:
    """Compare the hand-off with that of vLLM's NixlConnector.

    Beside one plain vLLM server: two vLLM servers behind vllm-router, then Baton with a prefill and
    a decode worker. Any flag of `vllm serve` can follow, and is for all of them.

    With --link-gbit-s, measure how much of the hand-off over such a link is hidden by prefill.
    """
    settings = compare_settings(quick, **given)
    if link_gbit_s is None:
        report = _beside_peer(settings, model, quick, None if no_peer else peer.resolve())
        show(report, as_json, _show)
    else:
        report = _over_link(settings, model, quick, link_gbit_s, link_delay_ms)
        show(report, as_json, _show_linked)


def _beside_peer(
    settings: CompareSettings, model: Path | None, quick: bool, packages: Path | None
) -> dict[str, Any]:
    from cluster.bench.handoff import run_handoff, summary
    from cluster.bench.nixl import peer_versions
    from cluster.bench.report import BenchFailed

    try:
        versions = peer_versions(packages) if packages else {}
    except BenchFailed as error:
        raise click.ClickException(str(error)) from error

    async def run(*of_run: Any) -> tuple[Any, ...]:
        return versions, await run_handoff(packages, *of_run)

    return compared(run, summary, settings, model, quick, settings.free_front_end)


def _over_link(
    settings: CompareSettings, model: Path | None, quick: bool, gbit_s: float, delay_ms: float
) -> dict[str, Any]:
    from cluster.bench.link import LinkSettings, check_link_possible
    from cluster.bench.linked import run_linked, summary
    from cluster.bench.report import BenchFailed

    link = LinkSettings(rate_bits_s=gbit_s * 1e9, delay_s=delay_ms / 1e3)
    try:
        check_link_possible()
    except BenchFailed as error:
        raise click.ClickException(str(error)) from error

    async def run(*of_run: Any) -> tuple[Any, ...]:
        return link, await run_linked(link, *of_run)

    return compared(run, summary, settings, model, quick, settings.free_front_end)


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


def _show_linked(console: Console, report: dict[str, Any]) -> None:
    show_head(console, report)
    link = report["settings"]["link"]
    console.print(
        f"a link of {link['rate_bits_s'] / 1e9:g} Gbit/s, {link['delay_s'] * 1e3:g} ms each way"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("prompt", "KV", "its own time", "not hidden", "hidden", "TTFT", "2nd token"):
        table.add_column(column, justify="right")
    for tokens, result in report["results"].items():
        table.add_row(
            tokens,
            f"{result['kv_bytes'] / 1e6:.1f} MB",
            milliseconds(result["transfer_ms"]),
            milliseconds(result["exposed_ms"]),
            f"{result['hidden']:.1%}",
            milliseconds(result["ttft_ms"]),
            milliseconds(result["second_token_ms"]),
        )
    console.print(table)
    console.print()
    show_goals(console, report, "at least")
