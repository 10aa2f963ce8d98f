"""The ``specdec`` command, and ``python -m specdec``: the imports of the command line may be interrupted, too."""

import sys


def main() -> None:
    try:
        from specdec import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
