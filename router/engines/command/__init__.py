"""Any server, by its command line."""

MARK_VARIABLE = "LLAMA_ROUTER_ENGINE"
"""By which one that has outlived its router is known."""
