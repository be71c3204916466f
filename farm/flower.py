"""`python -m farm.flower`: Flower on the farm's broker. The command that charts and compose files start."""

from farm.queue.flower import main

if __name__ == "__main__":
    main()
