"""`python -m halfbyte` is the command line."""

from halfbyte.cli.main import main

main()
