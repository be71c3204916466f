"""The worker around its engine: leases, heartbeat, the render of a job, metrics, supervision."""
