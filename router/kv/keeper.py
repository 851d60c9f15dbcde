"""The slots of one engine: what each holds of which conversation, and what is saved of it and restored into it.

Every request is given a slot before it is sent: the one that has most of its beginning, or one into which it is
restored from disk if that is cheaper than computing it again, or else the one that is missed least. What a slot
has computed is saved when it has been quiet for a moment, before something else is computed in it, and before the
engine ends. All costs are measured: the engine's time per token of a prompt, and bytes per second of both ways.

Most requests are short, and nothing is lost with them. While there is a slot for one that holds nothing else, it
gets that, and is read only if its answer turns out to be long.

What an engine says of a restore is no proof. The answer to the next request is: it counts the cached tokens. An
engine that twice reuses less than half of what it was given, and more often than not, is left alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Container, Coroutine, Sequence
from typing import Any, NamedTuple

import anyio
import msgspec

from router.kv.chain import LONGEST, SHORTEST, Chain, chain_of, common, covered, opening_of
from router.kv.store import KvStore, Saved
from router.observe.usage import Usage
from router.system.readings import apart
from router.system.tasks import Tasks
from router.system.words import Word

_log = logging.getLogger("router")

_QUIET_SEC = 1.0
"""Time without a request after which a slot is saved."""
_GROWTH = 1.05
"""Growth of a conversation from which on it is saved again before its engine ends."""
_LITTLE = 16
"""Number of tokens that are not worth saving a conversation again."""
_SHARE = 20
"""While other slots compute, saves take at most one part in so many of the time."""
_URGENT = 20
"""A request waits for the save of what it displaces if that is so many times cheaper than computing it again."""
_AGAIN_SEC = 60.0
_LONGEST_PAUSE_SEC = 3600.0
"""Pauses after a save that failed: the disk may be full. Each failure in a row doubles it."""
_PATIENCE_SEC = 10.0
"""Time that a request waits for its slot at most, besides that of computing what is restored: a disk may hang."""
_BYTES_OF_TOKEN = 4
_MEASURABLE = 64
"""Number of computed tokens from which on their time is a measurement."""
_MOST_FAILURES = 2
_DENSITY = 8
"""Most tokens per byte of one part of a prompt to those of another: numbers have four times as many as English."""


class Source(Word):
    """Where the beginning of a prompt came from."""

    SLOT = "slot"
    RAM = "ram"
    """The engine's own cache of prompts; only known at the end, and only if a slot could not have held as much."""
    DISK = "disk"
    NONE = "none"


_SLOT, _NONE = Source.SLOT, Source.NONE
"""Bound once, as looking up a member of an enumeration is slow."""


class Said(NamedTuple):
    """Response of an engine that was asked to save or to restore a slot."""

    tokens: int = 0
    nbytes: int = 0
    sec: float = 0.0
    """Time that the engine took, without that in which it computed for others first; 0: it does not say."""
    refusal: str = ""
    is_final: bool = False
    """True if the engine cannot do it at all."""


Ask = Callable[[int, str, str], Awaitable[Said | None]]
"""Asks an engine to `save` or `restore` a slot, by its number, to or from a file; None: it does not answer."""


class _Slot:
    """What is known of a slot."""

    __slots__ = (
        "begin",
        "chain",
        "client",
        "era",
        "is_busy",
        "is_counted",
        "keeps",
        "number",
        "opening",
        "prompt_tokens",
        "saved_tokens",
        "tokens",
        "used_sec",
        "work",
    )

    def __init__(self, number: int, *, is_named: bool) -> None:
        self.number = number
        self.begin = b'{"id_slot":%d,' % number if is_named else b""
        self.work: asyncio.Task[None] | None = None
        """Save or restore in progress."""
        self.is_busy = False
        self.used_sec = 0.0
        self.clear()

    def clear(self) -> None:
        self.chain: Chain = ()
        self.opening = b""
        """Without a chain: the body of its last request up to the end of the messages."""
        self.client = ""
        self.keeps = False
        self.era = 0
        """Era of the store in which the last request was placed."""
        self.tokens = self.prompt_tokens = self.saved_tokens = 0
        self.is_counted = True
        """False if `tokens` is a guess: an answer that was broken off does not tell them."""


