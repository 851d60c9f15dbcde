"""Stories about models that come and go while the router runs."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from pathlib import Path

import pytest
from conftest import Router, Start, eventually, fake, models
from tiny_models import write_llama

from router.catalog.load import load
from router.store import watch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "blobs" / "models"  # what is above it has no say in what is noticed
    folder.mkdir(parents=True)
    write_llama(folder / "first.gguf")
    return folder


def aliases(router: Router) -> set[str]:
    return set(router.http.get("/status").json()["models"])


def test_a_file_that_arrives_is_served_and_one_that_goes_is_not(start: Start, folder: Path) -> None:
    router = start(arguments=["--models-dir", str(folder)])
    assert router.chat("first").status_code == 200
    (folder / "deep").mkdir()
    write_llama(folder / "deep" / "second.gguf", seed=1)
    eventually(lambda: aliases(router) == {"first", "second"})
    assert router.chat("second").status_code == 200
    (engine,) = [engine for engine in router.engines if router.status("first")["pid"] == engine.pid]
    (folder / "first.gguf").unlink()
    eventually(lambda: aliases(router) == {"second"})
    eventually(lambda: not engine.is_running())
    answer = router.chat("first")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_stream_in_flight_outlives_the_file_of_its_model(start: Start, folder: Path, tmp_path: Path) -> None:
    slow = fake(tmp_path, chunks="40", chunk_sec="0.1")
    router = start({"system": {"llama_server_path": slow, "models_dirs": [str(folder)]}})
    body = {"model": "first", "messages": [], "stream": True}
    with router.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        (folder / "first.gguf").unlink()
        eventually(lambda: aliases(router) == set())
        assert [line for line in lines if line][-2:] == [
            'data: {"choices":[{"delta":{"content":"39"}}]}',
            "data: [DONE]",
        ]


def test_a_file_is_not_served_while_it_is_written(start: Start, folder: Path, tmp_path: Path) -> None:
    """In order, as by a copy, or after its whole size was reserved, as by some programs that download."""
    router = start(arguments=["--models-dir", str(folder)])
    content = write_llama(tmp_path / "source.gguf", n_layer=4).read_bytes()
    for name, reserved in (("copied", 0), ("reserved", len(content))):
        with (folder / f"{name}.gguf").open("wb", buffering=0) as file:
            file.truncate(reserved)
            for start_byte in range(0, len(content), len(content) // 20):
                file.write(content[start_byte : start_byte + len(content) // 20])
                threading.Event().wait(0.1)
                assert name not in aliases(router)
        eventually(lambda name=name: name in aliases(router))  # type: ignore[misc]
        assert router.chat(name).status_code == 200


def context(router: Router, alias: str) -> int:
    tokens: int = router.http.get(f"/v1/models/{alias}").json()["context_length"]
    return tokens


def test_a_file_that_is_replaced_is_served_as_it_was_until_the_new_one_has_settled(
    start: Start, folder: Path, tmp_path: Path
) -> None:
    """Wherever it comes from; requests find the model at any time."""
    mine = write_llama(tmp_path / "mine.gguf")
    router = start({"system": {"models_dirs": [str(folder)]}, "models": models(mine, "mine", flags=["-t", "1"])})
    for path, alias in ((folder / "first.gguf", "first"), (mine, "mine")):
        before = router.chat(alias)
        pid = router.status(alias)["pid"]
        assert (before.status_code, context(router, alias)) == (200, 2048)
        os.replace(write_llama(tmp_path / "new", context_length=512, seed=1), path)

        def is_new(alias: str = alias, pid: int = pid) -> bool:
            assert router.chat(alias).status_code == 200
            return bool(router.status(alias)["pid"] != pid)

        eventually(is_new)
        assert context(router, alias) == 512


def test_a_reload_sees_what_has_become_of_configured_files(start: Start, tiny: Path, tmp_path: Path) -> None:
    mine, template = shutil.copy(tiny, tmp_path / "mine.gguf"), tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    flags = ["-t", "1", "--chat-template-file", str(template)]
    router = start({"models": models(mine, "mine", "other", flags=flags)})
    router.chat("mine")
    pid = router.status("mine")["pid"]
    assert router.http.post("/v1/config/reload").json()["changed"] == []
    template.write_text("{{ messages[0].role }}")
    os.utime(template, (1, 1))
    assert router.http.post("/v1/config/reload").json()["changed"] == ["mine", "other"]
    assert router.chat("mine").status_code == 200
    assert router.status("mine")["pid"] != pid


def test_what_the_configuration_names_wins_and_the_other_file_is_named(
    start: Start, folder: Path, tmp_path: Path
) -> None:
    mine = write_llama(tmp_path / "mine.gguf", seed=1)
    system = {"models_dirs": [str(folder)]}
    router = start({"system": system, "models": models(mine, "first", "gone-later")})
    assert aliases(router) == {"first", "gone-later"}
    assert router.status("first")["source"] == "config.json"
    assert f"{folder}/first.gguf is not served: {mine} has the same name" in router.log
    # A file that the configuration names and that is gone is a matter of its requests, not of the others.
    mine.unlink()
    write_llama(folder / "other.gguf", seed=2)
    eventually(lambda: aliases(router) == {"first", "gone-later", "other"})
    assert router.chat("first").status_code == 503


def test_a_configuration_that_was_edited_waits_for_its_reload(start: Start, folder: Path, tmp_path: Path) -> None:
    router = start({"system": {"models_dirs": [str(folder)]}})
    (tmp_path / "config.json").write_text("{ half a")
    write_llama(folder / "other.gguf", seed=2)
    eventually(lambda: aliases(router) == {"first", "other"})


def test_a_folder_that_is_moved_in_and_out_brings_and_takes_its_models(
    start: Start, folder: Path, tmp_path: Path
) -> None:
    router = start(arguments=["--models-dir", str(folder)])
    write_llama(tmp_path / "elsewhere.gguf", seed=3)
    (tmp_path / "pack").mkdir()
    shutil.copy2(tmp_path / "elsewhere.gguf", tmp_path / "pack" / "packed.gguf")
    os.rename(tmp_path / "pack", folder / "pack")
    eventually(lambda: aliases(router) == {"first", "packed"})
    os.rename(folder / "pack", tmp_path / "pack")
    eventually(lambda: aliases(router) == {"first"})


def test_a_folder_that_is_put_in_the_place_of_another_is_watched_from_then_on(
    start: Start, folder: Path, tmp_path: Path
) -> None:
    link, other = tmp_path / "current", tmp_path / "other"
    link.symlink_to(folder)
    router = start(arguments=["--models-dir", str(link)])
    other.mkdir()
    shutil.copy2(folder / "first.gguf", other / "second.gguf")
    (tmp_path / "next").symlink_to(other)
    os.replace(tmp_path / "next", link)
    eventually(lambda: aliases(router) == {"second"})
    os.replace(other / "second.gguf", other / "third.gguf")
    eventually(lambda: aliases(router) == {"third"})


def test_where_no_folder_is_there_all_is_looked_at_again_only_once_one_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at a hundred configured models takes 25 ms."""
    monkeypatch.setattr(watch, "_THERE_SEC", 0.01)
    later = tmp_path / "later"
    looks: list[bool] = []

    async def look() -> bool:
        looks.append(later.is_dir())
        return False

    async def story() -> None:
        watching = asyncio.create_task(watch.watch(lambda: [later], look))
        while not looks:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        later.mkdir()
        while len(looks) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(story())
    assert looks == [False, True]


def test_a_found_model_that_the_configuration_speaks_of_is_waited_for_at_the_start(tmp_path: Path) -> None:
    """Its file has only just been written."""
    write_llama(tmp_path / "late.gguf")
    (tmp_path / "config.json").write_text('{"models": {"late": {"flags": ["-c", "512"]}}}')
    loaded = load(environ={}, cwd=tmp_path, models_dirs=[tmp_path])
    assert loaded.config.models["late"].model_path == tmp_path / "late.gguf"
