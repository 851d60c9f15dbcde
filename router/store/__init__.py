"""Model files and where they come from: folders, other programs' caches, the hub, what clients create."""
