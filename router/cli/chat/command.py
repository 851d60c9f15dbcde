"""`llama-router run MODEL [PROMPT…]`: one answer, or without a prompt in a terminal a chat."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from router.cli.chat import attachments
from router.cli.chat.conversation import Conversation
from router.cli.chat.session import Chat, Session
from router.cli.client import CannotAsk
from router.cli.remote import connect
from router.system.state import default_path

_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "max_tokens": "max_tokens",
    "seed": "seed",
    "format": "response_format",
    "think": "chat_template_kwargs",
}
"""Fields of requests by options."""


def run(options: argparse.Namespace) -> None:
    """Answer the prompt of the command line and of standard input, or chat. Raises CannotAsk, ConfigError."""
    given = {field: getattr(options, name) for name, field in _FIELDS.items()}
    fields: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    images = [attachments.image(path) for path in options.image]
    texts = [attachments.text(path) for path in options.file]
    conversation = Conversation(options.model, options.system, fields, options.priority)
    chat = Chat(connect(options), conversation, verbose=options.verbose, streams=options.stream)
    if _is_chat(options):
        Session(chat, _history() if options.history else None, texts, images).run()
        return
    parts = (*texts, " ".join(options.prompt), _standard_input(options))
    prompt = "\n\n".join(part for part in parts if part.strip())
    if not prompt and not images:
        raise CannotAsk("There is no prompt: write it after the model, or to standard input.")
    text, found = chat.with_images(prompt)
    conversation.say(text, [*images, *found])
    chat.answer()


def _is_chat(options: argparse.Namespace) -> bool:
    return not options.prompt and _is_typed() and sys.stdout.isatty()


def _is_typed() -> bool:
    """Whether standard input is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def _standard_input(options: argparse.Namespace) -> str:
    """Return what is piped in, or typed where the answer goes elsewhere. Raises CannotAsk."""
    if sys.stdin is None or (options.prompt and _is_typed()):
        return ""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise CannotAsk("Standard input is not text in UTF-8. Images are attached by --image.") from None


def _history() -> Path | None:
    """Return the file in which prompts are kept: for all routers, beside their folders."""
    folder = default_path(0, os.environ)
    return None if folder is None else folder.with_name("history")
