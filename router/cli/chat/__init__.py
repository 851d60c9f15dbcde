"""Chats with models of a running router in the terminal: `llama-router run`."""
