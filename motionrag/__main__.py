"""`python -m motionrag` is the same as the command `motionrag`."""

from motionrag.cli import main

main()
