"""What happened to one request, and to its model meanwhile, put into words when somebody asks.

All of it is known anyway: the times of the request are reported at its end, why it waited is noted of its model's
queue, and what its model did, and those that made room for it, are decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from router.api.models import iso
from router.kv.keeper import Source
from router.observe.events import Attempt, Outcome
from router.observe.usage import Usage
from router.runtime.wait_log import Noted
from router.scheduling.messages import ModelState, Refusal
from router.scheduling.residency import engine_name

_MAKES_ROOM = frozenset((ModelState.DRAINING, ModelState.STOPPING, ModelState.OFF, ModelState.ASLEEP))
_BEGINNINGS: Mapping[str, str] = {
    Source.SLOT: "the beginning of its prompt was in the engine's slot",
    Source.RAM: "the beginning of its prompt was in the engine's own cache in RAM",
    Source.DISK: "the beginning of its prompt came from disk",
}


class Story(NamedTuple):
    """The times and figures of a request. Times in seconds since the epoch."""

    alias: str
    arrived_at: float
    priority: str
    engine_id: int | None = None
    granted_at: float | None = None
    """When it was granted that engine; None: it has none yet, or never got one."""
    load_sec: float = 0.0
    kv: str = ""
    first_at: float | None = None
    ended_at: float | None = None
    outcome: str = ""
    status: int = 0
    reason: str = ""
    usage: Usage | None = None
    attempts: Sequence[Attempt] = ()


class _Happened(NamedTuple):
    at: float
    event: str
    detail: str
    model: str | None = None


def timeline(
    story: Story, waits: Sequence[Noted], decisions: Iterable[dict[str, Any]], until: float
) -> list[dict[str, Any]]:
    """Return the events, oldest first. `decisions` are those of `/v1/decisions`; `until` is now."""
    happened = [
        *_of_request(story),
        *(_Happened(noted.at, "waiting", noted.reason) for noted in waits),
        *_of_models(story, waits, decisions, until),
    ]
    happened.sort(key=lambda each: each.at)
    return [
        {
            "at": iso(each.at),
            "event": each.event,
            "detail": each.detail,
            **({"model": each.model} if each.model else {}),
        }
        for each in happened
    ]


def _of_request(story: Story) -> Iterator[_Happened]:
    began = story.arrived_at
    if not story.alias:
        yield _Happened(began, "received", "it has not asked for a slot")
    else:
        yield _Happened(began, "queued", f"for {story.alias}, {story.priority} priority")
    for attempt in story.attempts:
        engine = engine_name(story.alias, attempt.engine_id)
        yield _Happened(began + attempt.granted_sec, "granted", engine)
        yield _Happened(began + attempt.failed_sec, "retried", f"{engine} failed: {attempt.reason}")
    if story.granted_at is not None and story.engine_id is not None:
        yield _Happened(story.granted_at, "granted", _grant(story))
    if story.first_at is not None:
        since = story.granted_at if story.granted_at is not None else began
        yield _Happened(story.first_at, "first_token", f"{_seconds(story.first_at - since)} after it was granted")
    if story.ended_at is not None:
        yield _Happened(story.ended_at, "done", _end(story))


def _grant(story: Story) -> str:
    assert story.granted_at is not None
    assert story.engine_id is not None
    words = [engine_name(story.alias, story.engine_id)]
    waited_sec = story.granted_at - story.arrived_at
    if waited_sec >= 0.001:
        loading = f", {_seconds(story.load_sec)} of it while the model was loaded" if story.load_sec else ""
        words.append(f"after {_seconds(waited_sec)}{loading}")
    if story.kv:
        words.append(_BEGINNINGS.get(story.kv, "nothing of its prompt had been computed before"))
    return "; ".join(words)


def _end(story: Story) -> str:
    words = [f"{story.outcome} ({story.status})" if story.status else story.outcome]
    usage = story.usage
    if usage is not None and usage.prompt_tokens:
        cached = f" ({usage.cached_tokens} of them cached)" if usage.cached_tokens else ""
        words.append(f"{usage.prompt_tokens} tokens in{cached}, {usage.output_tokens} out")
    if usage is not None and usage.decode_sec and usage.output_tokens > 1:
        words.append(f"{(usage.output_tokens - 1) / usage.decode_sec:.1f} tokens/s")
    if story.reason:
        words.append(story.reason)
    elif story.outcome == Outcome.CANCELLED:
        words.append("its client disconnected")
    return "; ".join(words)


def _of_models(
    story: Story, waits: Sequence[Noted], decisions: Iterable[dict[str, Any]], until: float
) -> Iterator[_Happened]:
    """Yield what its model did until the end, and until the grant those that were waited for."""
    if not story.alias:
        return
    ended_at = until if story.ended_at is None else story.ended_at
    granted_at = ended_at if story.granted_at is None else story.granted_at
    named = " ".join(noted.reason for noted in waits)
    for decision in decisions:
        alias, state = decision["model"], decision["status"]
        at = datetime.fromisoformat(decision["at"]).timestamp()
        if alias is None or state == Refusal.DISPLACED or not story.arrived_at - 0.001 <= at <= ended_at + 0.001:
            continue
        is_own = alias == story.alias
        makes_room = (
            state in _MAKES_ROOM and at <= granted_at and (alias in named or story.alias in decision["reason"])
        )
        if is_own or makes_room:
            reason = f" ({decision['reason']})" if decision["reason"] else ""
            yield _Happened(at, state, f"{alias} is {state}{reason}", alias)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
