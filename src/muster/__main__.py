"""`python -m muster`: how the elastic agent starts a rank, the same entry as the `muster` command."""

from muster.cli import main

if __name__ == "__main__":
    main()
