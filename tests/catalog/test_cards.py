"""Cards of models whose disk takes its time. The disk is a path that waits before it tells anything."""

from __future__ import annotations

import _thread
import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import models

from router.catalog.cards import Cards
from router.catalog.load import load
from router.config.resolved import ModelConfig

Kept = Callable[..., list[ModelConfig]]


@pytest.fixture
def kept(tiny: Path, tmp_path: Path) -> Kept:
    """Models whose file tells nothing before `wait` has returned: `kept(wait, "a", "b")`."""

    def of(wait: Callable[[], object], *aliases: str) -> list[ModelConfig]:
        class Slow(type(tiny)):  # type: ignore[misc]
            def stat(self, **how: Any) -> Any:
                wait()
                return super().stat(**how)

        (tmp_path / "config.json").write_text(json.dumps({"models": models(tiny, *aliases)}))
        config = load(environ={}, cwd=tmp_path).config
        return [replace(model, model_path=Slow(tiny)) for model in config.models.values()]

    return of


def test_a_disk_that_has_to_spin_up_is_waited_for_by_who_asks_for_one_model_and_not_by_lists(kept: Kept) -> None:
    spun_up = threading.Event()

    async def story() -> None:
        cards, (model,) = Cards(look_sec=0.01, silent_sec=20), kept(spun_up.wait, "a")
        assert "size" not in (await cards.of([model]))["a"]
        asyncio.get_running_loop().call_later(0.1, spun_up.set)
        assert await cards.answers(model)
        assert "size" in (await Cards().of([model]))["a"]

    asyncio.run(story())


def test_a_disk_that_is_slow_with_many_models_does_not_hang(kept: Kept) -> None:
    async def story() -> None:
        many = kept(lambda: time.sleep(0.05), *map(str, range(20)))
        cards = Cards(look_sec=0.2, silent_sec=20)
        assert "size" not in (await cards.of(many))["19"]
        began = time.monotonic()
        assert await cards.answers(many[19])
        assert time.monotonic() - began < 10

    asyncio.run(story())


def test_a_disk_that_hangs_is_given_up(kept: Kept) -> None:
    back = threading.Event()

    async def story() -> None:
        cards, (model,) = Cards(look_sec=0.2, silent_sec=0.5), kept(back.wait, "a")
        threads = _thread._count()
        for _ in range(3):
            assert not await cards.answers(model)
        assert _thread._count() == threads + 1
        back.set()

    asyncio.run(story())


def test_a_file_is_read_once_for_all_lists_of_a_second_and_again_for_who_asks_whether_its_disk_responds(
    kept: Kept,
) -> None:
    reads: list[None] = []

    async def story() -> None:
        cards, (model, other) = Cards(), kept(lambda: reads.append(None), "a", "b")
        before = (await cards.of([model]))["a"]
        for_one = len(reads)
        before["meta"] = "what a list adds"
        card = (await cards.of([model]))["a"]
        assert card["size"] == before["size"]
        assert card["meta"] != before["meta"]
        assert len(reads) == for_one
        assert "size" in (await cards.of([model, other]))["b"]
        assert len(reads) == 2 * for_one
        assert await cards.answers(model)
        assert len(reads) == 3 * for_one
        await cards.of([other], within_sec=0)
        assert len(reads) == 4 * for_one

    asyncio.run(story())
