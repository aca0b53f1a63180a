"""The `apiary` command: one file a command group, `console.py` for all output and errors."""

from apiary_client.cli.app import main

__all__ = ["main"]
