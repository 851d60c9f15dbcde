"""Servers of any kind, started by their command lines."""
