"""Where results go: a JSON file that is complete at any moment, and its tables in Markdown."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft")
TITLES = {
    "products": "What a plain matrix product reaches here",
    "step": "A training step on identical batches",
    "epoch": "An epoch of the task mix, padding paid for",
    "startup": "A fresh process: start, compilation, memory",
    "curves": "How it grows",
    "decode": "Greedy decoding",
}


class Results:
    """Results by part, written to `results.json` and `results.md` of a folder as they come."""

    def __init__(self, folder: Path, command: Sequence[str], device: str):
        self.folder = folder
        self.found: dict[str, Any] = {
            "command": " ".join(command),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": device,
            "machine": machine(),
            "python": platform.python_version(),
            "versions": versions(),
            "revision": revision(),
        }

    def add(self, part: str, record: dict[str, Any]) -> None:
        """Append a record, on disk before this returns."""
        self.found.setdefault(part, []).append(record)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("results.json", json.dumps(self.found, indent=1) + "\n"),
            ("results.md", markdown(self.found)),
        ):
            fresh = self.folder / f"{name}.new"
            fresh.write_text(text, encoding="utf-8")
            os.replace(fresh, self.folder / name)


def versions() -> dict[str, str]:
    """Of the packages that decide the speed, those that are installed."""
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def machine() -> str:
    """The processor and its cores, in words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(": ")[2] if lines else name
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def revision() -> str | None:
    """The checkout's commit, with a + where files differ from it; None outside of git."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True)
        changed = subprocess.check_output([*git, "status", "--porcelain"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changed else "")


def markdown(found: dict[str, Any]) -> str:
    """All parts as tables: one column per key, in the order in which keys first occur."""
    lines = [f"`{found['command']}`", f"{found['date']}, revision {found['revision']}"]
    lines += [f"{found['device']}; {found['machine']}; Python {found['python']}"]
    lines += [", ".join(f"{name} {version}" for name, version in found["versions"].items())]
    text = "\n".join(f"- {line}" for line in lines) + "\n"
    for part, title in TITLES.items():
        if part in found:
            text += f"\n## {title}\n\n{table(found[part])}"
    return text


def table(records: Sequence[dict[str, Any]]) -> str:
    """Records as a Markdown table, nested ones as `side.key`, what all share in a line above it.

    Lists of single measurements stay in the JSON.
    """
    flat = [_flat(record) for record in records]
    keys = list(dict.fromkeys(key for record in flat for key in record))
    cells = {key: [_cell(key, record.get(key)) for record in flat] for key in keys}
    shared = [key for key in keys if len(flat) > 1 and len(set(cells[key])) == 1]
    keys = [key for key in keys if key not in shared]
    lines = [keys, ["---:"] * len(keys), *zip(*(cells[key] for key in keys), strict=True)]
    above = ", ".join(f"{key} {cells[key][0]}" for key in shared)
    return f"{above}\n\n" * bool(above) + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _flat(record: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{above}{key}.")
        elif not isinstance(value, list):
            found[above + key] = value
    return found


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "full" if key == "rank" else ""
    if key.endswith("bytes"):
        return f"{value / 1e9:.2f} GB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
