"""Servers of any kind, started by their command lines."""

MARK_VARIABLE = "LLAMA_ROUTER_ENGINE"
"""Environment variable that identifies a server that has outlived its router."""
