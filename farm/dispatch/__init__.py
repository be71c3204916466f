"""The dispatcher: moves jobs between SQL and Redis, writes manifests, copies pictures, and deletes old batches."""
