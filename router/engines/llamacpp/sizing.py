"""Memory of a model from the best available source, with the name of the source.

Best first: `footprint_mb` of its entry; measurements of the same files, flags and build; llama.cpp's own tool;
formulas; the size of its files. Tool and formulas are corrected by measurements with other flags.

GPUs are numbered as the engine numbers them, from the first that it sees; `plan.py` chooses them. Blocking: reads
files and runs the tool.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from router.config.resolved import ModelConfig
from router.engines.llamacpp import adapters, fit_params, footprint
from router.engines.llamacpp.binary import Binary
from router.engines.llamacpp.build_flags import Has, Spoken, default_slots, read_help, slots_told, spoken
from router.engines.llamacpp.flags import OWNED, FlagError, Flags, argv, replaced
from router.engines.llamacpp.purpose import unserved
from router.engines.llamacpp.server import KEY_VARIABLE
from router.formats import gguf
from router.formats.gguf import GGUF
from router.formats.gguf_cursor import GGUFError
from router.memory.measurements import Identity, Learned, files_of
from router.memory.plan import Footprint, Share, Size, Unusable
from router.system.devices import HOST, Device
from router.system.privacy import without_secrets
from router.system.processes import signal_name

_MIB = 1 << 20

DRIVER_MIB = 512
"""GPU memory that CUDA or ROCm takes for a process beyond llama.cpp's allocations: 300 to 500 MiB. Vulkan takes
less, but its backend allocates more while computing."""
PROCESS_MIB = 16
"""RAM of llama-server besides the model."""
_MOST_MEASURED = 4

_KEPT_OUT = {*OWNED, "hf-token"}
"""Flags that are not part of an identity: those never passed on to engines, and secrets."""
_NEVER_RAN = (126, 127)
"""Exit codes of shells and loaders that cannot start a program."""
_TAKES_UNIX_SOCKETS = "IP addresses to listen on, comma-separated, or UNIX socket paths"
"""Help text of `--host` in builds that accept several addresses."""

_log = logging.getLogger("router")


class WrongFlags(Unusable):
    """Raised if the engine will not accept the model's flags."""

    for_good = True

    def __init__(self, what: str) -> None:
        super().__init__(f"its flags: {what}", "its flags are wrong")


@dataclass(frozen=True, slots=True)
class Files:
    """Files that an engine loads, with the headers of those in a known format."""

    paths: tuple[Path, ...]
    nbytes: int
    model: GGUF | None
    projector: GGUF | None = None
    draft: GGUF | None = None
    adapters: tuple[GGUF, ...] = ()


def read_files(path: Path, flags: Flags) -> Files:
    """Read the headers of a model's files. Raises Unusable for a broken file, OSError for an unreadable one."""
    paths: list[Path] = []
    nbytes = 0
    headers: list[GGUF | None] = []
    named = (_named(flags, name) for name in ("mmproj", "spec-draft-model"))
    for file in (path, *named, *map(Path, adapters.files(flags))):
        header = None
        if file is not None:
            try:
                header = gguf.read(file)
            except gguf.UnsupportedGGUF:  # a newer format, which the engine may know
                paths.append(file)
                nbytes += file.stat().st_size
            except GGUFError as error:
                raise Unusable(str(error), f"its file cannot be loaded: {error.reason}") from error
            else:
                paths += header.files or (file,)
                nbytes += header.file_bytes
        headers.append(header)
    if headers[0] is not None and (reason := unserved(path, headers[0])):
        raise Unusable(f"{path} {reason}", f"its file {reason}")
    model, projector, draft, *lora = headers
    return Files(tuple(paths), nbytes, model, projector, draft, tuple(filter(None, lora)))


@contextlib.contextmanager
def _sized(files: Files) -> Iterator[None]:
    """Convert errors of the formulas to Unusable: a header may contain anything."""
    try:
        yield
    except (FlagError, OSError):
        raise
    except Exception as error:
        name = files.paths[0] if files.paths else "the model"
        raise Unusable(f"{name} is unreadable: its header is invalid ({error!r})") from error


def _named(flags: Flags, name: str) -> Path | None:
    flag = flags.last(name)
    return None if flag is None else Path(flag.text)


