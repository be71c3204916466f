"""SQL, the source of truth: the schema, the states of a job, and one class for each concern."""
