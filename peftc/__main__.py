"""`peftc`, and `python -m peftc`: the command line, interrupted in one line from its imports on."""

from peftc.interrupts import heard


def main() -> None:
    """The entry point."""
    with heard():
        from peftc.cli import main as run

        run()


if __name__ == "__main__":
    main()
