"""``python -m losa`` and ``accelerate launch -m losa``."""

from losa.cli import main

main()
