"""The exceptions with messages for the user."""

from __future__ import annotations


class UserError(Exception):
    """A problem that the user can fix.

    The message is one line with the bad input, the wanted input and the setting to change.
    """


class Diverged(UserError):
    """A loss or a gradient left the range in which training makes sense."""


class Stopped(UserError):
    """An external cause stopped a run, such as a full disk or a lost machine. The same command resumes the run."""
