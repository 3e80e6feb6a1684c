"""Hardware to plan for: memory, arithmetic and bandwidth of one device, with their sources.

Bytes of a card are those in openxla/xla, target_config/specs; of a TPU, what its compiler allows.
A name is that of a device and, behind a dash, how many there are: `h200`, `a100-80gb-8`, `v5e-8`.
As in Google's names, the number of a v5p counts TensorCores, two per chip: v5p-8 is four chips.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from jax_lora.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
      platform: "cuda", "tpu" or "cpu".
      bytes: of memory, as the driver or the compiler reports it.
      tflops: dense bfloat16, 1e12 operations per second.
      bandwidth: of the memory, bytes per second; None where nobody measured it.
      source: of `tflops` and `bandwidth`.
      measured: TFLOP/s of a large bfloat16 product, where we measured it.
    """

    platform: str
    bytes: int
    tflops: float
    bandwidth: float | None
    source: str
    measured: float | None = None

    @property
    def usable(self) -> int:
        """Bytes that a program can have: the CUDA context and libraries take some of a card."""
        return int(self.bytes * (0.95 if self.platform == "cuda" else 1.0))

    @property
    def rate(self) -> float:
        """Operations per second to expect of large products at the very best."""
        return 1e12 * (self.measured or self.tflops)


@dataclass(frozen=True)
class Target:
    """Devices of a kind, `count` of them; None where its name gave no number."""

    kind: str
    device: Device
    count: int | None


def _machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


DEVICES = {
    "a100-40gb": Device(
        "cuda",
        42_331_013_120,
        312.0,
        1.555e12,
        "NVIDIA's A100 data sheet (2021, SXM 40 GB)",
    ),
    "a100-80gb": Device(
        "cuda",
        85_100_068_864,
        312.0,
        2.039e12,
        "NVIDIA's A100 data sheet (2021, SXM 80 GB)",
    ),
    "h100": Device(
        "cuda",
        84_942_979_072,
        989.4,
        3.35e12,
        "NVIDIA's H100 data sheet (2023, SXM, no sparsity)",
    ),
    "h200": Device(
        "cuda",
        151_397_597_184,
        989.4,
        4.8e12,
        "NVIDIA's H200 data sheet (2024, SXM, no sparsity)",
        measured=790.0,
    ),
    "rtx4090": Device(
        "cuda",
        25_393_692_672,  # of 24 GiB, what the driver leaves
        165.2,
        1.008e12,
        "NVIDIA's Ada white paper (2022, dense, float32 accumulation)",
    ),
    "v5e": Device(
        "tpu",
        16_911_433_728,  # 15.75 GiB
        197.0,
        8.19e11,
        "Google Cloud's page on TPU v5e",
    ),
    "v5p": Device(
        "tpu",
        102_803_439_616,  # 95.74 GiB
        459.0,
        2.765e12,
        "Google Cloud's page on TPU v5p",
    ),
    "cpu": Device(
        "cpu",
        _machine(),
        1.28,
        None,
        "benchmarks/cpu_products.py on two cores with AMX; other processors differ",
    ),
}
_CORES = {"v5p": 2}  # per chip; the name counts these


def target(name: str) -> Target:
    """The target of a name such as `a100-80gb`, `h200-8` or `v5e-8`.

    Raises:
      ConfigError: an unknown device, or a number that is no number of chips.
    """
    kind, count = name, None
    if name not in DEVICES:
        found = re.fullmatch(r"(.+)-(\d+)", name)
        kind, count = (found[1], int(found[2])) if found else (name, None)
    if kind not in DEVICES:
        raise ConfigError(
            f"--target: found {name!r}, expected one of {', '.join(DEVICES)}, "
            "with -N behind it for N devices"
        )
    cores = _CORES.get(kind, 1)
    if count is not None and (count < 1 or count % cores):
        raise ConfigError(
            f"--target: found {name!r}, expected a multiple of {cores} behind {kind}-"
        )
    return Target(kind, DEVICES[kind], count and count // cores)


def full_name(kind: str, count: int) -> str:
    """The name of a target of `count` devices of a kind."""
    return f"{kind}-{count * _CORES.get(kind, 1)}"
