"""The dispatcher, which turns the world into the scheduler's events and carries its effects out."""
