"""`python -m farm`: the same as the command `farm`."""

from farm.cli import main

main()
