"""The distance of two models' sorted next-token distributions (ULD): `operation.py` has the mathematics.

operation   the operation, its derivative, the public functions
rows        the loops over rows and tiles;  tile: histograms in bins, kernels;  exact: the sort
"""

from tokenkit.kernels.sorted_distance.operation import error_bound, sorted_distance

__all__ = ["error_bound", "sorted_distance"]
