"""A configuration under construction: its values with their origins, and all problems found.

`sources.py` fills it, then the catalog adds discovered models. Checks record each problem and continue, so that
one run reports all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from router.config.errors import explain, single_value
from router.config.problems import KeyPath, Problem, dotted
from router.config.schema import Section

DEFAULT = "default"
"""The origin of values that are not set."""
_S = TypeVar("_S", bound=Section)


class Draft:
    """Values as written, the origin of each, and the problems and warnings found."""

    def __init__(self, environ: Mapping[str, str], cwd: Path, check_files: bool) -> None:
        self.cwd = Path(os.path.abspath(cwd))
        self.check_files = check_files
        self.is_for_here = check_files
        self.values: dict[str, Any] = {}
        self.origins: dict[KeyPath, str] = {}
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.foreign: dict[str, str] = {}
        """Environment variables whose values must be meant for another program, each with its problem."""
        self.environ = dict(environ)
        self.file_name = ""
        self.folder = self.cwd
        self.home = environ.get("HOME", "~")

    def put(self, path: KeyPath, value: Any, origin: str) -> None:
        """Set the value at `path`, replacing what was there, and record its origin."""
        *parents, key = path
        at: Any = self.values
        for parent in parents:
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                return  # reported when the section is checked
        if key in at:
            for known in [known for known in self.origins if known[: len(path)] == path]:
                del self.origins[known]
        at[key] = value
        self._mark(path, value, origin)

    def _mark(self, path: KeyPath, value: Any, origin: str) -> None:
        if isinstance(value, dict) and (value or single_value(path) is None):
            for key, item in value.items():
                self._mark((*path, key), item, origin)
        else:
            self.origins[path] = origin

    def origin_of(self, path: KeyPath) -> str:
        """Return the origin of a value, or of the list that contains it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return DEFAULT

    def problem(self, path: KeyPath, message: str, source: str | None = None) -> None:
        """Record a problem with the value at `path`; `source` defaults to the origin of the value."""
        if source is None:
            origin = self.origin_of(path)
            source = self.file_name if origin == DEFAULT else origin
        self.problems.append(Problem(dotted(path), message, source))

    def warn(self, path: KeyPath, message: str) -> None:
        self.warnings.append(str(Problem(dotted(path), message, self.origin_of(path))))

    def resolve(self, text: str, base: Path) -> Path:
        """Return an absolute path without `..`; symbolic links are not resolved."""
        if text == "~" or text.startswith("~/"):
            text = self.home + text[1:]
        return Path(os.path.normpath(base / text))

    def base_of(self, path: KeyPath) -> Path:
        """Return the base of a relative path: the folder of its configuration file, else the working directory."""
        return self.folder if self.origin_of(path) == self.file_name else self.cwd

    def models_folder(self) -> Path:
        path = ("system", "base_models_path")
        system = self.values.get("system")
        text = system.get(path[1]) if isinstance(system, dict) else None
        return self.resolve(text, self.base_of(path)) if text and isinstance(text, str) else self.folder

    def check_file(self, path: KeyPath, file: Path, wrong_with: Callable[[Path], str]) -> None:
        """Note what is wrong with a file that the key at `path` names, if files are to be checked."""
        if not self.check_files:
            return
        try:
            problem = wrong_with(file)
        except OSError as error:  # a folder above it may not be looked into, or its name is too long
            problem = f"{file} cannot be accessed: {error.strerror or error}"
        if problem:
            self.problem(path, problem)

    def section(self, kind: type[_S], path: KeyPath, **stand_in: Any) -> _S | None:
        """Validate the values at `path` and record the problems; None if they cannot be read at all.

        Invalid values are left out, or replaced by those in `stand_in`, so that other checks can continue.
        """
        values: Any = self.values
        for part in path:
            values = values.get(part, {})
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            errors = error.errors(include_url=False)
        wrong: set[str | int] = set()
        for each in errors:
            where = (*path, *each["loc"])
            self.problem(where, explain(each, where, kind))
            wrong.update(each["loc"][:1])
        if not isinstance(values, dict) or not wrong:
            return None
        return kind.model_validate({**stand_in, **{key: values[key] for key in values if key not in wrong}})
