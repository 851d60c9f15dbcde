"""The interactive chat of `llama-router run MODEL`."""

from __future__ import annotations

import difflib
import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from router.cli.chat import attachments, settings
from router.cli.chat.attachments import Part
from router.cli.chat.conversation import Conversation
from router.cli.chat.editor import Editor, paths
from router.cli.chat.reply import Reply
from router.cli.chat.screen import Answer, summary
from router.cli.chat.waiting import Waiting
from router.cli.client import PRIORITIES, CannotAsk, RouterClient
from router.system.printable import line, printable

_T = TypeVar("_T")
_SYNONYMS = {"/?": "/help", "/exit": "/bye", "/quit": "/bye"}


@dataclass(slots=True)
class Chat:
    """A conversation with a model of a router, whose answers are printed."""

    client: RouterClient
    conversation: Conversation
    verbose: bool = False
    streams: bool = True

    def answer(self) -> None:
        """Ask for the next answer, print it and note it. Raises CannotAsk, KeyboardInterrupt.

        An answer that was stopped is noted as far as it came; one that broke off is not.
        """
        request_id = uuid.uuid4().hex
        headers = {"X-Request-Id": request_id}
        if self.conversation.priority:
            headers["X-Request-Priority"] = self.conversation.priority
        body = self.conversation.request()
        if self.streams:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        reply = Reply(self.client, body, headers)
        with Answer() as shown, Waiting(self.client, request_id) as waiting:
            try:
                for piece in reply:
                    waiting.end()
                    shown.show(piece)
            except KeyboardInterrupt:
                reply.close()
                if shown.text:
                    self.conversation.answered(shown.text)
                raise
        self.conversation.answered(shown.text)
        if reply.end == "length":
            print(_why_cut(body.get("max_tokens"), reply.figures.output_tokens or 0), file=sys.stderr)
        if self.verbose:
            print(line(summary(reply.figures)), file=sys.stderr)

    def sees(self) -> bool | None:
        """Whether the model takes images; None if that is not known. Raises CannotAsk."""
        card = self.client.get(f"/v1/models/{quote(self.conversation.model, safe='')}")
        if "capabilities" not in card:
            return None
        return "vision" in card["capabilities"]

    def with_images(self, prompt: str) -> tuple[str, list[Part]]:
        """Return a prompt without the images that it names, and these, if the model sees. Raises CannotAsk."""
        text, found = attachments.images_in(prompt)
        if not found or not self.sees():
            return prompt, []
        for path in found:
            print(line(f"Added the image {path}"), file=sys.stderr)
        return text, [attachments.image(path) for path in found]


def _why_cut(most: int | None, tokens: int) -> str:
    if most is None or tokens < most:
        return "The answer was cut off: the model's context is full, or its flags limit answers."
    return f"The answer was cut off after {most} tokens (max_tokens)."


