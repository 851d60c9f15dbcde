"""What Ollama's API costs on top of OpenAI's, per relayed event.

    python benchmarks/translation.py [--events 200000]

The translation alone, in this process, on the events that llama-server sends: the additional cost of a
token for clients of Ollama's API. Sockets are read and written on both paths; `overhead.py` measures that.
The best of five rounds counts, as disturbances only ever add time.
"""

from __future__ import annotations

import argparse
import time

from router.dialects.ollama.answers import Translation
from router.dialects.ollama.requests import Asked

_EVENT = (
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":" token"}}],"created":1795270132,'
    b'"id":"chatcmpl-KthzbhIK5S70CGVunnoYJMMlMARWWk1S","model":"demo","system_fingerprint":"b11434-6a2cbbf",'
    b'"object":"chat.completion.chunk"}\n\n'
)
_ROUNDS = 5


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--events", type=int, default=200_000)
    events = arguments.parse_args().events
    for kind in ("chat", "generate"):
        asked = Asked(kind, "demo", True, None, "/v1/chat/completions", {})
        best = min(_round(Translation(asked), events) for _ in range(_ROUNDS))
        print(f"/api/{kind}: {best / events * 1e6:.1f} µs per event")


def _round(translation: Translation, events: int) -> float:
    since = time.process_time()
    for _ in range(events):
        translation.events(_EVENT)
    return time.process_time() - since


if __name__ == "__main__":
    main()
