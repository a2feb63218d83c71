"""`python -m gpuckpt`."""

from gpuckpt.cli import main

if __name__ == "__main__":
    main()
