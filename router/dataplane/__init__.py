"""Requests for models on their way: connections of clients, heads, bodies, exchanges with engines."""
