"""The one exception a user is meant to read."""


class ChassisError(Exception):
    """Bad input: one line that says what was wrong and what to do. The command prints it and exits with 1."""
