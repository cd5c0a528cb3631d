"""`baton up`."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from typing import Any

import click
from rich.console import Console

from cluster.before_start import StartFailed
from cluster.cli.options import config_options, flags_given
from cluster.config import BadConfig, BatonConfig, load_config
from cluster.config_names import ALIKE_MIN, did_you_mean, flag, leaves
from cluster.supervisor import Progress, Supervisor

HANDOFF_FLAGS = "--handoff-"
"""vLLM has none that begin so."""


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] [VLLM FLAGS]...")
@config_options()
def up(arguments: tuple[str, ...], **flags: Any) -> None:
    """Start a cluster and serve MODEL until Ctrl-C.

    MODEL is a folder or a Hugging Face name; without one, the bundled model is served. Any flag of
    `vllm serve` can follow. Each value can also be set by environment variable (BATON_PORT,
    BATON_HANDOFF__INBOX_BYTES) and in baton.yaml; flags come first, then the environment.
    """
    config = config_given(arguments, flags)
    _check(config)
    try:
        asyncio.run(_serve(config))
    except StartFailed as error:
        raise StartFailed(f"{error}{_meant_by(str(error))}") from error


def config_given(arguments: tuple[str, ...], flags: dict[str, Any]) -> BatonConfig:
    """The configuration, with a model and flags of `vllm serve` that follow Baton's own flags."""
    given = flags_given(flags)
    rest = list(arguments)
    _refuse_misspelt(rest)
    if rest and not rest[0].startswith("-"):
        model = rest.pop(0)
        if given.setdefault("model", model) != model:
            raise click.UsageError(f"two models: {model!r}, and {given['model']!r} with --model")
    config = load_config(given)
    if rest:
        config = config.model_copy(update={"vllm_args": [*config.vllm_args, *rest]})
    return config


def _refuse_misspelt(arguments: list[str]) -> None:
    """vLLM's parser would refuse it, too, but in the router and the workers, without a hint."""
    for argument in arguments:
        if argument.replace("_", "-").startswith(HANDOFF_FLAGS):
            raise click.UsageError(f"{argument.split('=')[0]}: unknown{_meant(argument)}")


def _meant(argument: str) -> str:
    names: dict[str, str] = {}
    for path, _ in leaves(BatonConfig):
        # For --handoff-codec, --codec may be given.
        names |= {flag(part).lstrip("-"): flag(path) for part in (path[-1:], path)}
    given = argument.split("=")[0].replace("_", "-").lstrip("-")
    return did_you_mean(given, names, ALIKE_MIN)


def _meant_by(problem: str) -> str:
    """A flag that neither has: vLLM's parser refuses it, which does not know Baton's."""
    _, found, words = problem.partition("unrecognized arguments: ")
    for word in words.split() if found else ():
        if word.startswith("--") and (hint := _meant(word)):
            return hint
    return ""


def _check(config: BatonConfig) -> None:
    """That no value would do nothing beside another."""
    if config.ray_address and config.local_nodes:
        raise BadConfig("local_nodes: none are started where a Ray cluster is joined (ray_address)")
    if config.keep_workers and not config.ray_address:
        raise BadConfig("keep_workers: Ray ends with `baton up` unless one is joined (ray_address)")
    if config.keep_workers and not config.redis_url:
        raise BadConfig("keep_workers: the embedded Redis ends with `baton up`: give a redis_url")


async def _serve(config: BatonConfig) -> None:
    console = Console(highlight=False)
    started = time.monotonic()

    def report(progress: Progress) -> None:
        line = f"[dim]{time.monotonic() - started:5.1f} s[/dim]  {progress.what:<12} "
        console.print(line + f"[bold]{progress.state:<9}[/bold] ", end="")
        console.print(progress.detail, markup=False, soft_wrap=True)

    supervisor = Supervisor(config, report)
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            supervisor.stop_routers()
        stop.set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signum, on_signal)
    async with supervisor:
        serving = asyncio.create_task(_start_and_wait(supervisor, console))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if serving.done():
            serving.result()
            return
        console.print("\nstopping")
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def _start_and_wait(supervisor: Supervisor, console: Console) -> None:
    await supervisor.start()
    config, url = supervisor.config, supervisor.url
    console.print()
    urls = " and ".join(f"[bold]{each}/v1[/bold]" for each in supervisor.urls)
    console.print(f"Serving [bold]{supervisor.model_name}[/bold] at {urls}", soft_wrap=True)
    console.print(
        f"Dashboard at {url}/dashboard, metrics at {url}/metrics. Ctrl-C stops it. Try:\n",
        soft_wrap=True,
    )
    prompt = "k7=493; k12=018; k103=772; k12?" if config.model is None else "Say hello"
    message = {"role": "user", "content": prompt}
    body = json.dumps({"model": supervisor.model_name, "messages": [message]})
    console.print(
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n",
        markup=False,
        soft_wrap=True,
    )
    await supervisor.wait()
