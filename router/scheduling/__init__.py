"""The scheduler, which is pure: no clock, no input or output, no configuration."""
