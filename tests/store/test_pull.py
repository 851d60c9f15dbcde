"""Stories about pulling models: from a hub on this machine, by the command line and by a running router."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ollama
import pytest
from conftest import ROOT, Router, Start, eventually, run
from fake_hub import Hub, serving
from hf_models import LLAMA_PARAMETERS, played_transformers, played_vllm, write_model
from tiny_models import write_llama, write_projector

from router.formats import hf_cache, hf_model
from router.store import pulled, remote_headers, repository
from router.store.downloads import Downloads, Pull
from router.store.progress import Progress
from router.store.pull import pull

REPO = "org/tiny-GGUF"
ALIAS = f"{REPO}:Q4_K_M"


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("content")
    write_llama(folder / "tiny-Q4_K_M.gguf")
    write_llama(folder / "tiny-Q8_0.gguf", seed=1)
    write_projector(folder / "mmproj-F16.gguf")
    first = write_llama(folder / "big.gguf", n_layer=4, parts=3, seed=2)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    assert first.name in files
    return {**files, "README.md": b"# A model card"}


@pytest.fixture
def hub(content: dict[str, bytes]) -> Iterator[Hub]:
    plain = {name: content[name] for name in ("tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf", "README.md")}
    seeing = {**plain, "mmproj-F16.gguf": content["mmproj-F16.gguf"]}
    split = {f"BF16/{name}": content[name] for name in content if name.startswith("big-")}
    with serving(Hub({REPO: plain, "org/sees-GGUF": seeing, "org/split-GGUF": split})) as hub:
        yield hub


@pytest.fixture
def environ(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub"


def fetch(reference: str, environ: dict[str, str], **more: Any) -> Progress:
    return pull(reference, lambda _: None, environ=environ, **more)


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *arguments]


def clean(environ: dict[str, str], tmp_path: Path) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), **environ}


def aliases(router: Router) -> set[str]:
    return set(router.http.get("/status").json()["models"])


def blobs(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("models--*/blobs/*")}


# --- one download ---------------------------------------------------------------------------------------------


def test_pull_a_model_and_talk_to_it_also_after_a_restart(
    start: Start, hub: Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    ended = run("pull", f"hf.co/{REPO}", cwd=tmp_path, **environ)
    assert ended.returncode == 0, ended.stderr
    assert "fits now" in ended.stdout
    assert f"{ALIAS} is available" in ended.stdout
    hub.asked.clear()
    for _ in range(2):
        router = start(**environ)
        assert aliases(router) == {ALIAS}
        assert router.status(ALIAS)["source"] == "pulled"
        assert router.chat(ALIAS).status_code == 200
        router.stop()
    assert router.process.returncode == 0
    assert hub.asked == []


def test_other_programs_find_what_was_pulled(hub: Hub, environ: dict[str, str], cache: Path) -> None:
    """By the library's own eyes: revision, file and blob are where it looks for them."""
    import huggingface_hub

    fetch(REPO, environ)
    path = huggingface_hub.try_to_load_from_cache(REPO, "tiny-Q4_K_M.gguf", cache_dir=cache)
    assert isinstance(path, str)
    assert Path(path).read_bytes() == hub.repositories[REPO]["tiny-Q4_K_M.gguf"]
    (repository,) = huggingface_hub.scan_cache_dir(cache).repos
    assert (repository.repo_id, repository.nb_files) == (REPO, 1)
    assert {ref for revision in repository.revisions for ref in revision.refs} == {"main"}


@pytest.mark.parametrize("shares", [[0.3], [0.6], [0.9], [0.3, 0.6, 0.9]])
def test_a_download_goes_on_where_it_was_cut(hub: Hub, environ: dict[str, str], shares: list[float]) -> None:
    size = len(hub.repositories[REPO]["tiny-Q4_K_M.gguf"])
    hub.cuts = list(shares)
    assert fetch(REPO, environ).status == "success"
    starts = [start for _, start in hub.fetched]
    assert len(starts) == 1 + len(shares)
    for start, share in zip(starts[1:], shares, strict=True):
        assert share * size - 65536 <= start <= share * size + 65536
    assert hub.sent_bytes <= size + 65536 * len(shares)


