"""What all of Petal's own errors have in common."""


class PetalError(Exception):
    """Something went wrong in a way that Petal knows; the message is a sentence that says what, and what to do."""
