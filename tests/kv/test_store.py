"""Saved conversations are found by their beginning, bounded, and closed to others."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path

import msgspec
import pytest

from router.config.schema import KvStore as Settings
from router.kv.chain import Chain
from router.kv.store import KvStore, Saved


def save(
    store: KvStore,
    chain: Chain,
    *,
    group: str = "g",
    client: str = "",
    nbytes: int = 1000,
    prefill_sec: float = 1.0,
    age_sec: float = 0.0,
) -> Saved:
    """Save a conversation as an engine and its keeper would."""
    assert store.folder is not None
    saved = Saved(
        store.new_name(),
        group,
        "m",
        client,
        chain,
        tokens=len(chain) * 250,
        prompt_tokens=len(chain) * 250,
        nbytes=nbytes,
        checksum=0,
        prefill_sec=prefill_sec,
        used_at=time.time() - age_sec,
    )
    (store.folder / store.part(saved.name)).write_bytes(os.urandom(nbytes))
    assert store.keep(saved)
    for old in store.add(saved):
        store.forget(old)
        store.delete(old.name)
    return saved


@pytest.fixture
def store(tmp_path: Path) -> KvStore:
    return KvStore.open(tmp_path / "kv", Settings())


def names(store: KvStore) -> set[str]:
    return {saved.name for saved in store}


def test_the_longest_common_beginning_is_found(store: KvStore) -> None:
    short, long = save(store, (1, 2, 3)), save(store, (1, 2, 4, 5))
    assert store.find("g", "", (1, 2, 3, 9)) == (short, 3)
    assert store.find("g", "", (1, 2, 4, 6)) == (long, 3)
    found = store.find("g", "", (1, 2, 7))
    assert found is not None
    assert found.blocks == 2
    assert store.find("g", "", (8, 9)) is None
    assert store.find("other", "", (1, 2, 3)) is None


def test_a_conversation_that_has_grown_replaces_what_it_was(store: KvStore) -> None:
    first = save(store, (1, 2))
    branch = save(store, (1, 3, 4))
    grown = save(store, (1, 2, 5))
    assert names(store) == {branch.name, grown.name}
    assert not list((store.folder or Path()).glob(f"{first.name}*"))


def test_what_is_forgotten_leaves_others_findable(store: KvStore) -> None:
    one, other = save(store, (1, 2, 3)), save(store, (1, 2, 4))
    store.forget(other)
    assert store.find("g", "", (1, 2, 9)) == (one, 2)
    assert store.find("g", "", (1, 2, 4)) == (one, 2)


def test_clients_do_not_find_each_others_conversations(store: KvStore) -> None:
    store.is_shared = lambda: False
    mine = save(store, (1, 2), client="me")
    assert store.find("g", "me", (1, 2)) == (mine, 2)
    assert store.find("g", "you", (1, 2)) is None
    store.settings = Settings(shared=True)
    assert store.owner("me") == store.owner("you") == ""


def test_a_restart_finds_what_is_whole_and_deletes_the_rest(store: KvStore) -> None:
    folder = store.folder
    assert folder is not None
    kept, cut, unrecorded = save(store, (1,)), save(store, (2,)), save(store, (3,))
    os.truncate(folder / store.file(cut), 10)
    (folder / f"{unrecorded.name}.json").unlink()
    (folder / store.part(store.new_name())).write_bytes(b"x")
    store.distrust("bad", "it lies")
    store.close()
    again = KvStore.open(folder, Settings())
    assert names(again) == {kept.name}
    assert again.find("g", "", (1, 5)) is not None
    assert again.key == store.key
    assert again.distrusted == {"bad": "it lies"}
    left = {place.name for place in folder.iterdir()}
    assert left == {"key", "lock", "distrusted.json", f"{kept.name}.kv", f"{kept.name}.json"}


def test_only_the_owner_can_read_them(store: KvStore) -> None:
    assert store.folder is not None
    save(store, (1,))
    store.distrust("bad", "it lies")
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert {place.stat().st_mode & 0o777 for place in store.folder.iterdir()} == {0o600}


def test_records_hold_no_prompt(store: KvStore) -> None:
    saved = save(store, (1, 2))
    assert store.folder is not None
    record = msgspec.json.decode((store.folder / f"{saved.name}.json").read_bytes())
    assert set(record) == set(Saved.__struct_fields__)
    assert record["chain"] == [1, 2]


def test_a_damaged_state_is_seen(store: KvStore) -> None:
    saved = save(store, (1,), nbytes=9 << 20)
    assert store.folder is not None
    state = store.folder / store.file(saved)
    assert store.is_whole(saved)
    with state.open("r+b") as file:
        file.seek(5 << 20)
        byte = file.read(1)
        file.seek(5 << 20)
        file.write(bytes([byte[0] ^ 1]))
    assert not store.is_whole(saved)
    state.unlink()
    assert not store.is_whole(saved)


def test_least_worth_per_byte_goes_first(store: KvStore) -> None:
    store.settings = Settings(max_gb=3000 / 1e9)
    cheap = save(store, (1,), prefill_sec=0.1)
    dear = save(store, (2,), prefill_sec=10)
    old = save(store, (3,), prefill_sec=10, age_sec=48 * 3600)
    assert store.victims(0) == []
    assert store.victims(1000) == [cheap]
    assert store.victims(2000) == [cheap, old]
    store.use(cheap)
    assert store.victims(1000) == [old]
    store.release(cheap)
    assert store.victims(3000) == [cheap, old, dear]
    assert store.victims(3001) is None


def test_what_is_too_old_goes(store: KvStore) -> None:
    save(store, (1,), age_sec=71 * 3600)
    old = save(store, (2,), age_sec=73 * 3600)
    assert store.victims(0) == [old]


def test_a_use_is_remembered_over_a_restart(store: KvStore) -> None:
    saved = save(store, (1,), age_sec=71 * 3600)
    saved.used_at = time.time()
    store.note_use(saved)
    assert store.folder is not None
    store.close()
    (again,) = KvStore.open(store.folder, Settings())
    assert again.used_at == pytest.approx(saved.used_at, abs=0.01)


def test_rates_are_known_from_what_is_saved(store: KvStore) -> None:
    save(store, (1, 2), nbytes=5000, prefill_sec=2.0)
    assert store.folder is not None
    store.close()
    rates = KvStore.open(store.folder, Settings()).rates("g")
    assert rates.tokens_per_sec == 250
    assert rates.token_bytes == 10


def test_two_routers_do_not_share_a_folder(store: KvStore, caplog: pytest.LogCaptureFixture) -> None:
    saved = save(store, (1,))
    other = KvStore.open(store.folder, Settings())
    assert not other.enabled
    assert "another router uses it" in caplog.text
    assert store.is_whole(saved)


def test_a_folder_that_was_deleted_is_not_there(store: KvStore) -> None:
    assert asyncio.run(store.is_there())
    assert store.folder is not None
    shutil.rmtree(store.folder)
    assert not asyncio.run(store.is_there())


def test_a_folder_that_cannot_be_used_keeps_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = KvStore.open(tmp_path / "file" / "kv", Settings())
    assert not store.enabled
    assert "cannot be used: Not a directory" in caplog.text


def test_what_is_cleared_is_deleted_and_leaves_others_findable(store: KvStore) -> None:
    one, other, of_another = save(store, (1, 2, 3)), save(store, (1, 2, 4)), save(store, (1, 5), group="h")
    of_another.model = "n"
    assert asyncio.run(store.clear("m")) == [one, other]
    assert names(store) == {of_another.name}
    assert store.find("g", "", (1, 2, 3)) is None
    assert store.find("h", "", (1, 5)) == (of_another, 2)
    assert asyncio.run(store.clear()) == [of_another]
    assert store.folder is not None
    assert {place.name for place in store.folder.iterdir()} == {"key", "lock"}


def test_several_can_be_forgotten_at_once(store: KvStore) -> None:
    saved = [save(store, (1, 2, number)) for number in (3, 4, 5)]
    store.forget(*saved[:2])
    assert store.find("g", "", (1, 2, 3)) == (saved[2], 2)


def test_a_file_that_an_engine_reads_is_cleared_when_it_has_read_it(store: KvStore) -> None:
    saved = save(store, (1, 2))
    assert store.folder is not None
    store.use(saved)
    store.use(saved)
    assert asyncio.run(store.clear()) == [saved]
    assert store.find("g", "", (1, 2)) is None
    assert (store.folder / store.file(saved)).exists()
    assert not (store.folder / f"{saved.name}.json").exists(), "a restart must not find it"
    assert not store.release(saved)
    assert store.release(saved)


def test_what_cannot_be_deleted_is_said(store: KvStore, caplog: pytest.LogCaptureFixture) -> None:
    saved = save(store, (1, 2))
    assert store.folder is not None
    (store.folder / f"{saved.name}.kv").unlink()
    (store.folder / f"{saved.name}.kv").mkdir()
    asyncio.run(store.clear())
    assert f"{saved.name}.kv cannot be deleted: Is a directory" in caplog.text


def test_a_disk_that_others_have_filled_keeps_none(store: KvStore, monkeypatch: pytest.MonkeyPatch) -> None:
    old, young = save(store, (1,), age_sec=100 * 3600), save(store, (2,))
    monkeypatch.setattr(store, "_room", lambda: -1)
    assert store.victims(0) == [old, young]
    assert store.victims(1) is None


def test_files_of_others_in_its_folder_are_left_alone(tmp_path: Path) -> None:
    names = {"config.json", "m.kv", "m.part", "distrusted.json", "x.json.part"}
    for name in names:
        (tmp_path / name).write_text("{}")
    own = {"0123456789abcdef01234567" + suffix for suffix in (".kv", ".json", ".part", ".json.part")}
    for name in own:
        (tmp_path / name).write_text("{}")
    KvStore.open(tmp_path, Settings()).close()
    assert {place.name for place in tmp_path.iterdir()} == names | {"key", "lock"}


def test_to_clear_all_gives_engines_another_chance(store: KvStore) -> None:
    assert store.folder is not None
    store.distrust("g", "it reused 0 of 100 tokens")
    store.rates("g").broken = 2
    asyncio.run(store.clear("m"))
    assert store.distrusted
    asyncio.run(store.clear())
    assert not store.distrusted
    assert store.rates("g").broken == 0
    assert not (store.folder / "distrusted.json").exists()
    asyncio.run(store.clear())  # without any
