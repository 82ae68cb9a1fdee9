"""What can be wrong with a request, apart from its own content; the texts are for the person who asked."""

from __future__ import annotations

from lit_ft.errors import UserError


class UnknownModelError(UserError):
    """A name that is not served; the text says what is."""


class UnavailableError(UserError):
    """The model is served, but not right now: try again soon."""


class EngineGoneError(UnavailableError):
    """The engine ended, or cannot be reached."""
