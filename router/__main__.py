"""The program: `llama-router`, and `python -m router` where that is not on the PATH."""

import sys

from router.system import sighup as hang_up


def main() -> None:
    hang_up.hold()
    try:
        from router.cli import main as cli  # most of a start goes by here

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
