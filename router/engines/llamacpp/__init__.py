"""llama.cpp: its servers, flags, memory formulas and errors."""
