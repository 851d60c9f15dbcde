"""The program: `llama-router`, and `python -m router` where that is not on the PATH.

The command line and the server meet here: neither knows the other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from router.system import sighup

if TYPE_CHECKING:
    from router.catalog.load import Load


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; `arguments` are those of the process, unless given."""
    sighup.hold()
    try:
        from router.cli import main as cli  # most of a start goes by here

        cli.main(_serve, arguments)
    except KeyboardInterrupt:
        sys.exit(130)


def _serve(load: Load) -> None:
    """Serve until a signal. Raises CannotServe."""
    from router.server import serve  # most of a second, which no other command needs

    serve(load)


if __name__ == "__main__":
    main()