def test_a_killed_download_is_never_served_and_goes_on_at_the_next_pull(
    start: Start, hub: Hub, environ: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    write_llama(tmp_path / "other.gguf")
    router = start(arguments=["--hf-cache", "--models-dir", str(tmp_path)], **environ)
    hub.hold_at = 0.6
    process = subprocess.Popen(command("pull", REPO), env=clean(environ, tmp_path), stdout=subprocess.DEVNULL)
    assert hub.held.wait(30)
    (partial,) = cache.glob("models--*/blobs/*.incomplete")
    eventually(lambda: partial.stat().st_size > 0)
    process.kill()
    process.wait()
    arrived = partial.stat().st_size
    hub.hold_at = None
    assert aliases(router) == {"other"}
    assert run("pull", REPO, cwd=tmp_path, **environ).returncode == 0
    assert hub.fetched[-1] == ("tiny-Q4_K_M.gguf", arrived)
    assert not partial.exists()
    eventually(lambda: aliases(router) == {"other", ALIAS})


def test_a_server_without_ranges_is_asked_for_the_whole_file(hub: Hub, environ: dict[str, str]) -> None:
    hub.cuts, hub.ranges = [0.5], False
    ended = fetch(REPO, environ)
    assert (ended.status, ended.completed_bytes) == ("success", ended.total_bytes)


def test_a_busy_hub_is_asked_again(hub: Hub, environ: dict[str, str]) -> None:
    hub.busy = 2
    assert fetch(REPO, environ).status == "success"


def test_what_a_broken_download_left_is_not_trusted(hub: Hub, environ: dict[str, str], cache: Path) -> None:
    fetch(REPO, environ)
    (blob,) = cache.glob("models--*/blobs/*")
    good = blob.read_bytes()
    pulled.remove(cache, ALIAS)
    blob.parent.mkdir(parents=True)
    for wrong in (b"x" * 5000, good + b"more", good[:-1] + b"x"):
        blob.with_name(f"{blob.name}.incomplete").write_bytes(wrong)
        assert fetch(REPO, environ).status == "success"
        assert blob.read_bytes() == good
        pulled.remove(cache, ALIAS)
        blob.parent.mkdir(parents=True)


def test_a_wrong_checksum_is_said_and_nothing_of_it_is_kept(
    hub: Hub, environ: dict[str, str], cache: Path
) -> None:
    hub.wrong.add("tiny-Q4_K_M.gguf")
    ended = fetch(REPO, environ)
    assert ended.error is not None
    assert ended.error.code == "checksum_mismatch"
    assert blobs(cache) == set()
    assert pulled.discover(cache).models == ()
    hub.wrong.clear()
    assert fetch(REPO, environ).status == "success"


class NoLock:
    """As on a network drive whose server knows no locks: everybody gets it."""

    def acquire(self, timeout: float = -1) -> NoLock:
        return self

    def release(self) -> None:
        """There is nothing to give back."""

    def __enter__(self) -> NoLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulled, "FileLock", lambda path: NoLock())


@pytest.mark.parametrize("is_taken", [False, True])
def test_two_pulls_whose_locks_exclude_nobody_get_what_the_hub_promises(
    hub: Hub, environ: dict[str, str], cache: Path, no_locks: None, is_taken: bool
) -> None:
    """`is_taken`: the second one believes that the first is gone, and goes on with its part."""
    hub.hold_at, ended = 0.5, []
    first = threading.Thread(target=lambda: ended.append(fetch(REPO, environ)))
    first.start()
    assert hub.held.wait(30)
    hub.hold_at = None
    if is_taken:
        (part,) = cache.glob("models--*/blobs/*.incomplete")
        eventually(lambda: part.stat().st_size > 0)
        part.rename(part.with_name(f"{part.name.partition('.')[0]}.incomplete"))
    ended.append(fetch(REPO, environ))
    hub.go_on.set()
    first.join()
    assert [each.status for each in ended] == ["success", "success"]
    (blob,) = cache.glob("models--*/blobs/*")
    assert blob.read_bytes() == hub.repositories[REPO]["tiny-Q4_K_M.gguf"]
    assert [found.alias for found in pulled.discover(cache).models] == [ALIAS]


