"""`llama-router estimate MODEL [flags…]`: estimates a model's memory use before downloading it.

MODEL is a file, an http(s) URL, `hf.co/USER/REPO/FILE.gguf`, or, like for `pull`, `hf.co/USER/REPO[:QUANT]`, which
includes its projector; only the headers of remote files are downloaded. FLAGS are those of llama-server. A local
file is measured by the installed engine's own tool, if there is one; everything else is estimated by formula.

A model in safetensors is a folder or a repository; of the flags, only the context (`-c`) counts for it. It is
estimated for the engine that would run it here: vLLM or Transformers.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any, NamedTuple

from router.cli.columns import print_json
from router.config.errors import did_you_mean
from router.engines import hf_forecast
from router.engines.llamacpp import adapters, footprint
from router.engines.llamacpp.flags import FORMS, SPELLINGS, FlagError, Flags
from router.engines.llamacpp.forecast import Forecast, forecast
from router.formats.gguf import GGUF
from router.formats.hf_model import HfModel
from router.memory.plan import Alternative, Footprint, Share, Unusable
from router.scheduling.messages import Placement
from router.store.remote_headers import CannotRead, read, read_whole
from router.system.devices import by_name
from router.system.printable import line, printable


def run(options: argparse.Namespace) -> None:
    """Print the estimate. Exits with 1 if the model cannot be read, with 2 if a flag is invalid."""
    try:
        words = [word for word in options.flags if word != "--json"]
        flags = Flags(words, os.environ)
        header, belonging, choice = read_whole(options.model, os.environ)
        if isinstance(header, HfModel):
            quantize = choice.quantize if choice is not None else None
            told = _of_folder(header, _context(flags), quantize)
        else:
            told = _of_file(options.model, header, flags, belonging)
            if choice is not None:
                with_it = f" with {choice.mmproj}" if belonging else ""
                told = told._replace(lines=[f"{choice.alias}: {choice.model}{with_it}", *told.lines])
    except FlagError as error:
        print(printable(f"llama-router: {error}"), file=sys.stderr)
        sys.exit(2)
    except (CannotRead, ValueError, Unusable) as error:
        served = "" if "/" in options.model or not isinstance(error, CannotRead) else _SERVED
        print(printable(f"llama-router: {error}{served}"), file=sys.stderr)
        sys.exit(1)
    if options.json or len(words) < len(options.flags):
        alias = {"alias": choice.alias} if choice is not None else {}
        print_json({"model": options.model, **alias, **told.document, "warnings": told.warnings})
        return
    print("\n".join(map(line, told.lines)))
    for warning in told.warnings:
        print(line(f"warning: {warning}"), file=sys.stderr)


_SERVED = ". Of a model that a router serves, `llama-router show` tells the memory"


class _Told(NamedTuple):
    """An estimate in lines, as a document with the names of the router's API, and what to know about the flags."""

    lines: Sequence[str]
    document: dict[str, Any]
    warnings: Sequence[str] = ()


def _of_file(name: str, header: GGUF, flags: Flags, belonging: GGUF | None) -> _Told:
    """Estimate a GGUF file; `belonging` is its projector. Raises FlagError, CannotRead, Unusable."""
    if header.kind != "model":
        advice = ": give the model, and this file with --mmproj" if header.kind == "mmproj" else ""
        raise CannotRead(f"{name} is not a model, but a file of kind {header.kind}{advice}")
    projector, draft = (
        read(flag.text, os.environ) if (flag := flags.last(name)) else None
        for name in ("mmproj", "spec-draft-model")
    )
    lora = tuple(read(file, os.environ) for file in adapters.files(flags))
    if projector is None and flags.switch("mmproj-auto", True):
        projector = belonging
    estimated = partial(forecast, header, projector=projector, draft=draft, lora=lora)
    found = estimated(flags)
    document = {
        "name": header.name or header.architecture,
        "architecture": header.architecture,
        "quantization": header.quantization,
        "total_bytes": header.file_bytes,
        "context_trained": header.context_length or None,
        "context": found.need.context,
        "context_key": "-c",
        "largest_context": found.largest_context,
        "source": found.need.provenance,
        "need_mib": by_name(found.best.placement),
        "free_mib": by_name({device: found.free_mib[device] for device in found.best.placement}),
        "short_mib": by_name(found.short_mib),
        "fits": "not_now" if found.short_mib else "now",
        "parts_mib": {
            str(device): {part: round(mib, 1) for part, mib in asdict(share).items() if mib}
            for device, share in found.best.as_driven(found.need.devices).items()
        },
        "added_flags": list(found.flags),
        "remark": found.best.remark or None,
    }
    return _Told(list(report(header, flags, found)), document, list(_about(flags, found, estimated)))