class Session:
    """Reads prompts and commands until the user leaves."""

    def __init__(self, chat: Chat, history: Path | None, texts: list[str], images: list[Part]) -> None:
        """Keep prompts in the file `history`. `texts` and `images` go with the first prompt."""
        self._chat = chat
        self._texts = texts
        self._images = images
        self._commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/set": (self._set, "[NAME [VALUE]]", "show the settings, set one, or without value unset it"),
            "/system": (self._system, "[TEXT]", "set the system prompt, or without text remove it"),
            "/image": (self._image, "FILE", "attach an image to the next prompt"),
            "/file": (self._file, "FILE", "attach a text file to the next prompt"),
            "/clear": (self._clear, "", "forget the conversation so far"),
            "/retry": (self._retry, "", "ask again for the last answer"),
            "/model": (self._model, "[NAME]", "go on with another model, or list them"),
            "/priority": (self._priority, "[high|normal|low]", "set the priority of requests"),
            "/save": (self._save, "[-f] [FILE]", "save the conversation; -f overwrites a file"),
            "/load": (self._load, "FILE", "go on with a saved conversation"),
            "/help": (self._help, "", "show this"),
            "/bye": (self._leave, "", "leave, as does Ctrl-D"),
        }
        names: dict[str, Callable[[str, str], Iterable[str]]] = dict.fromkeys(self._commands, _nothing)
        names |= dict.fromkeys(("/image", "/file", "/save", "/load"), paths)
        names["/model"] = lambda _, __: self._models()
        names["/set"] = lambda _, __: [f"{name} " for name in (*settings.NAMES, "verbose")]
        names["/priority"] = lambda _, __: PRIORITIES
        self._editor = Editor(history, names)
        self._left = False

    def run(self) -> None:
        """Chat until the user leaves. Raises CannotAsk if the model is unknown."""
        self._find(self._chat.conversation.model)
        print(line(f"Chat with {self._chat.conversation.model}. /help shows the commands; Ctrl-D leaves."))
        while not self._left:
            try:
                text = self._editor.read(">>> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\nCtrl-D or /bye leaves.")
                continue
            try:
                self._take(text)
            except CannotAsk as error:
                print(printable(str(error)), file=sys.stderr)
            except KeyboardInterrupt:
                print("Stopped.", file=sys.stderr)

    def _take(self, text: str) -> None:
        """Carry out a command, or ask the model."""
        if not text.strip():
            return
        if text.startswith("/"):
            name, *rest = text.split(maxsplit=1)
            command = self._commands.get(_SYNONYMS.get(name, name))
            if command is not None:
                command[0]("".join(rest).strip())
                return
            if not _is_path(name):
                raise CannotAsk(self._unknown(name))
        self._ask(text)

    def _ask(self, text: str) -> None:
        prompt, images = self._chat.with_images(text)
        prompt = "\n\n".join([*self._texts, prompt])
        self._chat.conversation.say(prompt, [*self._images, *images])
        self._images, self._texts = [], []
        self._answer()

    def _answer(self) -> None:
        try:
            self._chat.answer()
        except CannotAsk as error:
            raise CannotAsk(f"{error}\n/retry asks again.") from None
        finally:
            print()

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._commands, 1)
        hint = f"Did you mean {near[0]}?" if near else "/help shows them."
        return f"There is no command {name}. {hint} A space before it sends it to the model."

    # --- commands ---------------------------------------------------------------------------------------

    def _set(self, rest: str) -> None:
        name, _, value = rest.removeprefix("parameter ").strip().partition(" ")
        value = value.strip()
        conversation = self._chat.conversation
        if not name:
            self._show()
        elif name in ("verbose", "quiet"):
            self._chat.verbose = name == "verbose" and value != "off"
        elif name == "system":
            self._system(value)
        elif value:
            conversation.fields[settings.field_of(name)] = settings.value_of(name, value)
        else:
            conversation.fields.pop(settings.field_of(name), None)

    def _show(self) -> None:
        conversation = self._chat.conversation
        rows = [("model", conversation.model), ("priority", conversation.priority or "the router's default")]
        rows += [("system", conversation.system)] if conversation.system else []
        rows += settings.shown(conversation.fields)
        rows += [("verbose", "on")] if self._chat.verbose else []
        for name, value in rows:
            print(printable(f"{name:<18}{value}"))
        unset = [name for name in settings.NAMES if name not in dict(rows)]
        print(f"Not set: {', '.join(unset)}.")

    def _system(self, rest: str) -> None:
        self._chat.conversation.system = rest

    def _image(self, rest: str) -> None:
        if self._chat.sees() is False:
            raise CannotAsk(f"{self._chat.conversation.model} takes no images.")
        self._attach(rest, attachments.image, self._images)

    def _file(self, rest: str) -> None:
        self._attach(rest, attachments.text, self._texts)

    def _attach(self, rest: str, read: Callable[[str], _T], to: list[_T]) -> None:
        names = _words(rest)
        if not names:
            raise CannotAsk("Name a file.")
        to += [read(name) for name in names]
        print(line(f"{', '.join(names)} will go with the next prompt."))

    def _clear(self, _: str) -> None:
        self._chat.conversation.clear()
        self._images, self._texts = [], []

    def _retry(self, _: str) -> None:
        conversation = self._chat.conversation
        before = list(conversation.messages), conversation.unanswered
        if not conversation.ask_again():
            raise CannotAsk("Nothing was asked yet.")
        try:
            self._answer()
        finally:
            if conversation.unanswered is not None:  # there is no new answer: keep the old one
                conversation.messages, conversation.unanswered = before

    def _model(self, rest: str) -> None:
        if not rest:
            self._list_models()
            return
        self._find(rest)
        self._chat.conversation.model = rest
        print(line(f"Now with {rest}."))

    def _priority(self, rest: str) -> None:
        if rest:
            self._chat.conversation.set_priority(rest)
        else:
            print(self._chat.conversation.priority or "the router's default")

    def _save(self, rest: str) -> None:
        overwrite = rest.startswith("-f")
        names = _words(rest.removeprefix("-f"))
        known = self._chat.conversation.file
        if not names and known is None:
            raise CannotAsk("Name a file: /save FILE")
        path = self._chat.conversation.save(names[0] if names else str(known), overwrite=overwrite)
        print(line(f"Saved as {path}"))

    def _load(self, rest: str) -> None:
        names = _words(rest)
        if not names:
            raise CannotAsk("Name a file: /load FILE")
        loaded = Conversation.load(names[0])
        loaded.priority = self._chat.conversation.priority
        self._chat.conversation = loaded
        pending = ", the last one without an answer: /retry asks for it" if loaded.unanswered else ""
        print(line(f"{len(loaded.messages) + bool(pending)} messages with {loaded.model}{pending}"))

    def _help(self, _: str) -> None:
        for name, (__, words, text) in self._commands.items():
            print(f"{f'{name} {words}':<32}{text}")
        print('"""'.ljust(32) + "begins and ends a prompt of several lines; pasted lines stay together")
        print("Ctrl-C".ljust(32) + "stops an answer")

    def _leave(self, _: str) -> None:
        self._left = True

    def _list_models(self) -> None:
        """Print the names of the models, those that are loaded first, and no more than the screen shows."""
        names = self._models()
        most = max(shutil.get_terminal_size().lines - 4, 10)
        for name in names[:most]:
            print(line(name))
        if len(names) > most:
            print(f"… and {len(names) - most} more. Tab completes a name.")

    def _models(self) -> list[str]:
        cards = self._chat.client.get("/v1/models")["data"]
        return [card["id"] for card in sorted(cards, key=lambda card: card.get("state") in ("off", "failed"))]

    def _find(self, name: str) -> None:
        """Raise CannotAsk, with close names, if there is no such model."""
        self._chat.client.get(f"/v1/models/{quote(name, safe='')}")


def _words(text: str) -> list[str]:
    """Split names of files as a shell does."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise CannotAsk(f"{text}: {error}.") from None


def _is_path(word: str) -> bool:
    return "/" in word[1:] or os.path.exists(word)


def _nothing(_: str, __: str) -> Iterable[str]:
    return ()
