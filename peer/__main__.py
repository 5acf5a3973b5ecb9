"""`petal-serve`, and `python -m petal.peer`."""

from ..protocol.program import die_quietly_of_signals


def main() -> None:
    die_quietly_of_signals()
    from .cli import main

    main()


if __name__ == "__main__":
    main()
