"""`baton`: start, look at and stop a cluster."""

from __future__ import annotations

import sys

import click

from cluster.cli.bench import bench
from cluster.cli.down import down
from cluster.cli.drain import drain
from cluster.cli.router import router
from cluster.cli.status import status
from cluster.cli.up import up
from cluster.errors import ERROR_PREFIX, one_line


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="baton")
def cli() -> None:
    """Serve a large language model from a prefill/decode-split cluster of vLLM workers.

    \b
    baton up                        the bundled model, one prefill and one decode worker
    baton up Qwen/Qwen3-0.6B --prefill 1 --decode 2 --max-model-len 8192
    baton status                    the running cluster
    baton drain decode-0            take a worker out without losing a request
    baton router --port 8001        one more router over the same workers
    baton down                      stop it
    baton bench serve               compare it with one plain vLLM server
    """


cli.add_command(up)
cli.add_command(status)
cli.add_command(down)
cli.add_command(drain)
cli.add_command(router)
cli.add_command(bench)


def main() -> None:
    """Errors are one line and exit code 1 (2 for wrong usage), never a traceback."""
    try:
        # Commands return None; leaving early with a code returns the code.
        sys.exit(cli.main(prog_name="baton", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        if "--verbose" in sys.argv:
            raise
        sys.exit(f"{ERROR_PREFIX}{one_line(error)}")


if __name__ == "__main__":
    main()
