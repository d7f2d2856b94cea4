"""``python -m visper.cli``: the same command line."""

from visper.cli import main

if __name__ == "__main__":
    main()
