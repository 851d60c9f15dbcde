"""Memory of devices: the ledger, its manager, and measurements kept across restarts."""
