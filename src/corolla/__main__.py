"""`python -m corolla` is `corolla`."""

from corolla.cli.main import main

main()
