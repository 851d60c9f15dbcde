"""All that is llama.cpp's own: its servers, flags, memory formulas and errors."""
