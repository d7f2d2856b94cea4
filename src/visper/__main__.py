"""``python -m visper``, the form that torchrun starts."""

from visper.cli import main

main()