class EngineKind:
    """Properties of an engine's build that affect sizing and placement of models."""

    def __init__(self, binary: Binary) -> None:
        self.program = Path(binary.argv[0])
        self._origin = binary.origin
        self._is_server = binary.kind == "llama-server"
        self.uses_gpus = self._is_server
        self.tool = fit_params.beside(self.program) if self._is_server else None

    @property
    def build(self) -> str:
        """Identity of the build, which changes if the engine is replaced. Raises OSError if it is missing."""
        if not self._is_server:
            return self._origin
        status = self.program.stat()
        return f"{self.program} {status.st_size} {status.st_mtime_ns}"

    def check_runs(self) -> None:
        """Run each build once, which takes llama-server 0.1 s. Raises Unusable if it does not run."""
        if not self._is_server:
            return
        try:
            said = _help_of(str(self.program), self.build)
            if not os.access(self.program, os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            reason = f"{self.program} cannot be run: {error.strerror or error}"
            raise Unusable(reason, "the engine cannot be run") from error
        if said.has and KEY_VARIABLE not in said.line:
            raise Unusable(
                f"{self.program} is too old: it does not support {KEY_VARIABLE}; install a newer llama-server",
                "the engine is too old",
            )

    @property
    def fits_by_itself(self) -> bool:
        """Whether it has `--fit`, which adapts unset flags to the free memory during a load."""
        return self.tool is not None or "--fit" in self._help.line

    @property
    def lists_devices(self) -> bool:
        """Whether it can list its GPUs. Blocking, like `check_runs`."""
        return "--list-devices" in self._help.line

    @property
    def default_slots(self) -> int:
        """Number of slots without `--parallel`; negative: chosen by the engine. Blocking, like `check_runs`."""
        return self._help.default_slots

    @property
    def takes_unix_sockets(self) -> bool:
        """Whether it can listen on several addresses, Unix sockets among them. Blocking, like `check_runs`."""
        return not self._is_server or _TAKES_UNIX_SOCKETS in self._help.line

    def in_its_words(self, flags: Sequence[str], environ: Mapping[str, str]) -> Spoken:
        """Translate flags, some of them set by `environ`, for its build. Blocking, like `check_runs`. Raises
        FlagError."""
        given = Flags(flags, environ).given
        if has := self._help.has:
            return spoken(given if self.default_slots < 0 else slots_told(given, has), has)
        return Spoken(tuple(argv(flag for flag in given if flag.index >= 0)), ())

    def unknown_flags(self, models: Mapping[str, ModelConfig], environ: Mapping[str, str]) -> Iterator[str]:
        """Yield warnings about models with flags that its build does not have. Blocking, like `check_runs`."""
        told = ((f"models.{alias}", model.flags, model.env) for alias, model in models.items())
        for who, flags, variables in (("the environment", (), environ), *told):
            with contextlib.suppress(FlagError):  # reported elsewhere
                if unknown := self.in_its_words(flags, variables).unknown:
                    yield f"{who}: {self.program} does not know {', '.join(unknown)} (see its --help)"

    @property
    def _help(self) -> _Help:
        if not self._is_server:
            return _Help()
        try:
            return _help_of(str(self.program), self.build)
        except OSError:
            return _Help()


@dataclass(frozen=True, slots=True)
class _Help:
    """Parsed output of `llama-server --help`."""

    line: str = ""
    """Whole text in one line."""
    has: Has = field(default_factory=dict)
    default_slots: int = -1


@lru_cache(maxsize=8)
def _help_of(program: str, build: str) -> _Help:
    """Run `--help`. Raises OSError if the program cannot start: wrong architecture, missing library, or an illegal
    instruction.

    Failures are not cached, as the cause may be fixed without a change to the program.
    """
    try:
        done = subprocess.run(  # noqa: S603
            [program, "--help"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10,
            env=without_secrets(os.environ),
            check=False,
        )
    except subprocess.TimeoutExpired:
        _log.warning("%s --help printed nothing for 10 s", program)
        return _Help()
    if done.returncode >= 0 and done.returncode not in _NEVER_RAN:
        text = done.stdout.decode("utf-8", "replace")
        return _Help(" ".join(text.split()), read_help(text), default_slots(text))
    said = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
    code = f"exit code {done.returncode}" if done.returncode > 0 else signal_name(done.returncode)
    raise OSError(errno.ENOEXEC, said or code)


class Sizer:
    """Estimates of one model's memory for different flags and GPUs. Methods may raise FlagError and OSError."""

    def __init__(
        self,
        files: Files,
        flags: Flags,
        environ: Mapping[str, str],
        engine: EngineKind | None,
        learned: Learned,
        *,
        given_mib: int | None = None,
        multiplier: float = 1.1,
    ) -> None:
        self.files = files
        self.flags = flags
        self.given_mib = given_mib
        self._environ = environ
        self._engine = engine
        self._learned = learned
        self._multiplier = multiplier

    @property
    def knows_parts(self) -> bool:
        """Whether the parts on each device are known; otherwise there is one figure for the model."""
        return self.given_mib is None and self.files.model is not None

    def whole(self, rooms: Sequence[float]) -> Size:
        """Return the size by one figure, divided among GPUs in proportion to `rooms`, or on the host."""
        if self.given_mib is not None:
            mib, source = self.given_mib, "footprint_mb"
        else:
            mib = max(1, round(self.files.nbytes * self._multiplier / _MIB))
            source = f"file size × {self._multiplier:g}"
        total = sum(rooms)
        figures: Mapping[Device, int] = {HOST: mib}
        if rooms:
            figures = {Device.shown(place): round(mib * room / total) for place, room in enumerate(rooms)}
        identity = self._identity((), len(rooms))
        if self.given_mib is not None:
            return Size(figures, source, figures, identity)
        measured = self._learned.measured(identity)
        if measured is not None:
            ours = {device: mib for device, mib in measured.items() if device in figures or device == HOST}
            return Size({**figures, **ours}, "measured", figures, identity)
        figures, source = self._learned.with_raised(figures, source, identity)
        return Size(figures, source, figures, identity)

    def parts(
        self, added: tuple[str, ...], gpus: int, visible: Mapping[str, str], *, exact: bool = True
    ) -> Size | None:
        """Return the size with further flags on this number of GPUs; None if the engine does not use GPUs.

        `visible` are the environment variables that select the GPUs; they override `environ`. `exact=False` uses
        only the formulas.
        """
        flags = self.flags_with(added)
        identity = self._identity(added, gpus) if exact else None
        said = self._ask(flags, visible) if exact else None
        if said is not None and gpus and set(said.devices) == {HOST}:
            return None
        taken = said or self.by_formula(flags, gpus)
        taken = replace(taken, devices=_known(taken.devices, gpus))
        figures = {
            device: mib + (DRIVER_MIB if device.is_gpu else PROCESS_MIB) for device, mib in taken.mib().items()
        }
        source = "llama-fit-params" if said else "formulas"
        measured = self._learned.measured(identity) if identity is not None else None
        if measured is not None:
            return Size(_within_reason(measured, figures, taken), "measured", figures, identity, taken)
        factors = self.ratio(gpus)
        # Never less than what llama.cpp allocates: only the overhead varies.
        asked = taken.mib()
        corrected: Mapping[Device, int] = {
            device: max(asked[device], round(mib * factors[device])) for device, mib in figures.items()
        }
        if corrected != figures:
            source += ", corrected as measured with other flags"
        if identity is not None:
            corrected, source = self._learned.with_raised(corrected, source, identity)
        return Size(corrected, source, figures, identity, taken)

    def by_formula(self, flags: Flags, gpus: int) -> Footprint:
        """Return the footprint by formula. Raises Unusable."""
        files = self.files
        assert files.model is not None
        with _sized(files):
            return footprint.estimate(
                files.model,
                flags,
                projector=files.projector,
                draft=files.draft,
                adapters=files.adapters,
                gpus=gpus,
            )

    def largest_context(self, added: tuple[str, ...], free_mib: Mapping[Device, int]) -> int:
        """Return the largest `-c` that fits, by formula; 0 if none does."""
        files = self.files
        assert files.model is not None
        factors = self.ratio(len(free_mib) - 1)
        usable = {
            device: int(mib / factors[device]) - (DRIVER_MIB if device.is_gpu else PROCESS_MIB)
            for device, mib in free_mib.items()
        }
        with _sized(files):
            return footprint.largest_context(
                files.model,
                self.flags_with(added),
                usable,
                projector=files.projector,
                draft=files.draft,
                adapters=files.adapters,
            )

    def flags_with(self, added: tuple[str, ...]) -> Flags:
        own = argv(flag for flag in self.flags.given if flag.index >= 0)
        return Flags(replaced(own, added), self._environ)

    def ratio(self, gpus: int) -> Mapping[Device, float]:
        """Return the ratio of measured to estimated memory by device."""
        known = self._learned.ratio(self._identity((), gpus))
        return {HOST: known.host, **{Device.shown(place): known.gpus for place in range(gpus)}}

    def _ask(self, flags: Flags, visible: Mapping[str, str]) -> Footprint | None:
        files, tool = self.files, self._engine.tool if self._engine else None
        if tool is None or files.model is None or files.model.path is None:
            return None
        environ = {**self._environ, **visible}
        return tool.footprint(
            files.model,
            flags,
            projector=files.projector,
            draft=files.draft,
            adapters=files.adapters,
            environ=environ,
        )

    def _identity(self, added: tuple[str, ...], gpus: int) -> Identity:
        own = tuple(word for flag in self.flags.given if flag.name not in _KEPT_OUT for word in flag.words)
        build = self._engine.build if self._engine else ""
        return Identity(files_of(*self.files.paths), build, (*own, *added), gpus)


def _within_reason(
    measured: Mapping[Device, int], estimated: Mapping[Device, int], asked: Footprint
) -> dict[Device, int]:
    """Bound a measurement to plausible values: at least the weights, and at most a multiple of the estimate."""
    return {
        device: min(max(measured.get(device, mib), math.ceil(asked.devices[device].weights)), _MOST_MEASURED * mib)
        for device, mib in estimated.items()
    }


def _known(shares: Mapping[Device, Share], gpus: int) -> dict[Device, Share]:
    """Attribute memory of unknown GPUs, such as Apple's, to the host."""
    known: dict[Device, Share] = {}
    for device, share in shares.items():
        place = HOST if device.index >= gpus else device
        known[place] = known.get(place, Share()) + share
    return known
