"""``python -m losa``."""

from losa.cli.app import main

main()
