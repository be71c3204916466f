"""Process basics: stop signals, back-off, polling, parallel fetching, files, child processes, metrics."""
