"""Dispatcher, which posts events to the scheduler and carries out its effects."""
