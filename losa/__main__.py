"""``python -m losa`` and ``accelerate launch -m losa``."""

from losa.cli.app import main

main()
