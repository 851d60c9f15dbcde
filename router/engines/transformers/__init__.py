"""`transformers serve`, for models that vLLM does not run and for machines without it."""
