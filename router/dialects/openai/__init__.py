"""OpenAI's APIs that an engine serves only in part: responses, and several choices."""
