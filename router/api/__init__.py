"""Management endpoints: lists, loading and pulling of models, status, metrics, and the web UI."""
