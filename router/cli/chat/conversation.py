"""A conversation with a model: what was said, and how it is to answer. It asks nobody."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from router.cli.chat.attachments import Part
from router.cli.client import PRIORITIES, CannotAsk

Message = dict[str, Any]


@dataclass(slots=True)
class Conversation:
    """Messages in turn, each of the user followed by one of the model."""

    model: str
    system: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of its requests: sampling, the format of answers."""
    priority: str = ""
    """Empty for the router's default."""
    messages: list[Message] = field(default_factory=list)
    unanswered: Message | None = None
    """The last message, if its answer failed."""
    file: Path | None = None
    """Where it was saved last, or loaded from."""

    def set_priority(self, name: str) -> None:
        """Set the priority of requests. Raises CannotAsk."""
        if name not in PRIORITIES:
            raise CannotAsk(f"A priority is {', '.join(PRIORITIES[:-1])} or {PRIORITIES[-1]}, not {name!r}.")
        self.priority = name

    def say(self, text: str, parts: list[Part]) -> None:
        """Ask something next, with images; what failed before is given up."""
        self.unanswered = {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}

    def ask_again(self) -> bool:
        """Take back the last answer, if there is one, to ask for another; return whether there is a question."""
        if self.unanswered is None and len(self.messages) >= 2:
            self.unanswered = self.messages[-2]
            del self.messages[-2:]
        return self.unanswered is not None

    def answered(self, text: str) -> None:
        """Note the answer to what was asked last."""
        assert self.unanswered is not None
        self.messages += [self.unanswered, {"role": "assistant", "content": text}]
        self.unanswered = None

    def clear(self) -> None:
        """Forget what was said; the system prompt and the settings remain."""
        self.messages, self.unanswered, self.file = [], None, None

    def request(self) -> dict[str, Any]:
        """Return the body of a request for the next answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        last = [self.unanswered] if self.unanswered is not None else []
        return {"model": self.model, **self.fields, "messages": [*system, *self.messages, *last]}

    def save(self, name: str, *, overwrite: bool = False) -> Path:
        """Write the conversation to a file, which is the request that it consists of. Raises CannotAsk.

        Another file is overwritten on request only.
        """
        path = _path(name)
        if path.exists() and path != self.file and not overwrite:
            raise CannotAsk(f"{path} exists already. To overwrite it: /save -f {name}")
        written = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            written.write_text(json.dumps(self.request(), indent=2, ensure_ascii=False) + "\n", "utf-8")
            written.replace(path)
        except OSError as error:
            written.unlink(missing_ok=True)
            raise CannotAsk(f"{path} cannot be written: {error.strerror}.") from None
        self.file = path
        return path

    @classmethod
    def load(cls, name: str) -> Conversation:
        """Read a saved conversation. Raises CannotAsk."""
        path = _path(name)
        try:
            read = json.loads(path.read_text("utf-8"))
            model, messages = str(read.pop("model")), read.pop("messages")
            system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
            pending = messages.pop() if messages and messages[-1]["role"] == "user" else None
            turns = [message["role"] for message in messages]
            if not isinstance(system, str) or turns != ["user", "assistant"] * (len(turns) // 2):
                raise ValueError("its messages are not by the user and the model in turn")
        except OSError as error:
            raise CannotAsk(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CannotAsk(f"{path} is not a saved conversation: {error}.") from None
        return cls(model, system, read, messages=messages, unanswered=pending, file=path)


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser().absolute()
    except RuntimeError as error:  # of ~somebody
        raise CannotAsk(f"{name}: {error}.") from None
