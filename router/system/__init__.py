"""The operating system: processes, the state directory, the service manager, signals, calls that may hang."""
