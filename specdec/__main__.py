"""The program behind the ``specdec`` command and ``python -m specdec``.

It imports the command line within a function, so that Ctrl-C during the imports ends the program quietly, too.
"""

import atexit
import gc
import sys

# Imported modules are half a million objects that live as long as the process. Looking for garbage among them takes a
# tenth of the time of importing them, and more when the process ends.
COLLECT = 400_000, 50, 100


def main() -> None:
    gc.set_threshold(*COLLECT)
    atexit.register(gc.freeze)
    try:
        from specdec import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
