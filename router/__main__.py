"""Entry point of `llama-router`, and of `python -m router` where the program is not on the PATH.

It connects the command line and the server, which do not import each other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from router.system import sighup

if TYPE_CHECKING:
    from router.catalog.load import Load


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` default to those of the process."""
    sighup.hold()
    try:
        from router.cli import main as cli  # takes most of the start-up time

        cli.main(_serve, arguments)
    except KeyboardInterrupt:
        sys.exit(130)


def _serve(load: Load) -> None:
    """Serve until a signal arrives. Raises CannotServe."""
    from router.server import serve  # takes most of a second, which no other command needs

    serve(load)


if __name__ == "__main__":
    main()
