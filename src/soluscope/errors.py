"""The exceptions that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. One line: what came, what was wanted, which knob to turn."""


class Stopped(UserError):
    """A run was stopped by what is not its own: a full disk, a lost machine. The same command goes on."""
