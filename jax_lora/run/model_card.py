"""The model card of what convert.py sends to the hub: data, recipe, scores, trainable share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from jax_lora.config import RunConfig, flatten
from jax_lora.files import read_json, write_text
from jax_lora.run import folder as run_folder
from jax_lora.weights import origin, peft

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Keys that say nothing of how the model came about.
_LEFT_OUT = ("model", "mesh.", "eval.", "data.path", "data.validation_path", "data.test_path")


def write_card(written: Path, name: str, base: str | None, adapter: str | None) -> None:
    """Write README.md into a folder.

    Args:
      written: the folder of a model or an adapter, with its `jax_lora.json`.
      name: of the repository.
      base: name or path of the base.
      adapter: the folder of the adapter, or the run, that it comes from.
    """
    write_text(written / "README.md", card(written, name, base, adapter))


def card(written: Path, name: str, base: str | None, adapter: str | None) -> str:
    """The text of a card, see `write_card`."""
    is_adapter = (written / "adapter_config.json").is_file()
    run = peft.run_of(adapter) if adapter else None
    if run is not None and not (run / "config.json").is_file():
        run = None
    config, saved = run_folder.read_saved(run) if run is not None else (None, {})
    base = base or "unknown"
    digest = str(origin.read(written).get("base_digest", "unknown"))
    # Other machines do not have the folder of a path.
    shown = base if _is_hub_id(base) else Path(base).name
    front = {"base_model": base if _is_hub_id(base) else None, "license": licence(base)}
    front |= {"library_name": "peft" if is_adapter else "transformers"}
    if config is not None and _is_hub_id(config.data.path):
        front["datasets"] = f"[{config.data.path}]"
    lines = ["---", *(f"{key}: {text}" for key, text in front.items() if text)]
    lines += ["tags: [jax-lora, lora]" if adapter else "tags: [jax-lora]", "---", ""]
    kind = "A LoRA adapter of" if is_adapter else "A model made from"
    lines += [f"# {name.split('/')[-1]}", "", f"{kind} {shown} (digest `{digest[:12]}`),"]
    lines += ["written by `convert.py` of jax_lora.", ""]
    if run is not None and config is not None:
        lines += _run_sections(run, config, saved)
    return "\n".join(lines)


def licence(base: str) -> str | None:
    """The licence that the model card in a base's folder names."""
    path = Path(base) / "README.md"
    if not path.is_file():
        return None
    text = path.read_text("utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*['\"]?([\w.-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _run_sections(run: Path, config: RunConfig, saved: Mapping[str, object]) -> list[str]:
    data = config.data.path if _is_hub_id(config.data.path) else Path(config.data.path).name
    lines = ["## Data", "", f"{data} (digest `{str(saved['data_fingerprint'])[:12]}`), ", ""]
    lines[2] += f"template `{config.data.template}`."
    if (run / "parameters.json").is_file():
        counts = read_json(run / "parameters.json", dict)
        lines += ["## Trainable parameters", ""]
        lines += [
            f"{counts['trainable']:,} of {counts['trainable'] + counts['frozen']:,}, "
            f"{counts['trainable_percent']:.3f}%.",
            "",
        ]
    lines += ["## Recipe", "", f"{saved.get('steps', '?')} steps. Keys of `jax_lora.RunConfig`"]
    lines[-1] += " that differ from its defaults:"
    default = dict(flatten(RunConfig().to_dict()))
    lines += ["", "| key | value |", "|---|---|"]
    for key, value in flatten(config.to_dict()):
        if value != default[key] and not key.startswith(_LEFT_OUT):
            lines.append(f"| {key} | `{value}` |")
    return [*lines, "", *_scores(run, config)]


def _scores(run: Path, config: RunConfig) -> list[str]:
    lines: list[str] = []
    for path in sorted((run / "eval").glob("*/scores.json")):
        scores, sets = read_json(path, dict), path.parent.name
        command = f"python eval.py --workdir={run.name} --sets={sets}"
        examples = sum(task["examples"] for task in scores["tasks"].values())
        lines += [f"`{command}` ({examples} examples, percent):", ""]
        lines += ["| metric | score |", "|---|---|"]
        for name in config.eval.metrics:
            if name in scores["metrics"]:
                lines.append(f"| {name} | {scores['metrics'][name]:.2f} |")
        lines.append("")
    return ["## Scores", "", *lines] if lines else []
