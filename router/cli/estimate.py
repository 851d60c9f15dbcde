"""`llama-router estimate MODEL.gguf [flags…]`: what a model would take, before it is configured or downloaded.

MODEL is a file, an http(s) URL, `hf.co/USER/REPO/FILE.gguf`, or `hf.co/USER/REPO[:QUANT]` as `pull` takes it, with
its projector; of what is elsewhere only the header is fetched.
FLAGS are llama-server's. A file is given to the installed engine's own tool to judge, if there is one; the rest
goes by formula.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import math
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from router import __version__
from router.config.names import HUB_HOSTS
from router.config.schema import System
from router.engines.llamacpp import adapters, footprint
from router.engines.llamacpp.binary import NoEngine, find_binary
from router.engines.llamacpp.flags import FlagError, Flags, argv
from router.engines.llamacpp.listed_devices import Listed
from router.engines.llamacpp.plan import alternatives
from router.engines.llamacpp.purpose import flags_for
from router.engines.llamacpp.sizing import EngineKind, Files, Sizer
from router.formats import gguf
from router.formats.gguf import GGUF, GGUFError, TruncatedGGUF
from router.hardware.devices import Devices
from router.memory.ledger import Ledger
from router.memory.measurements import Learned
from router.memory.plan import Alternative, Footprint, Ground, Share, Unusable
from router.scheduling.messages import Placement
from router.store.repository import BadReference, Choice, NoChoice, Reference, gated, parse
from router.system.devices import Device
from router.system.printable import line, printable

FIRST_BYTES = 8 << 20
"""Enough for the header of nearly every model: a vocabulary of 150,000 tokens and its merges take 6 MB."""
FIRST_BYTES_OF_OTHERS = 256 << 10
"""The same for the parts after the first of a split model, which have no vocabulary."""
MOST_BYTES = 256 << 20
TIMEOUT_SEC = 30.0

_REFUSALS = {
    401: "it asks for a token: set HF_TOKEN",
    403: "access is denied: check HF_TOKEN, and the model's licence on its page",
    404: "there is no such file",
}
_PART_NUMBER = re.compile(r"-00001-of-(\d{5})\.gguf$", re.IGNORECASE)


class CannotEstimate(Exception):
    """The model can't be read; the message says why and what to do."""


def run(options: argparse.Namespace) -> None:
    """Prints the table. Exits with 1 if the model can't be read, with 2 if a flag makes no sense."""
    try:
        flags = Flags(options.flags, os.environ)
        header, belonging, choice = read_whole(options.model, os.environ)
        if header.kind != "model":
            advice = ": give the model, and this file with --mmproj" if header.kind == "mmproj" else ""
            raise CannotEstimate(
                f"{options.model} is no model of its own, but a file of kind {header.kind}{advice}"
            )
        projector, draft = (
            read(flag.text, os.environ) if (flag := flags.last(name)) else None
            for name in ("mmproj", "spec-draft-model")
        )
        lora = tuple(read(file, os.environ) for file in adapters.files(flags))
        if projector is None and flags.switch("mmproj-auto", True):
            projector = belonging
        if choice is not None:
            print(line(f"{choice.alias}: {choice.model}" + (f" with {choice.mmproj}" if belonging else "")))
        found = forecast(header, flags, projector=projector, draft=draft, lora=lora)
        print("\n".join(map(line, report(header, flags, found))))
    except FlagError as error:
        print(printable(f"llama-router: {error}"), file=sys.stderr)
        sys.exit(2)
    except (CannotEstimate, GGUFError, Unusable) as error:
        print(printable(f"llama-router: {error}"), file=sys.stderr)
        sys.exit(1)


@dataclass(frozen=True, slots=True)
class Forecast:
    """How the router would place a model if it ran nothing else. MiB by device."""

    best: Alternative
    need: Footprint
    free_mib: Placement
    largest_context: int
    """The largest `-c` that fits; 0 if with none."""
    flags: tuple[str, ...]
    """That the router would add to those that were given."""

    @property
    def short_mib(self) -> dict[Device, int]:
        """What is missing; empty if it fits."""
        free = self.free_mib
        return {device: mib - free[device] for device, mib in self.best.placement.items() if mib > free[device]}


def forecast(
    header: GGUF,
    flags: Flags,
    *,
    projector: GGUF | None = None,
    draft: GGUF | None = None,
    lora: tuple[GGUF, ...] = (),
) -> Forecast:
    """Reads the devices: blocking."""
    engine = _engine()
    ground = _ground(engine)
    asked_for = [word for name, *value in flags_for(header, flags) for word in (f"--{name}", *value)]
    if engine is not None and engine.default_slots > 0 and flags.last("parallel") is None:
        asked_for += ["--parallel", str(engine.default_slots)]
    flags = Flags([*argv(flag for flag in flags.given if flag.index >= 0), *asked_for], os.environ)
    if engine is not None and not engine.uses_gpus:
        ground = replace(ground, gpus=())
    headers = [part for part in (header, projector, draft, *lora) if part is not None]
    files = Files(
        paths=tuple(path for part in headers if part.path is not None for path in part.files or (part.path,)),
        nbytes=sum(part.file_bytes for part in headers),
        model=header,
        projector=projector,
        draft=draft,
        adapters=lora,
    )
    sizer = Sizer(files, flags, os.environ, engine, Learned())
    best = alternatives(sizer, engine, ground)[0]
    need = best.size.details
    assert need is not None  # a model whose header is known has no figure but by its parts
    free = {site.device: site.budget_mib for site in (*ground.gpus, ground.host)}
    used = best.as_counted(free)
    return Forecast(best, need, free, sizer.largest_context((), used), (*asked_for, *best.flags))


