"""Model files and their sources: folders, other programs' caches, the hub, and creations of clients."""
