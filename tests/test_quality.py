"""The code is as clean as we say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import grimp
import pytest
from conftest import ROOT

from router.engines.registry import KINDS


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_the_checks_pass(command: str) -> None:
    checked = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_imports_point_down() -> None:
    checked = _lint_imports(ROOT)
    assert checked.returncode == 0, checked.stdout


def test_a_wrong_import_is_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "router", tmp_path / "router", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    for module, wrong in (
        ("scheduling/queue", "import time"),
        ("scheduling/fleet", "from router.config.schema import Config"),
        ("store/watch", "def f() -> None:\n    from router.api import app"),
        ("cli/columns", "from router.cli import top"),
        ("brand_new", "import json"),
        ("runtime/background", "from router.engines.llamacpp import flags"),
    ):
        with (tmp_path / f"router/{module}.py").open("a") as code:
            code.write(f"\n{wrong}\n")
    checked = _lint_imports(tmp_path)
    assert checked.returncode == 1
    said = " ".join(checked.stdout.split())
    assert "router.scheduling.queue -> time (l." in said
    assert "router.scheduling.fleet -> router.config.schema (l." in said
    assert "router.store.watch -> router.api.app (l." in said
    assert "No cycles are allowed in router.cli" in said
    assert "router.brand_new" in said
    assert "router.runtime.background -> router.engines.llamacpp.flags (l." in said


def test_a_kind_of_engine_is_a_package_that_knows_no_other() -> None:
    kinds = sorted(file.parent.name for file in ROOT.glob("router/engines/*/__init__.py"))
    assert kinds == sorted(KINDS)
    graph = grimp.build_graph("router", cache_dir=None)
    for one, other in permutations((f"router.engines.{kind}" for kind in kinds), 2):
        assert graph.find_shortest_chain(one, other, as_packages=True) is None


def _lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the imports of the package in a folder against the contracts in `pyproject.toml`."""
    program = Path(sys.executable).with_name("lint-imports")
    command = [str(program), "--no-cache", "--no-logo", "--verbose", str(ROOT / "pyproject.toml")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)
