"""Replacement of small files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from router.system.replacing import replace_file


@pytest.mark.parametrize("fsync", [True, False])
def test_a_file_is_replaced_or_stays_as_it_was(
    tmp_path: Path, fsync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "known.json"
    replace_file(path, b"old", new="known.json.new", fsync=fsync)
    (tmp_path / "known.json.new").write_bytes(b"of a router that was killed")
    replace_file(path, b"new", new="known.json.new", fsync=fsync)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"newer", new="known.json.new", fsync=fsync)
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["known.json"]


def test_only_the_umask_restricts_a_file_that_others_may_read(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        replace_file(tmp_path / "shared.json", b"{}", new="x", fsync=False, mode=0o666)
    finally:
        os.umask(before)
    assert (tmp_path / "shared.json").stat().st_mode & 0o777 == 0o644
