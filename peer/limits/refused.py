"""What a client hears whom a peer does not serve now."""


class Refused(Exception):
    """No room; the message says what is free and when to try again. `final`: there never will be."""

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final
