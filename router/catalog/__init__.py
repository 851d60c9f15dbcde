"""The catalog: the configuration completed with discovered models, and descriptions of all models."""
