"""What losa logged during a test."""

from __future__ import annotations


def said(caplog):
    """What losa warned of."""
    return [record.message for record in caplog.records if record.name == "losa" and record.levelname == "WARNING"]
