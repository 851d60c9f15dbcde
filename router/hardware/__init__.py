"""Devices of this machine: NVIDIA and AMD GPUs, and RAM."""