def _of_folder(model: HfModel, context: int | None, quantize: str | None) -> _Told:
    """Estimate a model in safetensors."""
    found = hf_forecast.forecast(model, context, quantize)
    document = {
        "name": str(model.folder),
        "architecture": model.architecture or model.model_type,
        "quantization": model.quantization or model.dtype,
        "total_bytes": model.weight_bytes,
        "context_trained": model.context or None,
        "engine": found.engine,
        "context": found.cache.context,
        "largest_context": found.largest_context,
        "need_mib": by_name(found.placement),
        "free_mib": by_name({device: found.free_mib[device] for device in found.placement}),
        "fits": "now" if found.fits else "not_now",
        "remark": found.best.remark or None,
    }
    return _Told(list(report_of_folder(model, found)), document)


_COUNTED = (
    "ctx-size",
    "mmproj",
    "mmproj-auto",
    "spec-draft-model",
    "lora",
    "lora-scaled",
    "lora-init-without-apply",
)
"""The context, and flags about files: they are counted, even if the estimate would be the same without them."""


def _about(flags: Flags, found: Forecast, estimated: Callable[[Flags], Forecast]) -> Iterator[str]:
    """Yield what to know about flags that are unknown, or without which the estimate would be the same."""
    own = [flag for flag in flags.given if flag.index >= 0]
    idle = []
    for flag in own:
        if flag.name not in FORMS:
            unknown = f"{flag.spelling} is not a flag of any llama-server known here, and was not counted"
            yield unknown + did_you_mean(flag.spelling, SPELLINGS)
        elif flag.name not in _COUNTED:
            others = Flags([word for other in own if other.name != flag.name for word in other.words], os.environ)
            without = estimated(others)
            if (without.best.placement, without.need) == (found.best.placement, found.need):
                idle.append(" ".join(flag.words))
    if idle:
        yield f"without effect on this model's memory: {', '.join(dict.fromkeys(idle))}"


def _context(flags: Flags) -> int | None:
    """Return the context for a model in safetensors. Raises FlagError for another flag."""
    for flag in flags.given:
        if flag.name != "ctx-size" and flag.index >= 0:
            what = "a flag of llama-server" if flag.name in FORMS else "unknown"
            reason = f"{flag.spelling} is {what}; for a model in safetensors, only -c counts"
            raise FlagError(reason, flag.index)
    return flags.integer("ctx-size", 0) or None


def report_of_folder(model: HfModel, found: hf_forecast.HfForecast) -> Iterable[str]:
    """Yield the lines to print of a model in safetensors."""
    cache = found.cache
    size = model.weight_bytes / footprint.MIB
    trained = f", trained for {model.context} tokens" if model.context else ""
    kind = model.quantization or model.dtype
    yield f"{model.folder}: {model.architecture or model.model_type} ({kind}, {size:.0f} MiB on disk{trained})"
    yield ""
    yield f"weights: {found.weights_mib:,.0f} MiB"
    requests = "one request" if cache.requests == 1 else f"{cache.requests} requests at once, each"
    yield f"KV cache: {found.kv_mib:,.0f} MiB for {requests} of {cache.context} tokens"
    for device, mib in found.placement.items():
        yield f"{device}: {mib:,} MiB in all on {found.engine}, {found.free_mib[device]:,} usable"
    if found.best.remark:
        yield f"to make it fit: {found.best.remark}"
    if not found.fits:
        yield "does not fit now"
    if found.largest_context:
        yield f"largest context that fits now: {found.largest_context}"
    else:
        yield "no context is small enough to fit now: try a quantized model"


def report(header: GGUF, flags: Flags, found: Forecast) -> Iterable[str]:
    """Yield the lines to print."""
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


_TITLES = {"kv": "KV", "recurrent": "state", "projector": "mmproj"}
_COUNTED_BESIDES = "work"


def _table(best: Alternative, need: Footprint, usable: Placement) -> Iterable[str]:
    """Yield the lines of the table, up to 80 columns wide."""
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
