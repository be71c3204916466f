"""The models of a worker: their sources, the cache on disk, and those loaded within a memory budget."""
