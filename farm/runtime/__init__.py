"""What every process needs: stop signals, back-off, polling, parallel fetching, atomic files, child processes, metrics."""