def test_the_end_of_a_repository_takes_nothing_of_a_pull_that_begins_meanwhile(
    hub: Hub, environ: dict[str, str], cache: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(REPO, environ)
    remove_files = pulled._remove_files

    def beside_another_pull(*which: Any) -> int:
        freed = remove_files(*which)
        assert fetch(f"{REPO}:Q8_0", environ).status == "success"
        return freed

    monkeypatch.setattr(pulled, "_remove_files", beside_another_pull)
    pulled.remove(cache, ALIAS)
    assert [found.alias for found in pulled.discover(cache).models] == [f"{REPO}:Q8_0"]


def test_split_models_and_projectors_come_whole(hub: Hub, environ: dict[str, str], cache: Path) -> None:
    assert fetch("org/split-GGUF", environ).alias == "org/split-GGUF:BF16"
    assert fetch("org/sees-GGUF:Q8_0", environ).status == "success"
    found = {each.alias: each for each in pulled.discover(cache).models}
    assert len(found["org/split-GGUF:BF16"].model.files) == 3
    assert found["org/sees-GGUF:Q8_0"].capabilities == ("completion", "vision")


# --- what may be wrong ----------------------------------------------------------------------------------------


def refusal(reference: str, environ: dict[str, str]) -> tuple[str, str]:
    ended = fetch(reference, environ)
    assert ended.status == "failed"
    assert ended.error is not None
    return ended.error.code, ended.error.message


def test_a_gated_repository_needs_the_token_and_only_the_hub_gets_it(
    hub: Hub, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_sesame"
    code, message = refusal(REPO, environ)
    assert (code, "HF_TOKEN" in message, f"{hub.url}/{REPO}" in message) == ("gated", True, True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refusal(REPO, environ)[0] == "gated"
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    assert fetch(REPO, environ).status == "success"
    assert hub.leaked_tokens == []


def test_what_is_not_there_is_said_with_what_is(hub: Hub, environ: dict[str, str]) -> None:
    assert refusal("org/absent", environ)[0] == "not_found"
    assert refusal(f"{REPO}:Q5_0", environ) == ("no_such_file", f"{REPO} has no Q5_0; it has Q4_K_M, Q8_0")
    assert refusal("nonsense", environ)[0] == "invalid_reference"
    ended = fetch(REPO, environ, alias="two words")
    assert ended.error is not None
    assert ended.error.code == "invalid_alias"
    hub.page = b"<html>Please log in to this network</html>"
    assert refusal(REPO, environ)[0] == "hub_error"
    assert refusal(REPO, {**environ, "HF_ENDPOINT": "http://127.0.0.1:9"})[0] == "unreachable"
    assert refusal(REPO, {"HF_ENDPOINT": hub.url})[0] == "no_cache"


def test_room_on_the_disk_is_looked_at_first(hub: Hub, environ: dict[str, str]) -> None:
    hub.sizes["tiny-Q4_K_M.gguf"] = 1 << 60
    code, message = refusal(REPO, environ)
    assert code == "disk_full"
    assert "needs 1152921504.6 GB more" in message
    assert hub.fetched == []


def test_a_disk_that_fills_up_keeps_what_has_arrived(
    hub: Hub, environ: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    limit = len(hub.repositories[REPO]["tiny-Q4_K_M.gguf"]) // 2

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    ended = subprocess.run(
        command("pull", REPO),
        cwd=tmp_path,
        env=clean(environ, tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=small_files_only,
    )
    assert ended.returncode == 1
    assert "no space left" in ended.stderr
    assert pulled.discover(cache).models == ()
    (partial,) = cache.glob("models--*/blobs/*.incomplete")
    arrived = partial.stat().st_size
    assert arrived > 0
    assert run("pull", REPO, cwd=tmp_path, **environ).returncode == 0
    assert hub.fetched[-1] == ("tiny-Q4_K_M.gguf", arrived)


def test_an_alias_of_another_model_is_not_taken_over(hub: Hub, environ: dict[str, str]) -> None:
    assert fetch(REPO, environ, alias="mine").alias == "mine"
    ended = fetch(f"{REPO}:Q8_0", environ, alias="mine")
    assert ended.error is not None
    assert ended.error.code == "alias_taken"


def test_what_would_not_be_served_under_its_name_is_not_pulled(
    start: Start, hub: Hub, environ: dict[str, str], tmp_path: Path, tiny: Path
) -> None:
    other = {"models": {ALIAS: {"model_path": str(tiny)}, f"{REPO}:Q8_0": {"model_path": str(tiny)}}}
    router = start(other, **environ)  # which writes config.json
    for arguments in ([REPO], [f"{REPO}:Q8_0"], [REPO, "--alias", ALIAS]):
        ended = run("pull", *arguments, cwd=tmp_path, **environ)
        assert (ended.returncode, "taken by a model from config.json" in ended.stderr) == (1, True)
    answer = router.http.post("/pull", json={"model": f"{REPO}:Q4_K_M"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "name_taken")
    assert hub.fetched == []
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')  # some model's own
    assert run("pull", REPO, cwd=tmp_path, **environ).returncode == 0


def test_what_is_on_the_hub_is_estimated_without_a_download(
    hub: Hub, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = run("estimate", "hf.co/org/sees-GGUF", "-c", "512", cwd=tmp_path, **environ)
    assert ended.stdout.splitlines()[0] == "org/sees-GGUF:Q4_K_M: tiny-Q4_K_M.gguf with mmproj-F16.gguf"
    assert ("mmproj" in ended.stdout.splitlines()[3], "context: 512 tokens" in ended.stdout) == (True, True)
    split, projector, choice = remote_headers.read_whole("org/split-GGUF:BF16", environ)
    parts = hub.repositories["org/split-GGUF"].values()
    assert (split.file_bytes, projector, choice and len(choice.parts)) == (sum(map(len, parts)), None, 3)
    assert (hub.fetched, list(tmp_path.glob("hf/**/*.gguf"))) == ([], [])

    def said(reference: str) -> str:
        with pytest.raises(remote_headers.CannotRead) as error:
            remote_headers.read_whole(reference, environ)
        return str(error.value)

    for reference in ("org/absent", f"{REPO}:Q5_0"):
        assert said(reference) == refusal(reference, environ)[1]
    hub.token = "hf_sesame"
    assert said(REPO) == said(f"hf.co/{REPO}/tiny-Q8_0.gguf") == refusal(REPO, environ)[1]
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    remote_headers.read_whole(REPO, environ)
    assert hub.leaked_tokens == []


# --- away again -----------------------------------------------------------------------------------------------


def test_rm_removes_exactly_what_the_pull_brought(
    hub: Hub, environ: dict[str, str], cache: Path, tmp_path: Path
) -> None:
    for quant in ("Q4_K_M", "Q8_0"):
        fetch(f"org/sees-GGUF:{quant}", environ)
    assert len(blobs(cache)) == 3
    assert run("rm", "org/sees-GGUF:Q4_K_M", cwd=tmp_path, **environ).returncode == 0
    (left,) = pulled.discover(cache).models
    assert (left.alias, left.capabilities) == ("org/sees-GGUF:Q8_0", ("completion", "vision"))
    assert len(blobs(cache)) == 2
    pulled.remove(cache, "org/sees-GGUF:Q8_0")
    assert list(cache.glob("models--*")) == []
    ended = run("rm", "org/sees-GGUF:Q8_0", cwd=tmp_path, **environ)
    assert (ended.returncode, "pulled are: none" in ended.stderr) == (1, True)


def test_rm_leaves_what_another_program_had_brought(hub: Hub, environ: dict[str, str], cache: Path) -> None:
    fetch(REPO, environ)
    (cache / f"models--{REPO.replace('/', '--')}" / pulled.RECORD).unlink()  # as if another program had done it
    assert fetch(REPO, environ).status == "success"
    before = blobs(cache)
    pulled.remove(cache, ALIAS)
    assert blobs(cache) == before


def test_a_damaged_record_of_one_repository_stops_no_pull_and_is_set_aside(
    hub: Hub, environ: dict[str, str], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetch(REPO, environ)
    record = cache / f"models--{REPO.replace('/', '--')}" / pulled.RECORD
    record.write_bytes(b'{"models": {"a')
    (skipped,) = pulled.discover(cache).skipped
    assert "must be pulled again" in skipped.reason
    assert fetch("org/sees-GGUF:Q8_0", environ).status == "success"
    with pytest.raises(pulled.NotPulled, match="pulled are: org/sees-GGUF:Q8_0"):
        pulled.remove(cache, ALIAS)
    hub.fetched.clear()
    assert fetch(REPO, environ).status == "success"
    assert hub.fetched == []
    assert f"{record} is damaged" in caplog.text
    assert record.with_name("llama-router.json.broken").read_bytes() == b'{"models": {"a'
    assert {found.alias for found in pulled.discover(cache).models} == {ALIAS, "org/sees-GGUF:Q8_0"}


@pytest.mark.parametrize("update", [False, True])
def test_rm_clears_away_a_broken_download(
    hub: Hub, content: dict[str, bytes], environ: dict[str, str], cache: Path, update: bool
) -> None:
    if update:
        fetch(REPO, environ)
        newer = {"tiny-Q4_K_M.gguf": content["tiny-Q8_0.gguf"], "mmproj-F16.gguf": content["mmproj-F16.gguf"]}
        hub.repositories[REPO] = newer
    hub.hold_at = 0.5
    stop = threading.Event()
    ended: list[Progress] = []
    thread = threading.Thread(target=lambda: ended.append(fetch(REPO, environ, stop=stop)))
    thread.start()
    assert hub.held.wait(30)
    stop.set()
    hub.go_on.set()
    thread.join()
    assert ended[0].status == "cancelled"
    assert len(blobs(cache)) > update
    assert [found.alias for found in pulled.discover(cache).models] == ([ALIAS] if update else [])
    pulled.remove(cache, ALIAS)
    assert list(cache.glob("models--*")) == []


def test_rm_takes_what_came_whole_of_an_update_that_failed(
    hub: Hub, content: dict[str, bytes], environ: dict[str, str], cache: Path
) -> None:
    fetch(REPO, environ)
    newer = {"tiny-Q4_K_M.gguf": content["tiny-Q8_0.gguf"], "mmproj-F16.gguf": content["mmproj-F16.gguf"]}
    hub.repositories[REPO], hub.wrong = newer, {"tiny-Q4_K_M.gguf"}
    assert fetch(REPO, environ).status == "failed"  # the projector has come by then, as a rule
    assert [found.projector for found in pulled.discover(cache).models] == [None]  # the old one is served on
    pulled.remove(cache, ALIAS)
    assert list(cache.glob("models--*")) == []


def test_a_newer_revision_takes_the_place_of_the_old_one(
    hub: Hub, content: dict[str, bytes], environ: dict[str, str], cache: Path
) -> None:
    fetch(REPO, environ)
    (old,) = blobs(cache)
    hub.repositories[REPO] = {"tiny-Q4_K_M.gguf": content["tiny-Q8_0.gguf"]}
    assert fetch(REPO, environ).status == "success"
    (new,) = blobs(cache)
    assert new != old
    assert [found.alias for found in pulled.discover(cache).models] == [ALIAS]


# --- together -------------------------------------------------------------------------------------------------


def test_two_processes_share_one_download(hub: Hub, environ: dict[str, str], tmp_path: Path) -> None:
    size = len(hub.repositories[REPO]["tiny-Q4_K_M.gguf"])
    hub.hold_at = 0.5
    pulls = [
        subprocess.Popen(command("pull", "--json", REPO), env=clean(environ, tmp_path), stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert hub.held.wait(30)
    eventually(lambda: sum(f"/api/models/{REPO}" in asked for asked in hub.asked) == 2, timeout_sec=30)
    hub.go_on.set()
    for process in pulls:
        output, _ = process.communicate(timeout=30)
        assert json.loads(output.splitlines()[-1])["status"] == "success"
    assert (hub.fetched, hub.sent_bytes) == ([("tiny-Q4_K_M.gguf", 0)], size)


def test_a_running_router_notices_what_the_command_line_pulls_and_removes(
    start: Start, environ: dict[str, str], tmp_path: Path
) -> None:
    with_state = {**environ, "LLAMA_ROUTER_STATE_DIR": str(tmp_path / "state")}
    router = start(**with_state, LLAMA_ROUTER__KV_STORE__MIN_TOKENS="64")
    assert run("pull", REPO, "--alias", "small", cwd=tmp_path, **environ).returncode == 0
    eventually(lambda: "small" in aliases(router))
    long, conversations = "A long conversation. " * 40, tmp_path / "state" / "kv"
    assert router.chat("small", content=long).status_code == 200
    router.unload()
    assert len(list(conversations.glob("*.kv"))) == 1
    assert run("pull", REPO, cwd=tmp_path, **environ).returncode == 0
    eventually(lambda: {"small", ALIAS} <= aliases(router))  # two names for one file
    with ollama.Client(router.url, timeout=60) as client:
        client.copy("small", "own")
        in_use = run("rm", "small", cwd=tmp_path, **with_state)
        assert (in_use.returncode, "'own' was created from 'small'" in in_use.stderr) == (1, True)
        client.delete("own")
    assert run("rm", "small", cwd=tmp_path, **with_state).returncode == 0
    eventually(lambda: "small" not in aliases(router))
    assert router.chat("small").status_code == 404
    eventually(lambda: not list(conversations.glob("*.kv")))
    assert router.chat(ALIAS, content=long).headers["x-kv"] == "none"
    router.stop()
    assert len(list(conversations.glob("*.kv"))) == 1
    assert run("rm", ALIAS, cwd=tmp_path, **with_state).returncode == 0
    assert not list(conversations.glob("*.kv")), "without a router, too"


def test_the_command_line_has_another_router_pull_and_remove(
    start: Start, hub: Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    router = start(**environ)
    at = {"LLAMA_ROUTER_URL": router.url}
    hub.hold_at = 0.5
    process = subprocess.Popen(
        command("pull", REPO), cwd=tmp_path, env=clean(at, tmp_path), stderr=-1, stdout=-1, text=True
    )
    assert hub.held.wait(30)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said.splitlines()) == (130, ["", "llama-router: cancelled; pull again to resume"])
    assert [pull["status"] for pull in router.http.get("/v1/models/pull").json()["pulls"]] == ["cancelled"]
    hub.go_on.set()
    ended = run("pull", REPO, "--alias", "small", "--json", cwd=tmp_path, **at)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["status"] == "success"
    assert "small" in aliases(router)
    removed = run("rm", "small", "--json", cwd=tmp_path, **at)
    assert json.loads(removed.stdout)["model"] == "small"
    assert run("rm", "small", cwd=tmp_path, **at).returncode == 1
    missing = run("pull", "org/nothing-GGUF", cwd=tmp_path, **at)
    assert (missing.returncode, "org/nothing-GGUF" in missing.stderr) == (1, True)


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in lines:
        if line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("data:"):
            yield name, json.loads(line[5:])


def test_a_router_pulls_and_serves_at_once(start: Start, hub: Hub, environ: dict[str, str]) -> None:
    router = start(**environ, LLAMA_ROUTER__KV_STORE__MIN_TOKENS="64")
    body = {"model": f"hf.co/{REPO}", "stream": True}
    with router.http.stream("POST", "/v1/models/pull", json=body) as stream:
        told = list(events(stream.iter_lines()))
    assert [name for name, _ in told][-1] == "success"
    assert told[-1][1]["memory"]["fits"] is True
    assert told[-1][1]["completed_bytes"] == len(hub.repositories[REPO]["tiny-Q4_K_M.gguf"])
    assert router.chat(ALIAS, content="A long conversation. " * 40).headers["x-kv"] == "none"
    gone = router.http.delete(f"/v1/models/pulled/{ALIAS}").json()
    assert gone["freed_bytes"] == told[-1][1]["total_bytes"]
    assert router.chat(ALIAS).status_code == 404
    assert router.http.delete(f"/v1/models/pulled/{ALIAS}").json()["error"]["code"] == "model_not_found"
    eventually(lambda: router.engines == [])
    assert router.http.get("/v1/kv").json()["total"]["count"] == 0, "nor is it saved when its engine ends"


def test_ollamas_client_pulls_uses_and_deletes(start: Start, hub: Hub, environ: dict[str, str]) -> None:
    router = start(**environ)
    with ollama.Client(router.url, timeout=60) as client:
        told = list(client.pull(f"hf.co/{REPO}", stream=True))
        assert (told[0].status, told[-1].status) == ("pulling manifest", "success")
        shown = [line for line in told if line.total]
        assert {line.total for line in shown} == {len(hub.repositories[REPO]["tiny-Q4_K_M.gguf"])}
        assert client.pull(f"hf.co/{REPO}").status == "success"
        for name in (f"hf.co/{REPO}", f"hf.co/{ALIAS}", ALIAS):  # as it was pulled, and as it is listed
            assert client.chat(name, [{"role": "user", "content": "hi"}], options={"num_predict": 1}).done
        assert ALIAS in {model.model for model in client.list().models}
        assert client.delete(f"hf.co/{ALIAS}").status == "success"
        assert ALIAS not in {model.model for model in client.list().models}
        with pytest.raises(ollama.ResponseError, match="org/absent"):
            list(client.pull("hf.co/org/absent", stream=True))
        with pytest.raises(ollama.ResponseError, match="org/absent") as absent:
            client.pull("hf.co/org/absent")
        assert absent.value.status_code == 500
        with pytest.raises(ollama.ResponseError, match="USER/REPO") as unknown:
            client.pull("llama3")
        assert unknown.value.status_code == 400


def test_a_slow_pull_is_shared_cancelled_and_taken_up_again(
    start: Start, hub: Hub, environ: dict[str, str]
) -> None:
    router = start(**environ)
    hub.hold_at = 0.5
    first, second = (router.http.post("/v1/models/pull", json={"model": REPO}) for _ in range(2))
    assert (first.status_code, second.status_code) == (202, 202)
    pull_id = first.json()["id"]
    assert second.json()["id"] == pull_id
    assert first.headers["location"] == f"/v1/models/pull/{pull_id}"
    assert hub.held.wait(30)
    # Meanwhile the router does what it is for.
    assert router.chat("demo").status_code == 200
    assert router.chat(ALIAS).status_code == 404
    assert router.http.get("/v1/models/pull").json()["pulls"][0]["status"] == "downloading"
    assert "router_pulls_running 1\n" in router.http.get("/metrics").text
    with router.http.stream("GET", f"/v1/models/pull/{pull_id}/stream") as stream:
        told = events(stream.iter_lines())
        assert next(told)[0] == "progress"
        cancelled = router.http.delete(f"/v1/models/pull/{pull_id}").json()
        assert cancelled["status"] == "cancelled"
        assert list(told)[-1][0] == "cancelled"
    assert router.chat(ALIAS).status_code == 404
    hub.go_on.set()
    again = router.http.post("/v1/models/pull", json={"model": REPO}).json()
    assert again["id"] != pull_id
    eventually(lambda: router.http.get(f"/v1/models/pull/{again['id']}").json()["status"] == "success", 20)
    assert hub.fetched[-1][1] > 0
    assert router.chat(ALIAS).status_code == 200
    text = router.http.get("/metrics").text
    counts = {"success": 1, "failed": 0, "cancelled": 1}
    assert all(f'router_pulls_total{{outcome="{outcome}"}} {count}\n' in text for outcome, count in counts.items())
    received = int(text.partition("\nrouter_pull_bytes_total ")[2].partition("\n")[0])
    size = len(hub.repositories[REPO]["tiny-Q4_K_M.gguf"])
    assert 0 < received <= size, "nothing counts twice; what came before a download's first report does not count"


def test_what_is_being_pulled_is_not_removed_beneath_it(
    start: Start, hub: Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    router = start(**environ)
    hub.hold_at = 0.5
    pull_id = router.http.post("/v1/models/pull", json={"model": REPO}).json()["id"]
    assert hub.held.wait(30)
    eventually(lambda: router.http.get(f"/v1/models/pull/{pull_id}").json()["status"] == "downloading")
    answer = router.http.delete(f"/v1/models/pulled/{ALIAS}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_in_use")
    assert f"DELETE /v1/models/pull/{pull_id}" in answer.json()["error"]["message"]
    ended = run("rm", ALIAS, cwd=tmp_path, **environ)
    assert (ended.returncode, "is being pulled" in ended.stderr) == (1, True)
    hub.go_on.set()
    eventually(lambda: router.http.get(f"/v1/models/pull/{pull_id}").json()["status"] == "success", 20)
    assert router.http.delete(f"/v1/models/pulled/{ALIAS}").status_code == 200


def test_a_failed_pull_says_why(start: Start, hub: Hub, environ: dict[str, str]) -> None:
    router = start(**environ)
    with router.http.stream("POST", "/v1/models/pull", json={"model": "org/absent", "stream": True}) as stream:
        name, last = list(events(stream.iter_lines()))[-1]
    assert (name, last["error"]["code"]) == ("failed", "not_found")
    answer = router.http.post("/v1/models/pull", json={"model": "nonsense"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_reference")
    assert router.http.get("/v1/models/pull/none").json()["error"]["code"] == "pull_not_found"


def test_only_a_full_key_pulls_and_no_chat_ever_does(
    start: Start, hub: Hub, environ: dict[str, str], tiny: Path
) -> None:
    api = {"api_keys": ["full"], "inference_keys": ["some"]}
    config = {"api": api, "models": {"a": {"model_path": str(tiny)}}, "aliases": {"other": "a"}}
    router = start(config, **environ)
    some, full = ({"Authorization": f"Bearer {key}"} for key in ("some", "full"))
    assert router.http.post("/v1/models/pull", json={"model": REPO}, headers=some).status_code == 403
    assert router.http.get("/v1/models/pull", headers=some).status_code == 403
    assert router.http.get("/v1/models/pull", headers=full).status_code == 200
    assert router.chat(f"hf.co/{REPO}", headers=full).status_code == 404
    assert router.chat(ALIAS, headers=some).status_code == 404
    for alias in ("a", "other"):  # whoever asked for it then would not get what was pulled
        taken = router.http.post("/v1/models/pull", json={"model": REPO, "alias": alias}, headers=full)
        assert (taken.status_code, taken.json()["error"]["code"]) == (409, "name_taken")
    assert hub.asked == []


def test_a_router_that_stops_takes_its_pulls_along(
    start: Start, hub: Hub, environ: dict[str, str], cache: Path
) -> None:
    router = start(**environ)
    hub.hold_at = 0.5
    router.http.post("/v1/models/pull", json={"model": REPO})
    assert hub.held.wait(30)
    pulls = router.engines
    assert router.stop(signal.SIGTERM) == 0
    assert pulls
    assert not any(pull.is_running() for pull in pulls)
    assert pulled.discover(cache).models == ()


@pytest.mark.parametrize("there", [30, 70])
def test_the_last_fifty_pulls_can_be_asked_about(there: int) -> None:
    async def nobody_looks() -> None:
        """No router serves them."""

    async def story() -> list[str]:
        downloads = Downloads(nobody_looks)
        reference = repository.parse(REPO, {})
        for number in range(there):
            over = Pull(reference, f"alias-{number}")
            over.over = True
            downloads.pulls[over.id] = over
        downloads.start(reference, "one-more", {}, {})
        await downloads.shut_down()
        return [str(pull.wanted[1]) for pull in downloads.pulls.values()]

    assert asyncio.run(story()) == [*(f"alias-{number}" for number in range(there)[-49:]), "one-more"]


# --- models in safetensors -----------------------------------------------------------------------------------


FOLDER = "org/tiny"


@pytest.fixture
def with_safetensors(hub: Hub, tmp_path: Path) -> dict[str, bytes]:
    """A repository in safetensors, in three files, and copies for other programs."""
    folder = write_model(tmp_path / "source", shards=3)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"tokenizer.json": b"{}", "1_Pooling/config.json": b"{}"}
    hub.repositories[FOLDER] = {**files, "README.md": b"# A card", "pytorch_model.bin": bytes(9)}
    return files


def test_a_repository_in_safetensors_is_pulled_whole_for_every_program(
    hub: Hub, with_safetensors: dict[str, bytes], environ: dict[str, str], cache: Path, tmp_path: Path
) -> None:
    import huggingface_hub

    hub.cuts = [0.5]
    ended = run("pull", FOLDER, cwd=tmp_path, VLLM_PATH=str(played_vllm(tmp_path / "vllm")), **environ)
    assert ended.returncode == 0, ended.stderr
    assert "for a context of 2,048 on vLLM: fits now" in ended.stdout

    snapshot = hf_cache.snapshot(cache, FOLDER)
    assert snapshot is not None
    assert f"{FOLDER} is available: {snapshot}" in ended.stdout
    assert {
        path.relative_to(snapshot).as_posix(): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()
    } == with_safetensors
    assert huggingface_hub.snapshot_download(FOLDER, cache_dir=cache, local_files_only=True) == str(snapshot)
    assert hf_model.read(snapshot).weight_bytes == 2 * LLAMA_PARAMETERS
    hub.fetched.clear()
    assert fetch(FOLDER, environ).cached
    assert hub.fetched == []

    assert run("rm", FOLDER, cwd=tmp_path, **environ).returncode == 0
    assert list(cache.glob("models--*")) == []


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "config.json"])
def test_a_pull_in_safetensors_ends_with_the_checksums_of_all_files(
    hub: Hub, with_safetensors: dict[str, bytes], environ: dict[str, str], name: str
) -> None:
    hub.wrong = {name}
    ended = fetch(FOLDER, environ)
    assert ended.error is not None
    assert ended.error.code == "checksum_mismatch"
    assert name in ended.error.message
    hub.wrong.clear()
    assert fetch(FOLDER, environ).status == "success"


def test_a_model_in_safetensors_is_estimated_by_its_headers_only(
    hub: Hub, with_safetensors: dict[str, bytes], environ: dict[str, str], tmp_path: Path
) -> None:
    ended = run("estimate", FOLDER, "-c", "512", cwd=tmp_path, **environ)
    lines = ended.stdout.splitlines()
    mib = 2 * LLAMA_PARAMETERS / (1 << 20)
    assert lines[0] == f"{FOLDER}: LlamaForCausalLM (bfloat16, {mib:.0f} MiB on disk, trained for 2048 tokens)"
    assert "for one request of 512 tokens" in ended.stdout
    assert "MiB in all on Transformers" in ended.stdout
    local = run("estimate", str(tmp_path / "source"), "-c", "512", cwd=tmp_path, **environ)
    assert local.stdout.splitlines()[2:4] == lines[2:4]

    programs = {
        "VLLM_PATH": str(played_vllm(tmp_path / "vllm")),
        "TRANSFORMERS_PATH": str(played_transformers(tmp_path)),
    }
    with_vllm = {**environ, **programs}
    near, far = (
        run("estimate", model, cwd=tmp_path, **with_vllm).stdout.splitlines()
        for model in (str(tmp_path / "source"), FOLDER)
    )
    assert far[3].endswith("MiB for 8 requests at once, each of 2048 tokens")
    assert "in all on vLLM" in far[4]
    assert [line.partition(",")[0] for line in near[2:5]] == [line.partition(",")[0] for line in far[2:5]]
    assert hub.fetched == []
    quantized = run("estimate", f"{FOLDER}:fp32", cwd=tmp_path, **with_vllm).stdout
    assert f"weights: {2 * mib:,.0f} MiB" in quantized
    assert "in all on Transformers" in quantized, "vLLM does not know `quantize`"
    untold = {**with_safetensors, "tokenizer_config.json": b"{}"}
    hub.repositories["org/plain"], hub.repositories["org/embeds"] = untold, {**untold, "modules.json": b"[]"}
    assert "on Transformers" in run("estimate", "org/plain", cwd=tmp_path, **with_vllm).stdout, "no chat template"
    assert "on vLLM" in run("estimate", "org/embeds", cwd=tmp_path, **with_vllm).stdout, "only vLLM embeds"

    refused = run("estimate", FOLDER, "-ngl", "9", cwd=tmp_path, **environ)
    assert refused.returncode == 2
    assert "-ngl is a flag of llama-server" in refused.stderr


def test_gpt2_is_pulled_used_and_removed_by_the_name_that_everybody_knows(
    start: Start,
    hub: Hub,
    with_safetensors: dict[str, bytes],
    environ: dict[str, str],
    cache: Path,
    tmp_path: Path,
) -> None:
    repo = "openai-community/gpt2"
    hub.repositories[repo] = hub.repositories[FOLDER]
    router = start({"system": {"transformers_path": str(played_transformers(tmp_path))}}, **environ)
    unknown = router.chat("gpt2")
    assert unknown.status_code == 404
    assert "`llama-router pull gpt2`" in unknown.text

    answer = router.http.post("/pull", json={"model": "gpt2", "quantize": "fp32"}, timeout=60).json()
    snapshot = hf_cache.snapshot(cache, "gpt2")
    assert (answer["model"], answer["backend"]["local_path"]) == (repo, str(snapshot))
    assert aliases(router) == {repo}
    loaded = router.http.post("/v1/models", json={"model": "gpt2", "device": "cpu"}, timeout=60)
    assert loaded.status_code == 200, loaded.text
    answered = router.chat("gpt2", content="one two", max_tokens=9).json()
    assert answered["choices"][0]["message"]["content"] == "one two"
    (listed,) = router.http.get("/v1/models").json()["data"]
    assert (listed["source"], listed["size"], listed["context_length"]) == ("pulled", 2 * LLAMA_PARAMETERS, 2048)
    assert f"models.{repo}.quantize = fp32   (pulled)" in run("check", cwd=tmp_path, **environ).stdout

    removed = router.http.delete("/v1/models/pulled/gpt2")
    assert removed.status_code == 200, removed.text
    assert aliases(router) == set()
    assert list(cache.glob("models--*")) == []
    assert fetch("distilgpt2", environ).error is not None  # it is not on this hub
    assert fetch("gpt2", environ).status == "success"
    assert run("rm", "gpt2", cwd=tmp_path, **environ).returncode == 0
    assert list(cache.glob("models--*")) == []
