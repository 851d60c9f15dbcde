"""Anthropic's messages: requests translated to OpenAI's chats, and the answers back."""
