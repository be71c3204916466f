"""SQL, the truth: the schema, the states of a job, and one class for each concern that reads or writes them."""
