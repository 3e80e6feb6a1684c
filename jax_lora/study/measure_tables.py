"""Tables of what cells are measured by, beside their answers."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from jax_lora.study import Frame, Study
from jax_lora.study.estimates import signed
from jax_lora.study.tables import MISSING, Table

_COLUMNS = {  # name → header and format
    "adapter_rank": ("adapter", "rank", ".0f"),
    "alpha": ("adapter", "α", ".4g"),
    "trainable": ("adapter", "parameters", ",.0f"),
    "reference_loss_seen": ("loss of references:", "seen", ".3f"),
    "reference_loss_unseen": ("loss of references:", "unseen", ".3f"),
    "text_loss": ("other text:", "loss", ".3f"),
    "forgetting": ("other text:", "forgetting", "signed"),
    "effective_rank": ("ΔW per matrix:", "effective rank", ".1f"),
    "intruder_dimensions": ("ΔW per matrix:", "intruders of 10", ".2f"),
}


def measures_table(study: Study, data: Frame, name_of_set: str) -> Table | None:
    """The measurements of the models of one set; the CSV has all sets and learning rates.

    Args:
      study: checked rows and grid.
      data: `statistics.measured`.
      name_of_set: what was trained on.

    Returns:
      None where nothing was measured.
    """
    shown = data[(data["set"] == name_of_set) & data["main"]].set_index("config")
    names = [name for name in _COLUMNS if shown[name].notna().any()]
    if not {*names} - {"trainable"}:
        return None
    found = shown.to_dict("index")
    rows = [
        [config, *(_value(found[config], name) for name in names)]
        for config in study.configs()
        if config in found
    ]
    caption = (
        f"What else was measured after training on {name_of_set}, {study.model}: means over "
        "rounds, ± the standard deviation. Losses are in nats per token: of the first reference "
        "of test examples under their prompts, and of a text that is no instruction, whose rise "
        "over the bare base is forgetting. Effective rank: the exponential of the entropy of the "
        "singular values' shares (Roy and Vetterli 2007); intruders: of the ten leading singular "
        "vectors of a trained matrix, those whose cosine with every one of the base's is below 0.5 "
        "(Shuttleworth et al. 2024); both are means over the matrices of the plain recipe's or the "
        "variant's targets."
    )
    columns = [("", "Model"), *(_COLUMNS[name][:2] for name in names)]
    return Table("measures", caption, columns, rows, data)


def capacity_table(study: Study, data: Frame) -> Table | None:
    """Memorized bits by rank and number of pairs; None of a study that is no memory probe."""
    known = data[data["main"] & data["memorized_bits"].notna()]
    if known.empty:
        return None
    sets = [name for name in study.sets if name in {*known["set"]}]
    found = known.set_index(["config", "set"]).to_dict("index")
    rows = []
    for config in study.configs():
        cells = [found.get((config, name)) for name in sets]
        most = max(
            (cell for cell in cells if cell), key=lambda c: c["memorized_bits"], default=None
        )
        if most is not None:
            per_parameter = most["memorized_bits"] / most["trainable"]
            values = [MISSING if cell is None else _value(cell, "memorized_bits") for cell in cells]
            rows.append([config, f"{most['trainable']:,.0f}", *values, f"{per_parameter:.2f}"])
    caption = (
        f"Bits of random pairs that a model has learned by heart, {study.model}: 16 bits per pair "
        "less the summed loss of the values in bits. Below zero: sure of wrong values. The last "
        "column is the largest number of bits per trained parameter."
    )
    columns = [("", "Model"), ("", "Parameters"), *(("bits:", name) for name in sets)]
    return Table("capacity", caption, [*columns, ("", "bits per parameter")], rows, known)


def _value(cell: Mapping, name: str) -> str:
    value, spread = cell[name], cell[f"{name}_std"]
    if pd.isna(value):
        return "" if name in ("adapter_rank", "alpha") and cell["rounds"] else MISSING
    form = ",.0f" if name == "memorized_bits" else _COLUMNS[name][2]
    text = signed(value) if form == "signed" else f"{value:{form}}"
    if pd.notna(spread) and name not in ("adapter_rank", "alpha", "trainable"):
        text += f" ± {spread:{'.2f' if form == 'signed' else form}}"
    if 0 < cell["rounds"] < cell["expected_rounds"]:
        text += f" ({cell['rounds']}/{cell['expected_rounds']})"
    return text
