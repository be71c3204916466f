"""`python -m farm`: the same as the command `farm`."""

from farm.cli.main import main

main()
