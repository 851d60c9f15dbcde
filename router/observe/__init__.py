"""What happened, told: the event bus, metrics, statistics of requests, logs, traces."""
