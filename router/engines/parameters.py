"""Parameters of requests that only llama-server has, and those of them that other engines have as well."""

from __future__ import annotations

from collections.abc import Mapping

OF_LLAMA_SERVER = frozenset(
    {
        "adaptive_decay",
        "adaptive_target",
        "add_generation_prompt",
        "backend_sampling",
        "cache_prompt",
        "chat_format",
        "chat_parser",
        "chat_template_kwargs",
        "continue_final_message",
        "dry_allowed_length",
        "dry_base",
        "dry_multiplier",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "dynatemp_range",
        "embd_normalize",
        "generation_prompt",
        "grammar",
        "grammar_lazy",
        "grammar_triggers",
        "grammar_type",
        "id_slot",
        "ignore_eos",
        "json_schema",
        "lora",
        "min_keep",
        "min_p",
        "mirostat",
        "mirostat_eta",
        "mirostat_tau",
        "n_cache_reuse",
        "n_cmpl",
        "n_discard",
        "n_indent",
        "n_keep",
        "n_predict",
        "n_probs",
        "parse_tool_calls",
        "post_sampling_probs",
        "preserved_tokens",
        "reasoning_budget_end_tag",
        "reasoning_budget_end_tags",
        "reasoning_budget_message",
        "reasoning_budget_start_tag",
        "reasoning_budget_tokens",
        "reasoning_control",
        "reasoning_format",
        "repeat_last_n",
        "repeat_penalty",
        "response_fields",
        "return_progress",
        "return_tokens",
        "samplers",
        "speculative.n_max",
        "speculative.n_min",
        "speculative.ngram_min_hits",
        "speculative.ngram_size_m",
        "speculative.ngram_size_n",
        "speculative.p_min",
        "speculative.type",
        "sse_ping_interval",
        "t_max_predict_ms",
        "thinking_budget_tokens",
        "timings_per_token",
        "top_k",
        "top_n_sigma",
        "typical_p",
        "verbose",
        "xtc_probability",
        "xtc_threshold",
    }
)
"""Parameters of its chats, completions and embeddings that OpenAI's API does not have (`server-schema.cpp` and
`server-common.cpp` in tools/server, build 11434)."""

BINDING = ("grammar", "lora")
"""Those without which an answer is another one than was asked for. An engine that lacks them cannot serve it."""

WIDESPREAD: Mapping[str, str] = {
    **{name: name for name in ("chat_template_kwargs", "ignore_eos", "min_p", "top_k")},
    "repeat_penalty": "repetition_penalty",
}
"""Those that most servers of OpenAI's API have, by llama-server's names, under the names that they have there."""
