"""The one exception that is meant for a person: what went wrong, where, and what to do."""


class UserError(Exception):
    """A mistake that its reader can mend. Commands print its text as one paragraph and exit with code 2."""
