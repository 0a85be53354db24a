"""`python -m saefty`: the command line."""

from saefty.cli import main

if __name__ == "__main__":
    main()
