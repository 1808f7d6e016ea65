"""`python -m launcher`: the console script where it isn't on PATH."""

from launcher.cli.main import main

if __name__ == "__main__":
    main()
