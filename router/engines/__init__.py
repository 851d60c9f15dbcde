"""Engines: kinds of them, their processes and health, connections to them, and orphans of a killed router."""

MARK_VARIABLE = "LLAMA_ROUTER_ENGINE"
"""Environment variable that identifies an engine that takes no key, should it outlive its router."""
