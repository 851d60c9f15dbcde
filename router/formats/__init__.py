"""Formats of model files and of model options."""
