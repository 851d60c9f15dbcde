"""Containers in entries of the configuration. The kinds of engine that may run in containers share this."""

from __future__ import annotations

import os
from typing import TypeVar

from router.config.draft import Draft
from router.config.problems import KeyPath
from router.config.schema import Container

C = TypeVar("C", bound=Container)


def resolved_container(draft: Draft, path: KeyPath, container: C) -> C:
    """Return the container of an entry with absolute sources of its volumes. Notes problems in the draft."""
    if container.network in ("host", "none"):
        message = f"cannot be {container.network}: name a network, or leave it out for a port of 127.0.0.1"
        draft.problem((*path, "container", "network"), message)

    def resolved(volume: str) -> str:
        source, colon, rest = volume.partition(":")
        if source.startswith((".", "~")) or os.sep in source:  # else it is the name of a volume
            source = str(draft.resolve(source, draft.base_of((*path, "container", "volumes"))))
        return f"{source}{colon}{rest}"

    return container.model_copy(update={"volumes": tuple(map(resolved, container.volumes))})
