"""Engines: kinds of them, their processes and health, connections to them, and orphans of a killed router."""
