"""Models that Transformers runs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from router.config.resolved import ModelConfig
from router.config.schema import Quantize

_PARAMETERS: Mapping[str, str] = {
    **{name: name for name in ("chat_template_kwargs", "min_p", "top_k", "typical_p")},
    "repeat_penalty": "repetition_penalty",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersModel(ModelConfig):
    """Resolved configuration of a model in safetensors; see `TransformersEntry`. `model_path` is its folder."""

    engine: ClassVar[str] = "transformers"
    derived: ClassVar[frozenset[str]] = frozenset(
        {"alias", "source", "chosen_because", "files", "slots", "routes", "known_as", "purposes", "most_tokens"}
        | {"has_template", "takes_media", "longest"}
    )
    repo: str | None = None
    quantize: Quantize = "auto"
    context: int | None = None
    """Tokens for which memory is planned; None: those of the model, within bounds."""
    longest: int | None = field(default=None, compare=False)
    """Most tokens of a conversation; None: unknown."""
    has_template: bool = field(default=True, compare=False)
    """Whether it has a chat template."""
    takes_media: bool = field(default=False, compare=False)
    """Whether it takes more than text."""

    @property
    def parameters(self) -> Mapping[str, str]:
        """Those of llama-server that become settings of a generation or of the chat template."""
        return _PARAMETERS

    @property
    def revision(self) -> Hashable:
        """Everything that its engine is started with."""
        how = (self.model_path, self.flags, self.quantize, self.context)
        return (*how, frozenset(self.env.items()), self.files)
