"""Run one router in the foreground: `python -m router SETTINGS_JSON`, or with the settings in the
environment, which nobody else on the machine can read."""

from __future__ import annotations

import logging
import os
import sys

import uvloop

from cluster.config import ROUTER_SETTINGS
from cluster.errors import ERROR_PREFIX, one_line
from cluster.logs import configure_logs
from router.settings import RouterSettings


def main() -> None:
    configure_logs()
    # Processes that it starts need not have them.
    in_environment = os.environ.pop(ROUTER_SETTINGS, "")
    settings = RouterSettings.from_json(sys.argv[1] if len(sys.argv) > 1 else in_environment)
    # After the arguments are read: this imports vLLM.
    from router.server import run_router

    try:
        uvloop.run(run_router(settings))
    except KeyboardInterrupt:
        return
    except Exception as error:
        logging.getLogger("router").debug("the router failed", exc_info=True)
        sys.exit(f"{ERROR_PREFIX}{one_line(error)}")


if __name__ == "__main__":
    main()
