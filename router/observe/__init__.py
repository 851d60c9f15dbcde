"""Observability: the event bus, metrics, request statistics, logs and traces."""
