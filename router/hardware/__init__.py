"""The devices of this machine: NVIDIA and AMD GPUs, RAM, and readings of them that may hang."""
