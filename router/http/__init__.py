"""Shared by management endpoints and data plane: errors in each API's format, keys, origins of web pages."""
