"""`python -m fcse.cli`."""

from fcse.cli import main

main()
