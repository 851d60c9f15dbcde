"""Ollama's API: its requests and answers in llama-server's words, and its pages."""
