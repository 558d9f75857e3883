"""The one error that a user, not a programmer, can cause."""


class InputError(ValueError):
    """Something the user named is missing or wrong; the message names it and the way out."""
