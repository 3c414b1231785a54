"""``python -m lorasurgery``, and the command of that name."""

from __future__ import annotations

from lorasurgery.cli.stopping import quiet


def main() -> None:
    """Run the command line, interrupts in good hands from here on."""
    quiet()
    from lorasurgery.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