class Placement(msgspec.Struct, eq=False):
    """The slot of one request, until `Keeper.ended` is called."""

    keeper: Keeper
    holder: _Slot
    body: bytes
    """That of the request."""
    client: str
    """Whose conversation it is; of a short request, the client itself."""
    keeps: bool
    era: int
    """That of the store in which it was placed."""
    chain: Chain | None
    """None: it is short."""
    source: Source = Source.NONE
    promised: int = 0
    """Number of tokens of its prompt that the slot is expected to have."""
    held: int = -1
    """Number of tokens that were in the slot before, if nothing is restored; -1: nobody knows."""
    least: int = 0
    """Number of tokens of its prompt that must be there after a restore, else it was none."""
    is_ready: bool = True
    """False while its state is being restored, or another is being saved to make room."""
    _listener: Callable[[], None] | None = None

    @property
    def slot(self) -> int:
        """Number of the slot."""
        return self.holder.number

    def told(self) -> bytes:
        """Return the body that names the slot, if the engine has several."""
        begin, body = self.holder.begin, self.body
        return begin + body[body.index(b"{") + 1 :] if begin else body

    def when_ready(self, listener: Callable[[], None]) -> None:
        self._listener = listener

    def get_ready(self) -> None:
        self.is_ready = True
        listener, self._listener = self._listener, None
        if listener is not None:
            listener()

    def is_over(self) -> bool:
        """Forget who waits for it. Returns whether it was ready, so that the request was sent."""
        self._listener = None
        return self.is_ready


class _Written(NamedTuple):
    """A state that an engine has written."""

    saved: Saved
    era: int
    """That of the store in which its conversation was placed."""


