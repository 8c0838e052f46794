"""Triton where it is installed; elsewhere (macOS, Windows) names that let the kernels' files be imported.

    from tokenkit.kernels.language import tl, triton

Without Triton no kernel can be launched: `launch.runs_triton` says no, and every operation takes its lines of
torch, on any device.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Constant:
        """A number that a kernel is compiled with; torch's lines read its value."""

        def __init__(self, value: float) -> None:
            self.value = value

    class _Language:
        """What a kernel's file reads while it is imported: its annotations and constants."""

        constexpr = _Constant

    class _Triton:
        """What the files read besides: the decorator, and arithmetic of launchers."""

        jit = staticmethod(lambda kernel: kernel)

        @staticmethod
        def cdiv(numerator: int, divisor: int) -> int:
            return -(-numerator // divisor)

        @staticmethod
        def next_power_of_2(size: int) -> int:
            return 1 << (size - 1).bit_length()

    triton, tl = _Triton(), _Language()
    HAS_TRITON = False
else:
    HAS_TRITON = True
