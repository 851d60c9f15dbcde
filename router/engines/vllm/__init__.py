"""vLLM: models in safetensors, served by `vllm serve`."""
