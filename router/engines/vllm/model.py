"""Models that vLLM serves."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from router.config.resolved import ModelConfig
from router.config.schema import ContainerOfVllm
from router.engines.parameters import WIDESPREAD

_OF_ITS_OWN = ("add_generation_prompt", "continue_final_message")
_PARAMETERS = {**WIDESPREAD, **{name: name for name in _OF_ITS_OWN}}


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmModel(ModelConfig):
    """Resolved configuration of a model that vLLM serves; see `VllmEntry`.

    `model_path` is its folder, also for a model of the Hugging Face cache. As long as the repository has not been
    downloaded, it is the folder of that; see `hf_cache.held`.
    """

    engine: ClassVar[str] = "vllm"
    derived: ClassVar[frozenset[str]] = frozenset(
        {"alias", "source", "chosen_because", "files", "purposes", "most_tokens", "routes", "known_as"}
    )
    written_as: ClassVar[Mapping[str, str]] = {}
    repo: str | None = None
    context: int | None = None
    """Tokens of the longest request. None: as many as the model was made for, or as fit."""
    container: ContainerOfVllm | None = None
    sleep: bool = False
    """Whether it sleeps instead of exiting when it makes room."""

    @property
    def is_downloaded(self) -> bool:
        """Whether vLLM downloads the model if it is not there."""
        return self.container is not None and self.container.downloads

    @property
    def parameters(self) -> Mapping[str, str]:
        """See `ModelConfig`."""
        return _PARAMETERS

    @property
    def revision(self) -> Hashable:
        """See `ModelConfig`."""
        return (
            self.model_path,
            self.flags,
            frozenset(self.env.items()),
            self.files,
            self.alias,
            self.context,
            self.slots,
            self.container,
            self.sleep,
        )
