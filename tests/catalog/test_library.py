"""Pulls and removals requested by clients; `store/test_pull.py` tests the pulls themselves."""

from __future__ import annotations

import asyncio

import pytest

from router.catalog.library import Library
from router.config.resolved import Config
from router.http.errors import ApiError
from router.store.creations import Creations
from router.store.downloads import Downloads
from router.system.state import State


def test_nothing_is_pulled_once_the_router_ends() -> None:
    async def look_again() -> None: ...

    async def story() -> None:
        downloads = Downloads(look_again)
        library = Library(Config, downloads, Creations(State(), look_again))
        await downloads.shut_down()
        with pytest.raises(ApiError, match="shutting down") as refused:
            library.pull("hf.co/org/model-GGUF")
        assert (refused.value.status, refused.value.code) == (503, "shutting_down")
        assert not downloads.pulls

    asyncio.run(story())
