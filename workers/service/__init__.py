"""A worker's life around its engine: leases, heartbeat, the render of one job, metrics, supervision."""
