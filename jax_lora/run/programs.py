"""What a process that opens many runs does with the programs that it compiled."""

from __future__ import annotations

import logging
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

# Of the 65,530 memory maps that Linux gives a process, by default. XLA needs some per program on a
# CPU, about 5,000 for training and scoring one rank of SmolLM2, and dies where it gets no more.
MOST_MAPS = 20_000


def forget_if_many() -> None:
    """Let go of all compiled programs if this process has more than `MOST_MAPS` memory maps.

    jax keeps them for as long as the process runs. What is used again is compiled again, or read
    from jax's compilation cache. Where there is no /proc, nothing happens.
    """
    maps = Path("/proc/self/maps")
    if maps.is_file() and (found := maps.read_bytes().count(b"\n")) > MOST_MAPS:
        logger.info("%d memory maps: letting go of compiled programs", found)
        jax.clear_caches()
