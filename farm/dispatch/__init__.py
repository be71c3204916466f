"""The dispatcher: from SQL to Redis and back, and what is done for batches that have ended."""