class Keeper:
    """Decides about the slots of one engine. `group` is what its states are only good for."""

    def __init__(self, store: KvStore, group: str, model: str, slots: int, ask: Ask) -> None:
        self._store = store
        self._group = group
        self._model = model
        self._ask = ask
        self._slots = [_Slot(number, is_named=slots > 1) for number in range(slots)]
        self._tasks = Tasks()
        """Tasks that are given up when the engine ends."""
        self._finishing = Tasks()
        """Tasks that are finished even if the engine ends."""
        self._timer: asyncio.TimerHandle | None = None
        self._next_save_sec = 0.0
        self._pause_sec = _AGAIN_SEC
        self._too_long = math.inf
        """Least number of tokens of a state that the engine has refused: its context is too small, as it seems."""
        self._rests_until_sec = 0.0
        """Time until which the engine chooses its slots itself: the disk has not answered, or nothing would be
        gained; 0: it does not."""
        self._is_ending = False
        self._rates = store.rates(group)

    @property
    def group(self) -> str:
        return self._group

    @property
    def era(self) -> int:
        return self._store.eras[self._model]

    @property
    def _is_on(self) -> bool:
        return self._store.settings.enabled and self._group not in self._store.distrusted

    # --- requests -------------------------------------------------------------------------------------------

    def place(self, body: bytes | None, client: str, *, keeps: bool, is_plain: bool) -> Placement | None:
        """Choose the slot of a request; `body` is what the engine gets, None: too long, or no JSON. If `is_plain`,
        it says nothing about slots.

        None: the engine chooses. The placement may have to wait until it is ready.
        """
        if body is None:
            self._forget_slots()
            return None
        size, store = len(body), self._store
        settings = store.settings
        if (
            is_plain
            and (size <= SHORTEST or size <= settings.min_tokens)
            and not self._rests_until_sec
            and settings.enabled
            and self._group not in store.distrusted
        ):
            free, source, promised = None, _NONE, 0
            for slot in self._slots:
                if slot.is_busy or slot.chain or slot.work is not None:
                    continue
                if slot.opening and body.startswith(slot.opening) and slot.client == client:
                    free, source, promised = slot, _SLOT, slot.tokens
                    break
                if free is None or slot.used_sec < free.used_sec:
                    free = slot
            if free is not None:
                free.is_busy = True
                return Placement(self, free, body, client, keeps, store.eras[self._model], None, source, promised)
        return self._place(body, client, keeps=keeps)

    def _place(self, body: bytes, client: str, *, keeps: bool) -> Placement | None:
        """Choose the slot of a request whose beginning may be known, or for which another has to go."""
        if len(body) > LONGEST or not self._chooses():
            self._forget_slots()
            return None
        store, rates = self._store, self._rates
        rates.lapse()
        if rates.prefill * rates.token_bytes > rates.restore:  # to compute anything is faster than to read it
            self._rests_until_sec = time.monotonic() + _AGAIN_SEC
            self._forget_slots()
            return None
        chain = chain_of(body, store.key)
        free = [slot for slot in self._slots if not slot.is_busy]
        if chain is None or not free:
            self._forget_slots()
            return None
        owner = store.owner(client)
        slot, blocks = self._nearest(free, chain, owner)
        in_slot = slot.prompt_tokens * covered(blocks) // max(1, covered(len(slot.chain)))
        if not blocks and (began := self._begun(free, body, {client, owner})) is not None:
            slot, in_slot = began, began.tokens
        found = store.find(self._group, owner, chain)
        wanted, source, promised, least = None, _SLOT if in_slot else _NONE, in_slot, 0
        if (
            found is not None
            and found.saved.tokens < self._too_long
            and self._pays(found.saved, found.saved.promised(found.blocks) - in_slot)
        ):
            wanted, source, promised = found.saved, Source.DISK, found.saved.promised(found.blocks)
            least = promised // (2 if found.blocks == len(found.saved.chain) else 2 * _DENSITY)
            if blocks < len(slot.chain):
                slot = self._least_missed(free)
        held = slot.tokens if slot.chain and slot.is_counted and wanted is None else -1
        placement = Placement(self, slot, body, owner, keeps, self.era, chain, source, promised, held, least)
        slot.is_busy = True
        self._get_ready(placement, slot, chain, wanted)
        return placement

    def _chooses(self) -> bool:
        """Whether the router chooses slots now."""
        if self._rests_until_sec:
            if time.monotonic() < self._rests_until_sec:
                return False
            self._rests_until_sec = 0.0
        return self._is_on

    def _forget_slots(self) -> None:
        """Forget what is in the slots of which nobody knows which one a request displaces."""
        if not self._is_ending:
            for slot in self._slots:
                if not slot.is_busy:
                    slot.clear()

    def _get_ready(self, placement: Placement, slot: _Slot, chain: Chain, wanted: Saved | None) -> None:
        """Save what is displaced, if it is worth waiting for, and restore what is `wanted`."""
        saves = common(slot.chain, chain) < len(slot.chain) and self._is_urgent(slot)
        if wanted is not None or saves or slot.work is not None:
            placement.is_ready = False
            if wanted is not None:
                self._store.use(wanted)
            work = self._occupy(slot, self._prepare(placement, slot, slot.work, wanted, saves=saves), "restore")
            work.add_done_callback(lambda _: self._prepared(placement, wanted))
        elif placement.source is Source.NONE:
            slot.clear()

    def _nearest(self, free: list[_Slot], chain: Chain, owner: str) -> tuple[_Slot, int]:
        """Return the slot to use without a restore, and the number of blocks that it has of a request."""
        if len(free) == 1:
            (slot,) = free
            return slot, common(slot.chain, chain) if slot.client == owner else 0
        best, most = free[0], 0
        for slot in free:
            if slot.chain and slot.client == owner and (blocks := common(slot.chain, chain)) > most:
                best, most = slot, blocks
        if most and (2 * most >= len(best.chain) or not self._is_worth_saving(best, at_least=_LITTLE)):
            return best, most
        least = self._least_missed(free)
        return least, common(least.chain, chain) if least.client == owner else 0

    def _begun(self, free: list[_Slot], body: bytes, clients: Container[str]) -> _Slot | None:
        """Return the slot with a request without a chain that a request goes on with."""
        for slot in free:
            if slot.opening and body.startswith(slot.opening) and slot.client in clients:
                return slot
        return None

    def _least_missed(self, free: list[_Slot]) -> _Slot:
        def missed(slot: _Slot) -> tuple[bool, bool, float]:
            return slot.chain != (), self._is_worth_saving(slot, at_least=_LITTLE), slot.used_sec

        return min(free, key=missed)

    def _pays(self, saved: Saved, gained: int) -> bool:
        """Whether to restore a state costs less than to compute the tokens that it has more than the slot."""
        return gained > _LITTLE and gained / self._rates.tokens_per_sec > saved.nbytes / self._rates.restore

    async def _prepare(
        self,
        placement: Placement,
        slot: _Slot,
        before: asyncio.Task[None] | None,
        wanted: Saved | None,
        *,
        saves: bool,
    ) -> None:
        """Save what is in a slot and restore what is `wanted`, after the work that was begun `before`."""
        try:
            with anyio.fail_after(_PATIENCE_SEC + placement.promised / self._rates.tokens_per_sec):
                if before is not None:
                    await asyncio.wait({before})
                if saves and slot.chain and (written := await self._write(slot)) is not None:
                    self._finishing.begin(self._keep(written, slot), f"save of a slot of {self._model}")
                if wanted is not None:
                    slot.clear()
                    if await self._restore(slot, wanted):
                        slot.chain, slot.client, slot.keeps = wanted.chain, wanted.client, True
                        slot.era = placement.era
                        slot.tokens = slot.saved_tokens = wanted.tokens
                        slot.prompt_tokens = wanted.prompt_tokens
                    else:
                        placement.source, placement.promised = Source.NONE, 0
                elif placement.source is Source.NONE:
                    slot.clear()
        except TimeoutError:
            self._rest(slot, before)
            placement.source, placement.promised = Source.NONE, 0

    def _prepared(self, placement: Placement, wanted: Saved | None) -> None:
        """Let a request go on, whatever became of its slot: work may be given up before it begins."""
        if wanted is not None and self._store.release(wanted):
            self._delete([wanted])
        placement.get_ready()

    def _rest(self, slot: _Slot, before: asyncio.Task[None] | None) -> None:
        """Leave slots to the engine for a while, as nobody knows when the disk will answer."""
        if before is not None:
            before.cancel()
        slot.clear()
        self._next_save_sec = time.monotonic() + _AGAIN_SEC
        self._rests_until_sec = max(self._rests_until_sec, self._next_save_sec)
        _log.warning(
            "model %s: %s does not answer; conversations are not restored for %.0f s",
            self._model,
            self._store.folder,
            _AGAIN_SEC,
        )

    def ended(self, placement: Placement, usage: Usage) -> Source:
        """Note the end of a request, by the engine's figures: what its slot holds, what was measured, whether a
        promise was kept. If it was not sent yet, they do not matter. Returns where its beginning came from."""
        slot, chain = placement.holder, placement.chain
        slot.is_busy = False
        tokens = usage.prompt_tokens + usage.output_tokens
        if chain is None and tokens < _MEASURABLE and placement.keeps:  # nothing is lost with it
            slot.opening = b""
            return placement.source
        slot.used_sec = time.monotonic()
        if chain is None:
            body = placement.body
            if tokens < self._store.settings.min_tokens and placement.keeps:
                slot.opening = opening_of(body)
                slot.client, slot.tokens = placement.client, tokens
                return placement.source
            chain = chain_of(body, self._store.key) or ()
            placement.client = self._store.owner(placement.client)
        if placement.is_over():
            self._note(placement, slot, chain, usage)
        return Source.RAM if 0 <= placement.held < usage.cached_tokens else placement.source

    def _note(self, placement: Placement, slot: _Slot, chain: Chain, usage: Usage) -> None:
        """Note what a request has left in its slot."""
        if not usage.prompt_tokens and not usage.output_tokens:  # nobody knows what was computed, if anything
            slot.clear()
            return
        self._measure(usage)
        if placement.source is Source.DISK:
            self._verify(placement, usage)
        if not slot.chain or common(slot.chain, chain) < len(slot.chain):
            slot.saved_tokens = 0  # it no longer continues what is saved
        if slot.era != placement.era:
            slot.saved_tokens = 0  # it was deleted
        prompt = usage.prompt_tokens or covered(len(chain)) // _BYTES_OF_TOKEN
        slot.chain, slot.client, slot.keeps = chain, placement.client, placement.keeps
        slot.opening = b"" if chain else opening_of(placement.body)
        slot.era = placement.era
        slot.prompt_tokens, slot.tokens = prompt, prompt + usage.output_tokens
        slot.is_counted = usage.prompt_tokens > 0
        if not placement.keeps:
            self._forget(placement, chain)
        elif chain and not self._is_ending:
            self._save_later(_QUIET_SEC)

    def _measure(self, usage: Usage) -> None:
        computed = usage.prompt_tokens - usage.cached_tokens
        if computed >= _MEASURABLE and usage.prefill_sec > 0:
            self._rates.note_prefill(computed / usage.prefill_sec)

    def _verify(self, placement: Placement, usage: Usage) -> None:
        if not usage.prompt_tokens:  # its client has left
            return
        totals, rates = self._store.of(self._model), self._rates
        if usage.cached_tokens >= placement.least:
            rates.kept += 1
            totals.restores += 1
            totals.restored_tokens += usage.cached_tokens
            totals.prefill_saved_sec += usage.cached_tokens / rates.tokens_per_sec
            return
        totals.failures += 1
        rates.broken += 1
        if rates.broken >= _MOST_FAILURES and rates.broken > rates.kept:
            self._give_up(
                f"it reused {usage.cached_tokens} of {placement.promised} tokens that it said it had restored"
            )

    def _give_up(self, reason: str) -> None:
        self._store.distrusted[self._group] = reason
        _log.warning("model %s: conversations are no longer saved with this engine: %s", self._model, reason)
        gone = [saved for saved in self._store if saved.group == self._group]
        self._delete(gone)
        noted = apart(lambda: self._store.distrust(self._group, reason))
        self._finishing.begin(noted, f"note on the engine of {self._model}")

    def _forget(self, placement: Placement, chain: Chain) -> None:
        """Delete what is saved of a conversation, because its client wants nothing of it stored."""
        gone = [
            saved
            for saved in self._store
            if saved.group == self._group
            and saved.client == placement.client
            and common(saved.chain, chain) == len(saved.chain)
        ]
        self._delete(gone)

    def _delete(self, gone: Sequence[Saved]) -> None:
        """Delete conversations, which nobody finds from now on, whatever ends meanwhile."""
        self._store.forget(*gone)
        if gone:
            self._finishing.begin(self._store.drop(gone), f"deletion of conversations of {self._model}")

    # --- saving ---------------------------------------------------------------------------------------------

    async def flush(self, limit_sec: float) -> None:
        """Save everything worth it before the engine ends; no more is saved afterwards."""
        self._is_ending, self._rests_until_sec = True, math.inf
        deadline = time.monotonic() + limit_sec
        for slot in sorted(self._slots, key=lambda slot: -slot.tokens):
            if slot.work is not None:
                await asyncio.wait({slot.work}, timeout=max(0.0, deadline - time.monotonic()))
            left = deadline - time.monotonic()
            if left > 0 and not slot.is_busy and self._is_worth_saving(slot, at_least=_LITTLE):
                await asyncio.wait({self._begin_saving(slot)}, timeout=left)
        with anyio.move_on_after(max(0.0, deadline - time.monotonic())):
            await self._finishing.ended()
        self.end()

    def end(self) -> None:
        """Give up everything that has been begun: the engine has ended, or is about to."""
        self._is_ending, self._rests_until_sec = True, math.inf
        if self._timer is not None:
            self._timer.cancel()
        self._tasks.cancel()

    def _is_worth_saving(self, slot: _Slot, *, at_least: float) -> bool:
        """Whether to compute a slot's tokens again costs more than to save and restore them, and `at_least` so
        many are not saved yet."""
        if (
            not self._is_on
            or not slot.keeps
            or slot.era != self.era
            or not slot.chain
            or slot.tokens < max(1, self._store.settings.min_tokens)
        ):
            return False
        if slot.tokens - slot.saved_tokens < at_least:
            return False
        nbytes = slot.tokens * self._rates.token_bytes
        if nbytes > self._store.settings.max_gb * 1e9:
            return False
        return slot.tokens / self._rates.tokens_per_sec > nbytes / self._rates.save + nbytes / self._rates.restore

    def _is_urgent(self, slot: _Slot) -> bool:
        if not self._is_worth_saving(slot, at_least=_LITTLE) or time.monotonic() < self._next_save_sec:
            return False
        lost = (slot.tokens - slot.saved_tokens) / self._rates.tokens_per_sec
        return lost > _URGENT * slot.tokens * self._rates.token_bytes / self._rates.save

    def _save_later(self, delay_sec: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(delay_sec, self._save_quiet)

    def _save_quiet(self) -> None:
        """Save the slot that has been quiet for longest, and come again if there are more."""
        self._timer = None
        if self._is_ending:
            return
        now = time.monotonic()
        waiting = [
            slot
            for slot in self._slots
            if not slot.is_busy
            and slot.work is None
            and self._is_worth_saving(slot, at_least=max(_LITTLE, slot.saved_tokens * (_GROWTH - 1)))
        ]
        if not waiting:
            return
        slot = min(waiting, key=lambda slot: slot.used_sec)
        wait_sec = max(slot.used_sec + _QUIET_SEC, self._next_save_sec) - now
        if wait_sec <= 0:
            self._begin_saving(slot)
            wait_sec = _QUIET_SEC
        self._save_later(max(0.05, wait_sec))

    def _begin_saving(self, slot: _Slot) -> asyncio.Task[None]:
        return self._occupy(slot, self._save(slot), "save")

    def _occupy(self, slot: _Slot, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = self._tasks.begin(work, f"{name} of a slot of {self._model}")
        slot.work = task

        def end(_: asyncio.Task[None]) -> None:
            if slot.work is task:
                slot.work = None

        task.add_done_callback(end)
        return task

    async def _save(self, slot: _Slot) -> None:
        """Save a slot. Nothing else is computed in it meanwhile."""
        written = await self._write(slot)
        if written is not None:
            await self._keep(written, slot)

    async def _write(self, slot: _Slot) -> _Written | None:
        """Have the engine write what is in a slot; what is left to do needs neither."""
        store, rates = self._store, self._rates
        chain, client, era, tokens, prompt = slot.chain, slot.client, slot.era, slot.tokens, slot.prompt_tokens
        name = store.new_name()
        began = time.monotonic()
        is_written = False
        try:
            if not await self._make_room(int(tokens * rates.token_bytes)):
                raise OSError("it is larger than the free disk allows")
            said = await self._ask(slot.number, "save", store.part(name))
            took = max(1e-3, (said.sec if said is not None else 0) or time.monotonic() - began)
            if said is None or not said.tokens or not said.nbytes:
                if said is not None and said.is_final:
                    self._give_up(said.refusal)
                raise OSError(said.refusal if said is not None else "the engine does not answer")
            is_written = True
        except OSError as error:
            self._note_failure(error)
            return None
        finally:
            if not is_written:
                await apart(lambda: store.delete(name))
        rates.token_bytes = said.nbytes / said.tokens
        rates.note_save(said.nbytes / took)
        self._pause_sec = _AGAIN_SEC
        busy = any(other.is_busy for other in self._slots if other is not slot)
        self._next_save_sec = time.monotonic() + (took * _SHARE if busy else 0)
        saved = Saved(
            name=name,
            group=self._group,
            model=self._model,
            client=client,
            chain=chain,
            tokens=said.tokens,
            prompt_tokens=min(prompt, said.tokens),
            nbytes=said.nbytes,
            prefill_sec=said.tokens / rates.tokens_per_sec,
            used_at=time.time(),
        )
        return _Written(saved, era)

    async def _keep(self, written: _Written, slot: _Slot) -> None:
        """Keep what an engine has written of a slot, unless it was cleared meanwhile."""
        store, saved = self._store, written.saved
        is_kept = False
        try:
            if not await apart(lambda: store.keep(saved)):
                raise OSError("the file is not as long as the engine said")
            is_kept = self.era == written.era
        except OSError as error:
            self._note_failure(error)
        finally:
            if not is_kept:
                await apart(lambda: store.delete(saved.name))
        if not is_kept:
            return
        store.of(self._model).saves += 1
        if slot.chain == saved.chain and slot.client == saved.client:
            slot.saved_tokens = saved.tokens
        await store.drop(store.add(saved))
        await self._make_room(0)

    def _note_failure(self, error: OSError) -> None:
        self._store.of(self._model).failures += 1
        self._next_save_sec = time.monotonic() + self._pause_sec
        self._pause_sec = min(2 * self._pause_sec, _LONGEST_PAUSE_SEC)
        _log.warning("model %s: a conversation could not be saved: %s", self._model, error)

    async def _make_room(self, more: int) -> bool:
        """Delete what must go for `more` bytes. Returns False if there would not be room even so."""
        store = self._store
        gone = await apart(lambda: store.victims(more))
        await store.drop(gone or ())
        return gone is not None

    async def _restore(self, slot: _Slot, wanted: Saved) -> bool:
        """Restore a state into a slot. A damaged one is deleted, and one that two engines refused or ended with:
        for one of them it may have been too long."""
        store = self._store
        if await apart(lambda: store.is_whole(wanted)):
            began = time.monotonic()
            said = await self._ask(slot.number, "restore", store.file(wanted))
            if said is not None and said.tokens:
                self._rates.note_restore(wanted.nbytes / max(1e-3, said.sec or time.monotonic() - began))
                wanted.used_at, wanted.uses = time.time(), wanted.uses + 1
                await apart(lambda: store.note_use(wanted))
                return True
            if said is not None:
                self._too_long = min(self._too_long, wanted.tokens)
            if wanted.name not in store.suspects:
                store.suspects.add(wanted.name)
                return False
            reason = (
                "two engines have ended with it" if said is None else f"two engines refused it: {said.refusal}"
            )
        else:
            reason = "its file is damaged"
        store.of(self._model).failures += 1
        _log.warning("model %s: a saved conversation is deleted: %s", self._model, reason)
        await store.drop([wanted])
        return False
