"""The dispatcher: it moves jobs from SQL to Redis and back, and writes, copies and deletes what batches leave."""
