"""`python -m router` is `llama-router`, where that is not on the PATH."""

from router.cli import main

if __name__ == "__main__":
    main()
