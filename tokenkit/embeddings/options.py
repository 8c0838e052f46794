"""The initialisations of a new vocabulary, by name. Nothing here loads torch."""

from typing import Literal

MethodName = Literal["fvt", "mean", "overlap", "random_normal", "omp", "focus", "hypernet"]
