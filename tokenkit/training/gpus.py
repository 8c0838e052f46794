"""What makers publish of their GPUs; for calculations, not measured here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU, in machines of eight."""

    memory_gib: int
    tflops: float
    """Dense, of bfloat16."""
    memory_bandwidth: float
    """GB/s."""
    link: float
    """GB/s that it receives from another of its machine."""
    network: float = 50.0
    """GB/s from another machine: 400 Gbit/s for each GPU."""

    def link_of(self, ranks: int) -> float:
        """Return the GB/s at which `ranks` GPUs gather: the slowest link of their ring."""
        return self.link if ranks <= IN_ONE_MACHINE else min(self.link, self.network)


IN_ONE_MACHINE = 8

GPUS = {
    "A10": Gpu(memory_gib=24, tflops=125, memory_bandwidth=600, link=32, network=12.5),
    "L4": Gpu(memory_gib=24, tflops=121, memory_bandwidth=300, link=32, network=12.5),
    "L40S": Gpu(memory_gib=48, tflops=362, memory_bandwidth=864, link=32, network=25),
    "RTX4090": Gpu(memory_gib=24, tflops=165, memory_bandwidth=1008, link=32, network=12.5),
    "A100-40GB": Gpu(memory_gib=40, tflops=312, memory_bandwidth=1555, link=300, network=25),
    "A100-80GB": Gpu(memory_gib=80, tflops=312, memory_bandwidth=2039, link=300, network=25),
    "H100": Gpu(memory_gib=80, tflops=989, memory_bandwidth=3350, link=450),
    "H200": Gpu(memory_gib=141, tflops=989, memory_bandwidth=4800, link=450),
    "B200": Gpu(memory_gib=180, tflops=2250, memory_bandwidth=8000, link=900),
}
