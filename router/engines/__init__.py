"""Engines as processes: launching, connections to them, their health, and what a killed router left behind."""
