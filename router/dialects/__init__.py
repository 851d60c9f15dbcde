"""APIs whose requests or answers are translated or completed: Anthropic's, Ollama's, and parts of OpenAI's."""
