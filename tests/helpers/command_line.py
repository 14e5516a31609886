"""Commands of the command line, run in this process."""

from __future__ import annotations


def invoke(*arguments):
    # Not every machine that runs tests has typer; there, tests without a command still run.
    from typer.testing import CliRunner

    from losa.cli.app import app

    return CliRunner().invoke(app, [str(a) for a in arguments])


def succeed(*arguments) -> str:
    """What a command that ends well writes to stdout."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr or result.exception
    return result.stdout


def fail(*arguments) -> str:
    """The sentence that a failing command ends with."""
    result = invoke(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output or result.exception
    # After what other libraries may have shown: progress bars, once their modules are loaded.
    message = result.stderr[result.stderr.rindex("losa: ") :]
    assert message.endswith("\n") and "Traceback" not in result.output
    return message
