"""The error of every kernel that meets NaN or infinity."""


class NotFiniteError(ValueError):
    """A tensor that goes into a product holds NaN or infinity: the model diverged, or never was whole."""

    exit_code = 70
