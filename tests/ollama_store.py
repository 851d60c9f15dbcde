"""Manifests as Ollama writes them into its store."""

from __future__ import annotations

import json
from pathlib import Path


def ollama_model(store: Path, name: str, *layers: tuple[str, str]) -> None:
    """Write a model's manifest; `name` is host/namespace/model/tag, each layer a kind and the digest of a blob."""
    manifest = store / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    kinds = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}", "size": 1}
        for kind, digest in layers
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": kinds}))
