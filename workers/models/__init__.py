"""Models: from where they lie to loaded and pinned, within a memory budget."""
