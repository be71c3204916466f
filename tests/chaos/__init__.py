"""The farm under fire: real processes and servers that are killed, frozen, cut off and slowed down while they work."""
