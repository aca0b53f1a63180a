"""What a `BuzzCache` does not serve."""


class UnsupportedError(ValueError):
    """A model, or a way to use it, that a `BuzzCache` does not serve; the message says why and what to do."""
