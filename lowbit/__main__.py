"""`python -m lowbit`: the command line."""

from .cli import main

main()
