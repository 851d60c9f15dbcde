"""What a keeper saves of the slots of an engine, and what it restores; the engine is played."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from router.config.schema import KvStore as Settings
from router.kv import keeper as keeping
from router.kv import store as storing
from router.kv.chain import LONGEST
from router.kv.keeper import Keeper, Placement, Said, Source
from router.kv.store import KvStore
from router.observe.usage import Usage

TOKENS_PER_SEC = 100.0
TEXT = "".join(f"{number:04}" for number in range(2000))


class Engine:
    """Plays an engine: one token per byte of a prompt, and four bytes per token of a state."""

    def __init__(self, folder: Path, slots: int = 1) -> None:
        self.folder = folder
        self.slots = [""] * slots
        self.asked: list[str] = []
        self.reuses = True
        self.refusal: Said | None = None
        self.is_dead = False
        self.busy_sec = 0.0
        """Time that it computes for others before it saves or restores."""

    async def ask(self, slot: int, action: str, name: str) -> Said | None:
        self.asked.append(f"{action} {slot}")
        await asyncio.sleep(0)
        if self.is_dead:
            return None
        if self.refusal is not None:
            return self.refusal
        file = self.folder / name
        if action == "save":
            file.write_bytes(self.slots[slot].encode("utf-32-le"))
        else:
            self.slots[slot] = file.read_bytes().decode("utf-32-le") if self.reuses else ""
        await asyncio.sleep(self.busy_sec)
        return Said(len(self.slots[slot]), 4 * len(self.slots[slot]), 0.001)

    def answer(self, slot: int, prompt: str) -> Usage:
        held = self.slots[slot]
        cached = next(
            (at for at, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b),
            min(len(held), len(prompt)),
        )
        self.slots[slot] = f"{prompt}answer"
        computed = len(prompt) - cached
        return Usage(len(prompt), cached, 6, computed / TOKENS_PER_SEC)


class World:
    """A store and an engine with its keeper."""

    def __init__(self, folder: Path, slots: int = 1) -> None:
        self.store = KvStore.open(folder, Settings())
        self.slots = slots
        self.start()

    def start(self) -> None:
        """Start another engine, as after a swap."""
        assert self.store.folder is not None
        self.engine = Engine(self.store.folder, self.slots)
        self.keeper = Keeper(self.store, "group", "m", self.slots, self.engine.ask)

    async def begin(self, prompt: str, client: str = "", *, keeps: bool = True) -> Placement:
        placement = self.keeper.place(json.dumps({"prompt": prompt}).encode(), client, keeps=keeps, is_plain=True)
        assert placement is not None
        if not placement.is_ready:
            ready = asyncio.Event()
            placement.when_ready(ready.set)
            await ready.wait()
        return placement

    async def chat(self, prompt: str, client: str = "", *, keeps: bool = True) -> tuple[Source, int]:
        """Return the source of the beginning, and how many tokens were cached."""
        placement = await self.begin(prompt, client, keeps=keeps)
        usage = self.engine.answer(placement.slot, prompt)
        self.keeper.ended(placement, usage)
        await self.keeper._finishing.ended()  # computing takes longer on a real engine
        return placement.source, usage.cached_tokens

    async def swap(self) -> None:
        await self.keeper.flush(5)
        self.start()


Story = Callable[[World], Awaitable[None]]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_QUIET_SEC", 0.02)


def play(tmp_path: Path, story: Story, slots: int = 1) -> None:
    async def run() -> None:
        world = World(tmp_path / "kv", slots)
        try:
            await story(world)
        finally:
            world.keeper.end()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


def test_a_conversation_survives_a_swap(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        assert await world.chat(TEXT) == (Source.NONE, 0)
        await world.swap()
        assert await world.chat(TEXT + "more") == (Source.DISK, len(TEXT))
        assert world.store.of("m").restores == 1
        assert world.store.of("m").prefill_saved_sec == pytest.approx(len(TEXT) / TOKENS_PER_SEC)

    play(tmp_path, story)


def test_a_quiet_slot_is_saved_so_that_a_crash_loses_nothing(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        await until(lambda: len(world.store) == 1)
        world.keeper.end()  # killed
        world.start()
        assert await world.chat(TEXT + "x") == (Source.DISK, len(TEXT))

    play(tmp_path, story)


def test_a_conversation_is_saved_again_only_when_it_has_grown(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        await until(lambda: world.store.of("m").saves == 1)
        assert await world.chat(TEXT + "x") == (Source.SLOT, len(TEXT))
        await asyncio.sleep(0.1)
        assert world.store.of("m").saves == 1
        await world.chat(TEXT + "y" * 2000)
        await until(lambda: world.store.of("m").saves == 2)
        assert len(world.store) == 1

    play(tmp_path, story)


def test_two_conversations_share_one_slot(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        one, other = TEXT, TEXT[::-1]
        await world.chat(one)
        await world.chat(other)  # at once: the first is saved before it is displaced
        assert await world.chat(one + "x") == (Source.DISK, len(one))
        assert await world.chat(other + "x") == (Source.DISK, len(other))

    play(tmp_path, story)


def test_each_conversation_keeps_its_slot(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        one, other = TEXT, TEXT[::-1]
        await world.chat(one)
        await world.chat(other)
        for prompt in (one + "x", other + "x"):
            assert (await world.chat(prompt))[0] is Source.SLOT
        await world.swap()
        for prompt in (other + "xy", one + "xy"):
            source, cached = await world.chat(prompt)
            assert (source, cached >= len(TEXT)) == (Source.DISK, True)

    play(tmp_path, story, slots=2)


def test_running_requests_keep_their_slots(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        first, second = await world.begin(TEXT), await world.begin(TEXT)
        assert {first.slot, second.slot} == {0, 1}
        assert world.keeper.place(b'{"prompt": "x"}', "", keeps=True, is_plain=True) is None
        for placement in (first, second):
            world.keeper.ended(placement, world.engine.answer(placement.slot, TEXT))

    play(tmp_path, story, slots=2)


def test_many_conversations_go_through_two_slots(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        prompts = [f"{number:03}" * 1000 for number in range(20)]
        for turn in range(3):
            for prompt in prompts:
                source, cached = await world.chat(prompt + "x" * turn)
                assert turn == 0 or (source is not Source.NONE and cached >= 3000)

    play(tmp_path, story, slots=2)


def test_bodies_beyond_a_mebibyte_are_left_to_the_engine(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        assert LONGEST == 1 << 20
        for size, is_placed in ((LONGEST, True), (LONGEST + 1, False)):
            body = json.dumps({"prompt": ""}).encode().ljust(size)
            placement = world.keeper.place(body, "", keeps=True, is_plain=True)
            assert (placement is not None) == is_placed
            if placement is not None:
                world.keeper.ended(placement, Usage())

    play(tmp_path, story)


def test_short_prompts_are_not_saved(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat("x" * 500)
        await world.swap()
        assert world.engine.asked == []
        assert len(world.store) == 0

    play(tmp_path, story)


def asked(*texts: str) -> bytes:
    """Return the body of a chat with so many messages."""
    return json.dumps({"model": "m", "messages": [{"content": text} for text in texts], "stream": True}).encode()


def test_short_prompts_leave_alone_what_is_worth_something(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        for number in range(3):
            placement = world.keeper.place(asked(f"{number}"), "", keeps=True, is_plain=True)
            assert placement is not None
            assert (placement.slot, placement.is_ready, placement.source) == (1, True, Source.NONE)
            world.keeper.ended(placement, Usage(5, 0, 3))
        assert (await world.chat(TEXT + "x"))[0] is Source.SLOT

    play(tmp_path, story, slots=2)


def test_code_that_is_completed_beside_a_conversation_leaves_its_slot_alone(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        for number in range(3):
            body = json.dumps({"input_prefix": f"{number}{TEXT}", "input_suffix": "", "prompt": ""}).encode()
            placement = world.keeper.place(body, "", keeps=True, is_plain=True)
            assert placement is not None
            assert (placement.slot, placement.is_ready) == (1, True)
            world.keeper.ended(placement, Usage(8000, 0, 6, 80.0))
        assert (await world.chat(TEXT + "x"))[0] is Source.SLOT

    play(tmp_path, story, slots=2)


def test_short_conversations_go_on_in_their_slots(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        def turn(client: str, *texts: str, source: Source, tokens: int = 100) -> int:
            placement = world.keeper.place(asked(*texts), client, keeps=True, is_plain=True)
            assert placement is not None
            assert (placement.source, placement.is_ready) == (source, True)
            world.keeper.ended(placement, Usage(tokens, 0, 3))
            return placement.slot

        slots = [turn("", text, source=Source.NONE) for text in ("one", "other", "third")]
        assert sorted(slots) == [0, 1, 2], "those that were used last are taken last"
        for place, text in reversed(list(enumerate(("one", "other", "third")))):
            assert turn("", text, "fine", "go on", source=Source.SLOT) == slots[place]
        assert turn("", "one", "fine", "go on", TEXT, source=Source.SLOT, tokens=9000) == slots[0]
        assert turn("you", "other", "fine", "go on", source=Source.NONE) in slots[1:]

    play(tmp_path, story, slots=3)


def test_a_long_answer_to_a_short_question_is_kept(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        question = "x" * 300
        placement = await world.begin(question)
        world.engine.slots[0] = TEXT
        world.keeper.ended(placement, Usage(300, 0, len(TEXT) - 300, 3.0))
        await world.swap()
        assert len(world.store) == 1
        source, _ = await world.chat(question + TEXT[300:])
        assert source is Source.DISK

    play(tmp_path, story)


@pytest.mark.parametrize("tools", [0, 100])
@pytest.mark.parametrize("client", ["", "anna"])
def test_a_conversation_that_begins_with_a_short_question_goes_on_in_its_slot(
    tmp_path: Path, tools: int, client: str
) -> None:
    async def story(world: World) -> None:
        def place(*texts: str) -> Placement:
            body = json.loads(asked(*texts)) | {"tools": [{"function": {"name": f"{n}"}} for n in range(tools)]}
            placement = world.keeper.place(json.dumps(body).encode(), client, keeps=True, is_plain=True)
            assert placement is not None
            return placement

        first = place("tell me a story")
        world.keeper.ended(first, Usage(1000, 0, len(TEXT), 1.0))
        again = place("tell me a story", TEXT, "go on")
        assert (again.slot, again.source) == (first.slot, Source.SLOT)
        assert again.promised == 1000 + len(TEXT)

    play(tmp_path, story, slots=2)


def test_an_engine_that_computes_faster_than_anything_is_read_chooses_its_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        await world.chat(TEXT[::-1])
        rates = world.store.rates("group")
        rates.restore = rates.prefill * rates.token_bytes / 2
        for prompt in (TEXT + "x", "x" * 600):
            assert (
                world.keeper.place(json.dumps({"prompt": prompt}).encode(), "", keeps=True, is_plain=True) is None
            )
        monkeypatch.setattr(keeping, "_AGAIN_SEC", 0.0)
        world.keeper._rests_until_sec = 1.0  # a minute later
        rates.restore *= 4
        assert (await world.begin(TEXT + "x")).source is Source.DISK

    play(tmp_path, story)


def test_what_no_slot_can_have_held_came_from_the_cache_in_ram(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat("x" * 600)
        for cached, source in ((700, Source.RAM), (600, Source.NONE)):
            placement = await world.begin(TEXT, keeps=False)
            assert placement.source is Source.NONE
            assert world.keeper.ended(placement, Usage(8000, cached, 1, 70.0)) is source
            await world.chat("x" * 600)

    play(tmp_path, story)


def test_what_nobody_has_counted_is_not_said_to_come_from_ram(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        short = world.keeper.place(asked("hello"), "", keeps=True, is_plain=True)
        assert short is not None
        assert world.keeper.ended(short, Usage(20, 0, 5)) is Source.NONE
        other = world.keeper.place(asked("write an essay"), "", keeps=True, is_plain=True)
        assert other is not None
        assert world.keeper.ended(other, Usage(25, 12, 900)) is Source.NONE, "the template of the one before"

        stopped = await world.begin(TEXT)
        world.keeper.ended(stopped, Usage(output_tokens=10))
        goes_on = await world.begin(TEXT + "x")
        assert goes_on.source is Source.SLOT
        assert world.keeper.ended(goes_on, Usage(len(TEXT) + 1, len(TEXT), 1, 0.1)) is Source.SLOT

    play(tmp_path, story)


def test_what_is_computed_faster_than_saved_is_not_saved(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.store.rates("group").save = 10.0
        world.store.rates("group").token_bytes = 4.0
        await world.chat(TEXT)
        await world.swap()
        assert len(world.store) == 0

    play(tmp_path, story)


def test_what_an_engine_computes_for_others_first_is_no_cost_of_a_save(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.engine.busy_sec = 0.05
        await world.chat(TEXT)
        await world.swap()
        world.engine.busy_sec = 0.05
        await world.chat(TEXT + "x")
        rates = world.store.rates("group")
        assert rates.save == pytest.approx(4 * len(TEXT + "answer") / 0.001)
        assert rates.restore == rates.save

    play(tmp_path, story)


def test_one_slow_save_does_not_end_the_saving_of_what_is_displaced(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        real = world.engine.ask
        took = iter([0.01, 10.0, 0.01, 0.01])

        async def timed(slot: int, action: str, name: str) -> Said | None:
            said = await real(slot, action, name)
            assert said is not None
            return Said(said.tokens, said.nbytes, next(took))

        world.keeper._ask = timed
        for number in range(5):
            await world.chat(f"{number}{TEXT}")  # each displaces the one before
        assert world.store.of("m").saves == 4

    play(tmp_path, story)


def test_a_disk_that_was_slow_once_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        rates = world.store.rates("group")
        await world.chat(TEXT)
        await world.swap()
        rates.save = 100.0  # bytes per second: another program wrote gigabytes
        await world.chat(TEXT[::-1])
        await world.swap()
        assert len(world.store) == 1
        rates.restore = 100.0
        assert world.keeper.place(asked(TEXT), "", keeps=True, is_plain=True) is None
        monkeypatch.setattr(storing, "_LAPSE_SEC", 0.0)
        world.keeper._rests_until_sec = 1.0  # a minute later
        await world.chat(TEXT[::-1])
        await world.swap()
        assert len(world.store) == 2
        assert (await world.chat(TEXT + "x"))[0] is Source.DISK

    play(tmp_path, story)


def test_a_client_may_forbid_it(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT, keeps=False)
        await world.swap()
        assert len(world.store) == 0
        await world.chat(TEXT)
        await world.swap()
        assert len(world.store) == 1
        assert await world.chat(TEXT + "x", keeps=False) == (Source.DISK, len(TEXT))
        assert len(world.store) == 0
        folder = world.store.folder
        assert folder is not None
        await until(lambda: not list(folder.glob("*.kv")))

    play(tmp_path, story)


def test_what_was_asked_before_a_clear_is_not_saved_after_it(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        await until(lambda: len(world.store) == 1)
        asking = await world.begin(TEXT + "x")
        assert len(await world.store.clear("m")) == 1
        world.keeper.ended(asking, world.engine.answer(asking.slot, TEXT + "x" * 2000))
        await world.swap()
        assert len(world.store) == 0
        await world.chat(TEXT)
        await world.swap()
        assert await world.chat(TEXT + "x") == (Source.DISK, len(TEXT))

    play(tmp_path, story)


def test_a_conversation_that_goes_on_after_a_clear_is_saved_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        await until(lambda: len(world.store) == 1)
        await world.store.clear()
        assert await world.chat(TEXT + "x") == (Source.SLOT, len(TEXT))
        await until(lambda: len(world.store) == 1)

    play(tmp_path, story)


def test_what_is_cleared_while_it_is_saved_or_restored_leaves_no_file(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        folder = world.store.folder
        assert folder is not None
        await world.chat(TEXT)
        cleared = 0

        async def meddled(slot: int, action: str, name: str) -> Said | None:
            nonlocal cleared
            said = await world.engine.ask(slot, action, name)
            cleared += len(await world.store.clear())
            return said

        world.keeper._ask = meddled
        await world.swap()
        assert not list(folder.glob("*.kv"))
        await world.chat(TEXT)
        await world.swap()
        world.keeper._ask = meddled
        assert await world.chat(TEXT + "x") == (Source.DISK, len(TEXT))
        assert cleared == 1
        await until(lambda: not list(folder.glob("*.kv")))

    play(tmp_path, story)


def test_clients_with_keys_do_not_share(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.store.is_shared = lambda: False
        await world.chat(TEXT, "me")
        await world.swap()
        assert (await world.chat(TEXT + "x", "you"))[0] is Source.NONE
        assert (await world.chat(TEXT + "x", "me"))[0] is Source.DISK

    play(tmp_path, story)


def test_an_engine_that_forgets_what_it_restored_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        await world.chat(TEXT[::-1])
        await world.swap()
        world.engine.reuses = False
        real = world.engine.ask

        async def lying(slot: int, action: str, name: str) -> Said | None:
            said = await real(slot, action, name)
            return Said(len(TEXT), 4 * len(TEXT)) if said is not None and action == "restore" else said

        world.keeper._ask = lying
        assert await world.chat(TEXT + "x") == (Source.DISK, 0)
        assert await world.chat(TEXT[::-1] + "x") == (Source.DISK, 0)
        assert world.keeper.place(b'{"prompt": "x"}', "", keeps=True, is_plain=True) is None
        assert len(world.store) == 0
        assert "it reused 0 of 8000 tokens that it said it had restored" in caplog.text

    play(tmp_path, story)


def test_a_beginning_of_fewer_tokens_per_byte_is_no_broken_promise(tmp_path: Path) -> None:
    """Four bytes of English are a token, while each digit is one."""

    async def story(world: World) -> None:
        words = "All that follows was measured. " * 20
        for turn in range(4):
            prompt = words + f"{turn}" * 4000
            placement = await world.begin(prompt)
            assert placement.source is (Source.DISK if turn else Source.NONE)
            world.engine.answer(placement.slot, prompt)
            cached = len(words) // 4 if turn else 0
            world.keeper.ended(placement, Usage(cached + 4000, cached, 6, 40.0))
            await world.swap()
        assert world.store.distrusted == {}
        assert world.store.of("m").restores == 3

    play(tmp_path, story)


def test_an_engine_that_forgets_after_every_swap_is_left_alone(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        for _ in range(2):
            assert "group" not in world.store.distrusted
            await world.swap()
            real = world.engine.ask

            async def lying(slot: int, action: str, name: str) -> Said | None:
                said = await real(slot, action, name)  # noqa: B023
                world.engine.slots[slot] = ""
                return said

            world.keeper._ask = lying
            assert await world.chat(TEXT + "x") == (Source.DISK, 0)
        assert "group" in world.store.distrusted
        await world.swap()
        assert len(world.store) == 0  # nor is anything saved that is in its slots
        await until(lambda: not list((tmp_path / "kv").glob("*.kv")))

    play(tmp_path, story)


def test_an_engine_that_keeps_most_of_its_promises_is_trusted(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        for is_kept in (True, True, False, False, True):
            await world.swap()
            placement = await world.begin(TEXT + "x")
            assert placement.source is Source.DISK
            usage = world.engine.answer(placement.slot, TEXT + "x")
            world.keeper.ended(placement, usage if is_kept else Usage(usage.prompt_tokens, 0, 6, 80.0))

    play(tmp_path, story)


def test_a_hanging_disk_holds_up_one_request_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keeping, "_PATIENCE_SEC", -80.0 + 0.1)  # besides the time of computing what is restored
    answers = threading.Event()

    async def story(world: World) -> None:
        await world.chat(TEXT)
        await world.swap()
        monkeypatch.setattr(world.store, "is_whole", lambda saved: answers.wait(10))
        assert await world.chat(TEXT + "x") == (Source.NONE, 0)
        assert "does not answer; conversations are not restored for 60 s" in caplog.text
        assert world.keeper.place(json.dumps({"prompt": TEXT}).encode(), "", keeps=True, is_plain=True) is None

    try:
        play(tmp_path, story)
    finally:
        answers.set()


def test_a_request_goes_on_if_its_engine_ends_before_its_state_is_restored(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        await world.swap()
        placement = world.keeper.place(json.dumps({"prompt": TEXT + "x"}).encode(), "", keeps=True, is_plain=True)
        assert placement is not None
        ready = asyncio.Event()
        placement.when_ready(ready.set)
        world.keeper.end()  # before the event loop has come to anything else
        await asyncio.wait_for(ready.wait(), 5)
        world.start()
        assert await world.chat(TEXT + "x") == (Source.DISK, len(TEXT))
        await world.store.clear()
        assert list((tmp_path / "kv").glob("*.kv")) == []  # nothing is in use

    play(tmp_path, story)


def test_what_is_switched_off_saves_no_more_and_forgets_what_the_slots_held(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        world.store.settings = Settings(enabled=False)
        await asyncio.sleep(0.05)
        assert (
            world.keeper.place(json.dumps({"prompt": TEXT[::-1]}).encode(), "", keeps=True, is_plain=True) is None
        )
        world.engine.answer(0, TEXT[::-1])
        world.store.settings = Settings()
        assert (await world.begin(TEXT + "x")).source is Source.NONE
        await world.swap()
        assert len(world.store) == 0

    play(tmp_path, story)


def test_a_damaged_file_is_deleted_and_costs_nobody_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        await world.swap()
        folder = world.store.folder
        assert folder is not None
        (state,) = folder.glob("*.kv")
        state.write_bytes(b"x" * state.stat().st_size)
        assert await world.chat(TEXT + "x") == (Source.NONE, 0)
        assert world.engine.asked == []
        await until(lambda: not state.exists())
        assert "a saved conversation is deleted: its file is damaged" in caplog.text

    play(tmp_path, story)


def test_what_does_not_fit_an_engine_is_left_to_another(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        for left in (1, 0):
            await world.swap()
            world.engine.refusal = Said(refusal="No available space")  # -c is smaller now
            for _ in range(3):
                placement = await world.begin(TEXT + "x")
                assert placement.source is Source.NONE
                world.keeper.ended(placement, Usage())
            assert world.engine.asked == ["restore 0"], "it is not tried again"
            assert len(world.store) == left
        await world.swap()
        world.engine.refusal = None
        await world.chat(TEXT)
        await world.swap()
        assert (await world.chat(TEXT + "x"))[0] is Source.DISK

    play(tmp_path, story)


def test_a_file_with_which_one_engine_ended_gets_a_second_chance(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        for left in (1, 0):
            await world.swap()
            world.engine.is_dead = True
            placement = await world.begin(TEXT + "x")
            assert placement.source is Source.NONE
            world.keeper.ended(placement, Usage())
            assert len(world.store) == left

    play(tmp_path, story)


def test_a_full_disk_is_told_once_a_minute_and_leaves_no_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(world: World) -> None:
        world.engine.refusal = Said(refusal="No space left on device")
        await world.chat(TEXT)
        await until(lambda: world.store.of("m").failures == 1)
        await world.chat(TEXT[::-1])
        await asyncio.sleep(0.1)
        assert caplog.text.count("could not be saved: No space left on device") == 1
        assert len(world.store) == 0
        pauses = []
        for _ in range(2):
            world.keeper._next_save_sec = 0.0  # later
            failures = world.store.of("m").failures
            world.keeper._save_quiet()
            await until(lambda: world.store.of("m").failures > failures)  # noqa: B023
            pauses.append(round(world.keeper._next_save_sec - time.monotonic()))
        assert pauses == [120, 240]

    play(tmp_path, story)


def test_what_is_larger_than_allowed_is_not_saved(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.store.settings = Settings(max_gb=20_000 / 1e9)
        await world.chat(TEXT)  # its size is not known before
        await world.swap()
        assert len(world.store) == 0
        await world.chat(TEXT)
        await asyncio.sleep(0.1)
        await world.swap()
        assert world.engine.asked == []
        assert world.store.of("m").failures == 0
        world.store.settings = Settings()
        await world.chat(TEXT)
        await world.swap()
        assert len(world.store) == 1

    play(tmp_path, story)


def test_an_engine_that_cannot_save_is_not_asked_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.engine.refusal = Said(refusal="This feature is not supported by multimodal", is_final=True)
        await world.chat(TEXT)
        await until(lambda: "group" in world.store.distrusted)
        assert world.keeper.place(b'{"prompt": "x"}', "", keeps=True, is_plain=True) is None

    play(tmp_path, story)


def test_a_client_that_leaves_while_its_state_is_restored_frees_the_slot(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        await world.swap()
        placement = world.keeper.place(json.dumps({"prompt": TEXT + "x"}).encode(), "", keeps=True, is_plain=True)
        assert placement is not None
        assert not placement.is_ready
        placement.when_ready(lambda: pytest.fail("nobody waits any more"))
        world.keeper.ended(placement, Usage())
        assert await world.chat(TEXT + "x") == (Source.DISK, len(TEXT))

    play(tmp_path, story)


def test_a_client_that_leaves_while_another_conversation_is_saved_loses_none(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.chat(TEXT)
        placement = world.keeper.place(json.dumps({"prompt": TEXT[::-1]}).encode(), "", keeps=True, is_plain=True)
        assert placement is not None
        assert not placement.is_ready
        world.keeper.ended(placement, Usage())
        await world.swap()
        assert [len(saved.chain) > 0 for saved in world.store] == [True]
        assert await world.chat(TEXT + "x") == (Source.DISK, len(TEXT))

    play(tmp_path, story)


def test_an_aborted_answer_is_kept_and_an_unsent_request_is_not(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        placement = await world.begin(TEXT)
        world.engine.answer(placement.slot, TEXT)
        world.keeper.ended(placement, Usage(output_tokens=3))
        await world.swap()
        assert await world.chat(TEXT + "x") == (Source.DISK, len(TEXT))
        placement = await world.begin(TEXT[::-1])
        world.keeper.ended(placement, Usage())
        await world.swap()
        assert (await world.chat(TEXT[::-1]))[0] is Source.NONE

    play(tmp_path, story)
