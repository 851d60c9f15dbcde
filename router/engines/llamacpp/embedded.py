"""Embedded engine: a llama-server built on the `xllamacpp` wheel, for machines without one.

    python -m router.engines.llamacpp.embedded -m model.gguf --port 8085 [flags of llama-server]

It accepts llama-server's flags and environment variables, has its defaults, serves its HTTP interface, and follows
its protocol with the parent process (if `LLAMA_SERVER_ROUTER_PORT` is set: lines of
`cmd_child_to_router:state:{…}` on stdout; `cmd_router_to_child:exit` on stdin, or the end of stdin, ends it).
Flags that the wheel cannot set are rejected by name; only those that cannot affect a response are ignored.

Not supported: downloads, llama-server's own router mode, llama.cpp's `config.ini` files. A new process is started
for every load, so it imports little, and `xllamacpp`, which takes longest, only after parsing the flags.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from typing import Any, NoReturn

from router.engines.llamacpp.embedded_flags import PASSED_OVER, SUPPORTED, UsageError, parameters
from router.engines.llamacpp.flags import FORMS, FlagError, Flags

_EXIT_COMMAND = b"cmd_router_to_child:exit"


def command(python: str = sys.executable) -> list[str]:
    """Return the command line that runs this module from any directory, without flags.

    Compared with `-m` it saves some milliseconds, and neither the current directory nor a `PYTHON…` variable can
    shadow a module: no `site`, and only the required folders on the path.
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
    """Return the version of xllamacpp; None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("xllamacpp")
    except PackageNotFoundError:
        return None


def main() -> int:
    """Run the server. Returns only if there is nothing to serve."""
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
    """Return a descriptor of stdin, and a process that ends this one on any event there.

    A thread is not enough, as xllamacpp holds the GIL while it loads. Its C++ side also reads stdin, and is given
    a pipe that stays silent while this process runs; its end also tells the watcher that this process has exited.
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
    """Wait for the end while C++ threads serve, as long as `server` exists.

    The exit is immediate: the router has already drained the requests, and the exit frees everything that C++
    destructors would.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)  # wakes this thread, whichever receives the signal
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
        if not chunk:  # the router has exited, so nothing reads the output
            os._exit(1)
        received += chunk
        if _EXIT_COMMAND in received:
            os._exit(0)
        received = received[received.rfind(b"\n") + 1 :]


def _help() -> str:
    """Return the help text in llama-server's layout, from which the router reads the supported flags."""
    lines = [f"llama-server's flags, as far as xllamacpp {available()} has them:", ""]
    for form in (FORMS[name] for name in SUPPORTED):
        spellings = ", ".join((*form.spellings, *form.negations))
        variable = f"    (env: {form.variable})" if form.variable else ""
        lines.append(f"{spellings}{' N' * form.arity}{variable}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
