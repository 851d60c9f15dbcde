"""The memory of devices: the ledger, the manager that fills it, and measurements that outlive a run."""
