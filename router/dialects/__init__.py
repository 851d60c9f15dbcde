"""APIs that are translated or completed on their way: Anthropic's, OpenAI's responses, several choices."""
