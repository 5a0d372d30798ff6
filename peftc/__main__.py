"""`python -m peftc`."""

from peftc.cli import main

main()
