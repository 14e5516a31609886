"""``python -m benchmarks NAME ...`` runs ``main(argv)`` of benchmarks/NAME.py."""

import ast
import importlib
import sys
import textwrap
from pathlib import Path

EXAMPLES = """examples:
  python -m benchmarks sparse_linear --quick                 a table on the screen, in seconds
  python -m benchmarks sparse_linear --json NEW.json         and as a file, with machine, commit and date
  python -m benchmarks compare OLD.json NEW.json --limit 20  how much slower each timing became, worst first
  python -m benchmarks sparse_linear --help                  what its fields mean, and its options"""


def modules() -> dict[str, str]:
    """First sentence of each benchmark's docstring, by name; read without importing them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[path.stem] = " ".join(doc.partition("\n\n")[0].split()).rstrip(".")
    return found


def usage() -> str:
    subjects = {name: sentence.partition(": ")[0] for name, sentence in modules().items()}
    lines = (f"  {name:<14} {textwrap.shorten(subject, 100)}" for name, subject in subjects.items())
    return "\n".join(["usage: python -m benchmarks NAME [options]", "", *lines, "", EXAMPLES])


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in modules():
        print(usage() + (f"\n\nbenchmarks: no benchmark {name!r}" if name else ""), file=sys.stderr)
        return 2
    return importlib.import_module(f"benchmarks.{name}").main(sys.argv[2:]) or 0


if __name__ == "__main__":
    sys.exit(main())
