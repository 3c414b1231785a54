"""``python -m lorasurgery``."""

from lorasurgery.cli.app import main

if __name__ == "__main__":
    main()