def report(header: GGUF, flags: Flags, found: Forecast) -> Iterable[str]:
    """The lines to print."""
    best, need = found.best, found.need
    size = header.file_bytes / footprint.MIB
    trained = f", trained for {header.context_length} tokens" if header.context_length else ""
    yield f"{header.name or header.architecture} ({header.quantization}, {size:.0f} MiB on disk{trained})"
    yield ""
    yield from _table(best, need, found.free_mib)
    yield ""
    yield f"context: {need.context} tokens, all slots together"
    yield f"source: {need.provenance}"
    if best.remark:
        yield f"to make it fit: {best.remark}"
    if found.flags:
        yield f"flags that the router would add: {' '.join(found.flags)}"
    if short := found.short_mib:
        yield "does not fit now: " + ", ".join(f"{device} lacks {mib} MiB" for device, mib in short.items())
    if found.largest_context:
        yield f"largest context that fits now: -c {found.largest_context}"
    else:
        advice = "fewer layers on the GPU (-ngl)" if best.gpus else "a smaller quantization"
        yield f"no context is small enough to fit now: try {advice}"
    if need.host_cache_mib != 0:
        limit = "without limit" if need.host_cache_mib is None else f"up to {need.host_cache_mib} MiB"
        yield f"past prompts that the engine may keep in RAM: {limit} (--cache-ram)"


def read_whole(model: str, environ: Mapping[str, str]) -> tuple[GGUF, GGUF | None, Choice | None]:
    """The header of a model. If its repository is named: also that of its projector, and which files these are."""
    reference = _repository(model, environ)
    if reference is None:
        return read(model, environ), None, None
    from huggingface_hub import get_token  # here, because it takes 0.3 s that a file need not wait for

    from router.store.hub_api import HubError, HubRepository

    hub = HubRepository(reference, environ)
    try:
        found = hub.find(time.sleep)
    except (NoChoice, HubError) as error:
        raise CannotEstimate(str(error)) from None
    environ = {**environ, "HF_TOKEN": get_token() or ""}
    model_path, projector_path = found.choice.model, found.choice.mmproj
    header = read(hub.url(found.commit, model_path), environ)
    projector = read(hub.url(found.commit, projector_path), environ) if projector_path else None
    return header, projector, found.choice


def _repository(model: str, environ: Mapping[str, str]) -> Reference | None:
    """What names a repository, and leaves it to us which of its files that is."""
    if model.startswith("/") or Path(model).exists():
        return None
    with contextlib.suppress(BadReference):
        reference = parse(model, environ)
        if reference.file is None and not reference.repo.lower().endswith(".gguf"):
            return reference
    return None


def read(model: str, environ: Mapping[str, str]) -> GGUF:
    """The header of a model that is a file, a URL or a file on the Hugging Face hub."""
    url = resolve(model, environ)
    if url is None:
        try:
            return gguf.read(Path(model))
        except FileNotFoundError:
            raise CannotEstimate(f"there is no file {model}") from None
        except OSError as error:
            raise CannotEstimate(f"{model} cannot be read: {error.strerror or error}") from None

    token = environ.get("HF_TOKEN") if _is_hub(url, environ) else None
    first = _fetch(url, token, FIRST_BYTES)
    number = first.part_count
    if number <= 1:
        return first
    named = _PART_NUMBER.search(urllib.parse.urlsplit(url).path)
    if named is None or int(named[1]) != number:
        raise CannotEstimate(f"{url} is one of {number} parts: give the first, …-00001-of-{number:05d}.gguf")
    others = (url.replace(f"-00001-of-{named[1]}", f"-{part:05d}-of-{named[1]}") for part in range(2, number + 1))
    parts = [first, *(_fetch(other, token, FIRST_BYTES_OF_OTHERS) for other in others)]
    return replace(
        first,
        tensors=tuple(tensor for part in parts for tensor in part.tensors),
        file_bytes=sum(part.file_bytes for part in parts),
    )


