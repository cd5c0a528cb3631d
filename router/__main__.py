"""Run one router in the foreground: `python -m router SETTINGS_JSON`."""

from __future__ import annotations

import logging
import sys

import uvloop

from cluster.errors import ERROR_PREFIX, one_line
from cluster.logs import configure_logs
from router.settings import RouterSettings


def main() -> None:
    configure_logs()
    settings = RouterSettings.from_json(sys.argv[1])
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
