"""What every process of the farm needs to run: stop signals, back-off, polling, child processes, a metrics server."""
