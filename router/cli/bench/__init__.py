"""The rates of a model as its clients see them: `llama-router bench`."""
