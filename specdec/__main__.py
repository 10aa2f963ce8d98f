"""``python -m specdec``: the same as the ``specdec`` command."""

from specdec.cli import main

main()
