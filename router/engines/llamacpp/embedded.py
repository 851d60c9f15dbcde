"""A llama-server made of the `xllamacpp` wheel, for machines that have no llama-server.

    python -m router.engines.llamacpp.embedded -m model.gguf --port 8085 [flags of llama-server]

It takes llama-server's flags and environment variables, has its defaults, serves its HTTP interface, and keeps
to its protocol with the process that started it (where `LLAMA_SERVER_ROUTER_PORT` is set: lines of
`cmd_child_to_router:state:{…}` on stdout; `cmd_router_to_child:exit` on stdin, or the end of stdin, ends it).
What the wheel has no way to set is refused by name; only what cannot change an answer is passed over.

Not here: downloads, llama-server's own router mode, llama.cpp's `config.ini` files. The process starts anew for
every load of a model, so it imports little, and `xllamacpp`, which takes longest, only after reading its flags.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from typing import Any, NoReturn

from router.engines.llamacpp.embedded_flags import HONOURED, PASSED_OVER, UsageError, parameters
from router.engines.llamacpp.flags import FORMS, FlagError, Flags

_EXIT_COMMAND = b"cmd_router_to_child:exit"


def command(python: str = sys.executable) -> list[str]:
    """What to put before the flags to run this module, whatever the current directory.

    Compared with `-m` it saves some milliseconds, and nothing in the current directory or in a `PYTHON…`
    variable can stand in for a module: no `site`, and only the folders that are needed on the path.
    """
    from importlib.util import find_spec

    folders = [os.path.abspath(os.path.join(os.path.dirname(__file__), "../../.."))]
    wheel = find_spec("xllamacpp")
    if wheel is not None and wheel.origin is not None:
        folders.append(os.path.dirname(os.path.dirname(wheel.origin)))
    paths = f"import sys; sys.path[:0] = {folders!r}"
    start = f"{paths}; from router.engines.llamacpp.embedded import main; sys.exit(main())"
    return [python, "-I", "-S", "-c", start]


def available() -> str | None:
    """The version of xllamacpp, if it is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("xllamacpp")
    except PackageNotFoundError:
        return None


def main() -> int:
    """Returns only if there is nothing to serve."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    stdin = watcher = None
    if "LLAMA_SERVER_ROUTER_PORT" in os.environ:
        stdin, watcher = _watch_stdin_while_loading()
    try:
        flags = Flags(sys.argv[1:], os.environ, by_hand=False)
        if flags.last("help"):
            print(_help())
            return 0
        if flags.last("version"):
            print(f"xllamacpp {available()}")
            return 0
        params = parameters(flags)
        if params.path_prompts_log_dir:
            os.makedirs(params.path_prompts_log_dir, exist_ok=True)
    except OSError as error:
        return _say(f"error: invalid argument: --log-prompts-dir: {error}", 2)
    except ImportError as error:
        return _say(f"xllamacpp can't be imported: {error}", 1)
    except (FlagError, UsageError) as error:
        return _say(f"error: invalid argument: {error}", 2)
    if passed_over := [flag.spelling for flag in flags.given if flag.name in PASSED_OVER]:
        _say(f"passes over {', '.join(passed_over)}")

    import xllamacpp

    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, MemoryError) as error:
        return _say(f"can't serve {params.model.path}; the lines above say why ({error})", 1)
    return _serve(server, stdin, watcher)


def _say(message: str, exit_code: int = 0) -> int:
    print(f"router.embedded: {message}", file=sys.stderr, flush=True)
    return exit_code


def _watch_stdin_while_loading() -> tuple[int, int]:
    """A descriptor of stdin, and the process that ends this one if anything happens there.

    A thread would not do: xllamacpp holds the interpreter's lock for as long as it loads. Its C++ side reads
    stdin, too, but for us; it gets a pipe that says nothing as long as this process lives. (That is how the
    watcher learns that it doesn't any more.)
    """
    engine, stdin = os.getpid(), os.dup(0)
    silence, alive = os.pipe()
    os.dup2(silence, 0)
    if watcher := os.fork():
        return stdin, watcher
    os.close(alive)
    os.close(1)
    readable, _, _ = select.select([stdin, silence], [], [])
    if silence not in readable:
        os.kill(engine, signal.SIGTERM)
    os._exit(0)


def _serve(server: Any, stdin: int | None, watcher: int | None) -> NoReturn:
    """C++ threads do the work while `server` lives; this one waits for the end.

    The end is immediate: the router has let every request finish that it wants finished, and what the C++
    destructors would free goes with the process.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)  # whichever thread the signal hits, this one wakes
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    if watcher is None:
        _say(f"serves {server.listening_address} until it is interrupted")
    else:
        os.kill(watcher, signal.SIGKILL)
        os.waitpid(watcher, 0)
    received = b""
    while True:
        readable, _, _ = select.select([told] if stdin is None else [told, stdin], [], [])
        if stdin is None or told in readable:
            os._exit(0)
        chunk = os.read(stdin, 4096)
        if not chunk:  # the router is gone, and with it whoever would read a last word
            os._exit(1)
        received += chunk
        if _EXIT_COMMAND in received:
            os._exit(0)
        received = received[received.rfind(b"\n") + 1 :]


def _help() -> str:
    """As llama-server lays it out, which is how who starts it tells what it takes."""
    lines = [f"llama-server's flags, as far as xllamacpp {available()} has them:", ""]
    for form in (FORMS[name] for name in HONOURED):
        spellings = ", ".join((*form.spellings, *form.negations))
        variable = f"    (env: {form.variable})" if form.variable else ""
        lines.append(f"{spellings}{' N' * form.arity}{variable}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
