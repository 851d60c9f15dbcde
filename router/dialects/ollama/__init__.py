"""Ollama's API: requests translated to llama-server's, the answers back, and its management endpoints."""
