"""What the first and the second reading of a full-size checkout cost: seconds and memory.

python -m benchmarks.data_scale                         a made-up one, beside ../shared/data
python -m benchmarks.data_scale --filler=500            the same with longer inputs, 1.7 GB
python -m benchmarks.data_scale --checkout=FOLDER       a real one; nothing is written to it

Each line is a separate program that does what train.py does before it encodes: it reads the
checkout and draws a set of round 0. Files are in the page cache.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from jax_lora.data.instructions import read_checkout
from jax_lora.data.tasksets import draw
from tests.data import full_scale

INDEX = Path(__file__).resolve().parents[2] / "shared" / "data" / "niv2_index.json"


def measure(checkout: Path, cache: Path, name: str, verify: bool = False) -> str:
    """Reads, and draws one set: seconds of each, and the most memory that the process held."""
    start, busy = time.perf_counter(), time.process_time()
    tasks = read_checkout(checkout, cache=cache, verify=verify)
    middle = time.perf_counter()
    count = len(draw(tasks, 0)[name].examples)
    end = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    return (
        f"read {middle - start:6.2f} s, draw {end - middle:6.2f} s, in all {end - start:6.2f} s "
        f"({time.process_time() - busy:.2f} s of CPU), {memory:4.0f} MB; {count} examples"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkout", type=Path)
    parser.add_argument("--filler", type=int, default=0, help="characters added to every input")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        checkout = flags.checkout or full_scale.write(
            Path(folder) / "full", INDEX, filler=flags.filler
        )
        size = sum(file.stat().st_size for file in (checkout / "tasks").glob("*.json"))
        print(f"{size / 1e6:.0f} MB of task files")
        for label, name, verify in (
            ("first, Tall", "Tall", False),
            ("second, Tall", "Tall", False),
            ("first, T100", "T100", False),
            ("first, unseen", "unseen", False),
            ("second, unseen", "unseen", False),
            ("verify, Tall", "Tall", True),
        ):
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as program:
                print(
                    f"{label:15}", program.submit(measure, checkout, cache, name, verify).result()
                )
        cached = sum(file.stat().st_size for file in cache.rglob("*.json"))
        print(f"{cached / 1e6:.1f} MB of cache")


if __name__ == "__main__":
    main()