def resolve(model: str, environ: Mapping[str, str]) -> str | None:
    """The URL to fetch; None for a file."""
    endpoint = environ.get("HF_ENDPOINT") or "https://huggingface.co"
    scheme, _, rest = model.rpartition("://")
    if scheme not in ("", "http", "https"):
        raise CannotEstimate(f"{model}: {scheme} is not a protocol that is spoken here; give an http(s) URL")
    host, *path = rest.split("/")
    if host.lower() in HUB_HOSTS and (scheme or not Path(model).exists()):
        if len(path) > 4 and path[2] in ("blob", "resolve", "raw"):  # as copied from the browser
            path = [*path[:2], "resolve", *path[3:]]
        elif len(path) >= 3:
            path = [*path[:2], "resolve", "main", *path[2:]]
        if len(path) < 5 or not path[-1].partition("?")[0].lower().endswith(".gguf"):
            raise CannotEstimate(
                f"{model} names no model: give hf.co/USER/REPO[:QUANT] or hf.co/USER/REPO/FILE.gguf"
            )
        return f"{endpoint.rstrip('/')}/{'/'.join(path)}"
    return model if scheme else None


def _is_hub(url: str, environ: Mapping[str, str]) -> bool:
    hubs = {"huggingface.co", urllib.parse.urlsplit(environ.get("HF_ENDPOINT", "")).netloc}
    return urllib.parse.urlsplit(url).netloc in hubs


def _fetch(url: str, token: str | None, wanted: int) -> GGUF:
    """The header of one remote file: a single request for its `wanted` first bytes, unless it is longer."""
    buffer = b""
    while True:
        more, size = _fetch_range(url, len(buffer), wanted, token)
        buffer += more
        try:
            return gguf.parse(buffer, file_bytes=size, source=url)
        except TruncatedGGUF:
            if len(buffer) >= min(size, MOST_BYTES) or not more:
                raise
        wanted = 2 * len(buffer)


def _fetch_range(url: str, start: int, end: int, token: str | None) -> tuple[bytes, int]:
    """Bytes `start` to `end`, or as far as there are any, and the size of the whole file."""
    headers = {"Range": f"bytes={start}-{end - 1}", "User-Agent": f"llama-router/{__version__}"}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310
    if token:  # for the hub, not for the storage that it redirects to
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SEC) as answer:  # noqa: S310
            if answer.status == 206:
                _, _, size = answer.headers.get("Content-Range", "").rpartition("/")
                body = answer.read(end - start)
            else:  # it sends the whole file; what is not read is not sent for long
                size = answer.headers.get("Content-Length", "")
                body = answer.read(end)[start:]
    except urllib.error.HTTPError as error:
        if error.headers.get("X-Error-Code") == "GatedRepo":
            raise CannotEstimate(gated(url.partition("/resolve/")[0])) from None
        reason = _REFUSALS.get(error.code, f"HTTP {error.code} {error.reason}")
        raise CannotEstimate(f"{url}: {reason}") from None
    except urllib.error.URLError as error:
        raise CannotEstimate(f"{url} cannot be reached: {error.reason}") from None
    except (
        OSError,
        ValueError,
        http.client.HTTPException,
    ) as error:  # a connection that breaks, a URL that is none
        raise CannotEstimate(f"{url} cannot be read: {error}") from None
    if not size.isdecimal():
        raise CannotEstimate(f"{url}: the server does not say how large the file is")
    return body, int(size)


def _engine() -> EngineKind | None:
    with contextlib.suppress(NoEngine):
        return EngineKind(find_binary(os.environ.get("LLAMA_SERVER_PATH")))
    return None


def _ground(engine: EngineKind | None) -> Ground:
    """The machine as it is now, as a router without engines and with every GPU would see it."""
    devices = Devices(listed=None if engine is None else Listed(engine, os.environ))
    ledger = Ledger(System())
    ledger.observe(devices.read_blocking(), {})
    return ledger.ground(ledger.budgets()[0], devices.environment)


_TITLES = {"kv": "KV", "recurrent": "state", "projector": "mmproj"}
_COUNTED_BESIDES = "work"


def _table(best: Alternative, need: Footprint, usable: Placement) -> Iterable[str]:
    """Up to 80 columns wide."""
    shares = best.as_driven(need.devices)
    whole = sum(shares.values(), Share())
    columns = [part.name for part in fields(Share) if getattr(whole, part.name) and part.name != _COUNTED_BESIDES]
    besides = {
        device: best.placement[device] - math.ceil(share.total - share.work) for device, share in shares.items()
    }
    titles = (_TITLES.get(name, name) for name in columns)
    yield "MiB     " + "".join(f"{title:>9}" for title in (*titles, "besides", "total", "usable"))
    for device, share in shares.items():
        figures = [f"{getattr(share, name):>9,.0f}" for name in columns]
        figures += [f"{mib:>9,}" for mib in (besides[device], best.placement[device], usable[device])]
        yield f"{device!s:<8}" + "".join(figures)
    if len(shares) > 1:
        figures = [f"{getattr(whole, name):>9,.0f}" for name in columns]
        figures += [f"{sum(amounts.values()):>9,}" for amounts in (besides, best.placement)]
        yield "together" + "".join(figures)
