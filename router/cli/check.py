"""Loads the configuration for the options of the command line; `llama-router check` and `schema`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from router.catalog.load import Loaded, load
from router.config.problems import ConfigError, dotted
from router.config.resolved import Config
from router.config.schema import schema as schema_of_configuration
from router.config.show import leaves, render
from router.config.source import Source
from router.engines.base import EngineBackend, NoEngine
from router.engines.launcher import LocalLauncher
from router.engines.orphans import EngineRecord
from router.engines.registry import KINDS
from router.memory.measurements import Learned
from router.memory.plan import Unusable
from router.runtime.dispatcher import warnings
from router.store.demo import MODEL_PATH
from router.system.printable import line
from router.system.state import State

_DEMO = "built in, nothing is configured"


def asked_for(options: argparse.Namespace, state_dir: Path | None = None, before: Loaded | None = None) -> Loaded:
    """Load the configuration, or the demo; `state_dir` and `before` are those of `load`. Raises ConfigError."""
    overrides: dict[str, tuple[str, Any]] = {}
    if options.host is not None:
        overrides["api.host"] = ("--host", options.host)
    if options.port is not None:
        overrides["api.port"] = ("--port", options.port)
    if options.ollama_port is not None:
        overrides["api.ollama_port"] = ("--ollama-port", options.ollama_port)
    if options.hf_cache:
        overrides["system.hf_cache"] = ("--hf-cache", True)
    if options.ollama_store:
        overrides["system.ollama_store"] = ("--ollama-store", True)
    read = partial(
        load,
        options.config,
        environ=os.environ,
        cwd=Path.cwd(),
        models_dirs=options.models_dir,
        state_dir=state_dir,
        before=before,
    )
    loaded = read(overrides=overrides)
    folders = options.models_dir or options.hf_cache or options.ollama_store
    own = [model for model in loaded.config.models.values() if model.source != Source.CREATED]
    if loaded.source is not None or folders or own:  # created models may be made from the demo
        return loaded
    demo: dict[str, Any] = {"model_path": str(MODEL_PATH), "description": "A tiny model to try the router with."}
    overrides["models.demo"] = (_DEMO, {**demo, "flags": ["-np", "2"]})
    overrides["models.demo-embed"] = (_DEMO, {**demo, "flags": ["--embedding", "--pooling", "mean"]})
    return read(overrides=overrides)


def check(options: argparse.Namespace) -> None:
    """Validate and print the configuration and what is installed of each kind of engine, with warnings on standard
    error. Raises ConfigError.
    """
    try:
        loaded = asked_for(options)
    except ConfigError as error:
        if options.json:
            problems = [asdict(problem) for problem in error.problems]
            print(json.dumps({"valid": False, "problems": problems}, indent=2))
        raise
    installed = {name: kind.installed(loaded.config.system) for name, kind in KINDS.items()}
    warnings = [*loaded.warnings, *_would_not_load(loaded.config)]
    if options.json:
        values = {
            key: {"value": text, "origin": loaded.origins[key]}
            for key, text in ((dotted(path), text) for path, text in leaves(loaded.config))
        }
        engines = {name: each._asdict() for name, each in installed.items()}
        document = {"valid": True, "warnings": warnings, "engines": engines, "values": values}
        print(json.dumps(document, indent=2, default=str))
        return
    print("\n".join(map(line, render(loaded.config, loaded.origins))))
    for name, each in installed.items():
        print(line(f"engines.{name} = {each}"))
    for warning in warnings:
        print(line(f"warning: {warning}"), file=sys.stderr)


def _would_not_load(config: Config) -> Iterator[str]:
    """Yield problems of files and flags that otherwise appear only when a model is loaded."""
    launcher, learned = LocalLauncher(config.system.base_port, EngineRecord(State()), None), Learned()
    backends: dict[str, EngineBackend] = {}
    for name in config.engines:
        try:
            backend = KINDS[name].backend(config.system, launcher, learned)
            backend.check_runs()
            backends[name] = backend
        except (NoEngine, Unusable) as error:
            yield f"{_nobody(name, config)}: {error}"
    yield from warnings(backends, config.models)
    for alias, model in config.models.items():
        if model.engine not in backends:
            continue
        try:
            for problem in backends[model.engine].validate(model):
                yield f"models.{alias} will not load: {problem}"
        except NoEngine as error:
            yield f"{_nobody(model.engine, config)}: {error}"
            del backends[model.engine]


def _nobody(engine: str, config: Config) -> str:
    return f"no model of engine {engine} will load" if len(config.engines) > 1 else "no model will load"


def schema(_: argparse.Namespace) -> None:
    """Print the JSON Schema of the configuration."""
    print(json.dumps(schema_of_configuration(), indent=2))
