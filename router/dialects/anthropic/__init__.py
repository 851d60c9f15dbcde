"""Anthropic's messages: its requests in OpenAI's words, and the answers back."""
