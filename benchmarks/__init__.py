"""How fast the farm is, measured beside what it is compared with."""
