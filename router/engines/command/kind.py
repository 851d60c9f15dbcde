"""Any server by its command line, as a kind of engine."""

from __future__ import annotations

from router.engines.command.backend import Command
from router.engines.command.describe import described
from router.engines.command.entry import ENTRIES
from router.engines.documents import OF_LLAMA_SERVER
from router.engines.kind import Kind

COMMAND = Kind(
    backend=lambda system, launcher, learned: Command(launcher, learned),
    described=described,
    documents=OF_LLAMA_SERVER,  # many commands start one, or a server with its routes
    entries=ENTRIES,
)
