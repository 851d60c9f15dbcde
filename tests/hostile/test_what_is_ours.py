"""Secrets that an engine must not inherit, and permissions of files that the router writes."""

from __future__ import annotations

from pathlib import Path

import psutil
from conftest import Start, models

SECRETS = (
    "API_KEY",
    "LLAMA_ROUTER_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "OPENAI_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "DB_PASSWORD",
    "GOOGLE_APPLICATION_CREDENTIALS",
)
KEPT = {"LLAMA_ARG_IMAGE_MAX_TOKENS": "64", "TOKENIZERS_PARALLELISM": "false", "MONKEY": "business"}


def test_an_engine_inherits_no_secret_that_its_entry_does_not_name(start: Start, tiny: Path) -> None:
    entries = {**models(tiny, "a"), **models(tiny, "b", env={"HF_TOKEN": "of-the-entry"})}
    router = start({"models": entries}, **dict.fromkeys(SECRETS, "a-secret"), **KEPT)
    router.http.headers["authorization"] = "Bearer a-secret"
    for alias, named in (("a", {}), ("b", {"HF_TOKEN": "of-the-entry"})):
        assert router.chat(alias).status_code == 200
        environ = psutil.Process(router.status(alias)["pid"]).environ()
        assert {name: environ[name] for name in SECRETS if name in environ} == named
        assert "a-secret" not in environ.values()
        assert environ.items() >= KEPT.items()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_what_is_written_is_for_its_owner_alone_also_where_it_lay_open_before(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    made, there, state, shared = (tmp_path / name for name in ("made", "there", "state", "shared"))
    for folder in (there, state, state / "blobs", shared):
        folder.mkdir()
        folder.chmod(0o777)
    of_others = shared / "notes.txt"
    left = (there / "a.log", there / "a.log.1", state / "lock", state / "footprints.json", shared / "lock")
    for path in (*left, of_others):
        path.write_text("[]" if path.suffix == ".json" else "")
        path.chmod(0o666)
    for log_dir, state_dir in ((there, state), (made, shared)):
        router = start({"system": {"log_dir": str(log_dir)}, "models": models(tiny, "a")}, **at(state_dir))
        assert router.chat("a").status_code == 200
        assert router.http.post("/api/copy", json={"source": "a", "destination": "b"}).status_code == 200
        assert router.stop() == 0
        assert (log_dir / "a.log").read_text() != ""
        ours = [*log_dir.iterdir(), *(path for path in state_dir.iterdir() if path != of_others)]
        assert {"a.log", "lock", "created.json"} <= {path.name for path in ours}
        assert {path.name: mode(path) for path in ours if path.is_file() and mode(path) != 0o600} == {}
    assert (mode(made), mode(state), mode(state / "blobs")) == (0o700, 0o700, 0o700)
    assert (mode(there), mode(shared), mode(of_others)) == (0o777, 0o777, 0o666), "which others made, or use"


def at(state_dir: Path) -> dict[str, str]:
    return {"LLAMA_ROUTER_STATE_DIR": str(state_dir)}
