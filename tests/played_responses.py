"""What llama-server streams on `/v1/responses` (tools/server/server-task.cpp, build 11434), to be played: demo
models neither think nor call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Event = dict[str, Any]

MISTAKE: Event = {"error": {"code": 500, "message": "Compute error.", "type": "server_error"}}
"""In the middle of a stream, in the form of chats."""


def played() -> list[Event]:
    """A thought, a word and a call."""
    response = {"id": "resp_1", "object": "response", "status": "in_progress"}
    thought = {"id": "rs_1", "summary": [], "type": "reasoning", "encrypted_content": ""}
    message = {"id": "msg_1", "role": "assistant", "type": "message"}
    call = {"id": "fc_1", "call_id": "call_1", "name": "weather", "type": "function_call"}
    said = {"type": "output_text", "annotations": [], "logprobs": [], "text": "Let me see."}
    output: list[Event] = [
        {**thought, "content": [{"text": "Where?", "type": "reasoning_text"}]},
        {**message, "status": "completed", "content": [said]},
        {**call, "status": "completed", "arguments": '{"city": "Oslo"}'},
    ]
    usage = {"input_tokens": 9, "output_tokens": 12, "total_tokens": 21}
    usage_details = {**usage, "input_tokens_details": {"cached_tokens": 0}}
    added, delta = "response.output_item.added", "response.function_call_arguments.delta"
    return [
        {"type": "response.created", "response": response},
        {"type": "response.in_progress", "response": response},
        {"type": added, "item": {**thought, "content": [], "status": "in_progress"}},
        {"type": "response.reasoning_text.delta", "delta": "Where?", "item_id": "rs_1"},
        {"type": added, "item": {**message, "content": [], "status": "in_progress"}},
        {
            "type": "response.content_part.added",
            "item_id": "msg_1",
            "part": {"type": "output_text", "text": ""},
        },
        {"type": "response.output_text.delta", "item_id": "msg_1", "delta": "Let me"},
        {"type": "response.output_text.delta", "item_id": "msg_1", "delta": " see."},
        {"type": added, "item": {**call, "arguments": "", "status": "in_progress"}},
        {"type": delta, "delta": '{"city": ', "item_id": "fc_1"},
        {"type": delta, "delta": '"Oslo"}', "item_id": "fc_1"},
        {"type": "response.output_item.done", "item": output[0]},
        {"type": "response.output_text.done", "item_id": "msg_1", "text": "Let me see."},
        {"type": "response.content_part.done", "item_id": "msg_1", "part": said},
        {"type": "response.output_item.done", "item": output[1]},
        {"type": "response.output_item.done", "item": output[2]},
        {
            "type": "response.completed",
            "response": {
                **response,
                "created_at": 1,
                "status": "completed",
                "model": "caller",
                "output": output,
                "usage": usage_details,
            },
        },
    ]


def stream_of(events: list[Event]) -> bytes:
    """As llama-server frames them."""
    return b"".join(
        b"event: %b\ndata: %b\n\n" % (event["type"].encode(), json.dumps(event).encode()) for event in events
    )


def stories(directory: Path) -> dict[str, dict[str, str]]:
    """Engines by what becomes of their answers: what to set in the environment of each."""
    whole = played()
    told = {"caller": whole, "fails": [*whole[:7], MISTAKE], "dies": whole, "torn": whole, "stops": whole[:7]}
    deaths = {"dies": {"FAKE_DIE": "after"}, "torn": {"FAKE_DIE": "torn"}}
    for name, events in told.items():
        (directory / name).write_text("\n".join(map(json.dumps, events)))
    return {name: {"FAKE_EVENTS": str(directory / name), **deaths.get(name, {})} for name in told}
