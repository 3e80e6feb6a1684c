"""What a study says to the paper's questions, in sentences with intervals, and the paper itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

from jax_lora.study import METRICS, TESTS, Frame, Study, paper_findings
from jax_lora.study.estimates import (
    FEWEST_TASKS,
    Estimate,
    contrasts,
    lead,
    signed,
    slope,
    verdict,
    yes_or_no,
)
from jax_lora.study.measure_findings import measure_findings
from jax_lora.study.sections import Finding
from jax_lora.study.set_findings import agreed, set_findings


def findings(
    study: Study,
    numbers: Frame,
    compared: Frame,
    *,
    seed: int = 0,
    chosen_on: Collection[str] = (),
) -> list[Finding]:
    """What a study says to the paper's questions, for and against.

    Args:
      study: checked rows and grid.
      numbers: `statistics.summary`.
      compared: `statistics.comparisons`.
      seed: of the bootstrap and the sign flips.
      chosen_on: see `set_findings`.
    """
    sets = study.sets
    found = [
        Finding(
            "Does more rank help on seen tasks?",
            [_rank_helps(study, s, seed) for s in sets],
            paper_findings.rank_helps(),
        ),
        Finding(
            "Do unseen tasks need capacity?",
            [_capacity(study, s, seed) for s in sets],
            paper_findings.capacity(),
        ),
        Finding(
            "Do out-of-options answers fall before accuracy rises?",
            [_form_first(study, s, seed) for s in sets],
            paper_findings.FORM_FIRST,
        ),
        Finding(
            "Does LoRA reach full fine-tuning?",
            [_reaches(study, compared, s, test) for test in TESTS for s in sets],
            paper_findings.reaches(),
        ),
    ]
    found += set_findings(study, seed, chosen_on)
    found += measure_findings(study)
    if numbers["exact_match_difference"].notna().any():
        found.append(Finding("How far from the paper?", _from_paper(numbers)))
    return found


def _ranks(study: Study, scores: Frame) -> dict[str, int]:
    """Rank by configuration of the paper's recipe, of those that have scores."""
    ranks = study.grid.drop_duplicates("config").set_index("config")["rank"]
    return {c: int(ranks[c]) for c in study.configs("lora", "") if c in scores}


def _rank_helps(study: Study, name: str, seed: int) -> str:
    parts, answers, count = [], {}, ""
    for metric, label in METRICS.items():
        scores = study.scores(name, "seen", metric)
        ranks = _ranks(study, scores)
        if len(ranks) < 2:
            return f"{name}: cannot be said, fewer than two ranks are there."
        configs = list(ranks)
        steps = {i: {b: 1, a: -1} for i, (a, b) in enumerate(pairwise(configs))}
        overall = {"change": {configs[-1]: 1, configs[0]: -1}, "slope": slope(ranks)}
        found = contrasts(scores, steps | overall, seed=seed)
        if "slope" not in found:
            return f"{name}: cannot be said, the ranks have no round in common."
        rises = sum(found[i].value > 0 for i in steps if i in found)
        parts.append(
            f"{label} {found['change'].points} from {configs[0]} to {configs[-1]}, "
            f"{found['slope'].points} per doubling, up in {rises} of {len(steps)} steps"
        )
        answers[label] = yes_or_no(found["slope"])
        if answers[label].startswith("no, equal"):  # little per doubling may be much in all
            answers[label] = yes_or_no(found["change"])
        count = found["slope"].count
    return f"{name}: {agreed(answers)}. {'; '.join(parts)} {count}."


def _capacity(study: Study, name: str, seed: int) -> str:
    estimates = {}
    for test in TESTS:
        scores = study.scores(name, test, "exact_match")
        ranks = _ranks(study, scores)
        if len(ranks) < 3:
            return f"{name}: cannot be said, fewer than three ranks are there."
        configs, middle = list(ranks), len(ranks) // 2
        low = slope({c: ranks[c] for c in configs[: middle + 1]})
        high = slope({c: ranks[c] for c in configs[middle:]})
        more = {c: high.get(c, 0.0) - low.get(c, 0.0) for c in configs}
        wanted = {"low": low, "high": high, "more": more, "all": slope(ranks)}
        estimates[test] = contrasts(scores, wanted, seed=seed)
        if len(estimates[test]) < len(wanted):
            return f"{name}: cannot be said, the ranks have no round in common."
    seen, unseen = estimates["seen"], estimates["unseen"]
    if verdict(unseen["all"]) != "higher":
        kinds = {"lower": "no, more rank harms", "too few tasks": "too few tasks to tell"}
        answer = kinds.get(verdict(unseen["all"]), "undecided whether more rank helps at all")
        answer += f" ({unseen['all'].points} per doubling)"
    else:
        kind = {"higher": "yes, the larger ranks bring more", "lower": "no, the smaller bring more"}
        answer = kind.get(verdict(unseen["more"]), "undecided whether the larger ranks bring more")
    return (
        f"{name}: {answer}. EM {unseen['low'].points} per doubling up to {configs[middle]}, "
        f"{unseen['high'].points} above; difference {unseen['more']}. On seen tasks "
        f"{seen['low'].points} and {seen['high'].points}."
    )


def _form_first(study: Study, name: str, seed: int) -> str:
    wanted = ("out_of_options", "exact_match", "majority_baseline", "top_answer_share")
    scores = {metric: study.scores(name, "unseen", metric, closed=True) for metric in wanted}
    ranks = _ranks(study, scores["out_of_options"])
    if len(ranks) < 3:
        return f"{name}: cannot be said, fewer than three ranks have closed-label tasks."
    configs = list(ranks)
    ends = {"change": {configs[-1]: 1, configs[0]: -1}}
    found = {
        metric: contrasts(table, {c: {c: 1} for c in [*configs, "full"]} | ends, seed=seed)
        for metric, table in scores.items()
    }
    out, right = found["out_of_options"], found["exact_match"]
    if "change" not in out:
        return f"{name}: cannot be said, the first and the last rank have no round in common."
    ahead = lead(scores["out_of_options"], scores["exact_match"], configs, seed=seed)
    if ahead is None:
        answer = "cannot be said, one of the two may not change, or a rank has no round in common"
    elif out["change"].value > 0 or right["change"].value < 0:
        answer = "no, out-of-options answers do not fall while accuracy rises"
    elif ahead.tasks < FEWEST_TASKS:
        answer = "too few tasks to tell"
    else:
        kind = "yes" if ahead.low > 0 else "no, after it" if ahead.high < 0 else "undecided"
        interval = f"[{signed(ahead.low)}, {signed(ahead.high)}]"
        answer = f"{kind}: they are ahead by {signed(ahead.value)} {interval} of the whole way"
        answer += f", half of it done by {_halfway(out, configs)} and {_halfway(right, configs)}"
    text = (
        f"{name}: {answer}. From {configs[0]} to {configs[-1]} out of options "
        f"{out['change'].points}, EM {right['change'].points} {out['change'].count}. "
    )
    planned = study.grid[study.grid["set"] == name].groupby("config").size()
    levels = []
    for c in (configs[0], configs[-1], "full"):
        if c in out:
            few = f" ({out[c].rounds} of {planned[c]} rounds)" * bool(out[c].rounds < planned[c])
            levels.append(
                f"{c}{few} {out[c].value:.1f}% out of options, EM {right[c].value:.1f}, most "
                f"frequent answer {found['top_answer_share'][c].value:.1f}%"
            )
    label = found["majority_baseline"][configs[0]].value
    return f"{text}Levels: {'; '.join(levels)}. Always the majority label: EM {label:.1f}."


def _reaches(study: Study, compared: Frame, name: str, test: str) -> str:
    there = compared[(compared["set"] == name) & (compared["test"] == test)]
    if there.empty:
        return f"{name}, {test}: cannot be said, LoRA and full fine-tuning have no round in common."
    parts, answers = [], {}
    for metric, label in METRICS.items():
        of_metric = there[there["metric"] == metric]
        answers[label] = _reached(dict(zip(of_metric["config"], of_metric["verdict"], strict=True)))
        by_verdict = of_metric.groupby("verdict", sort=False)["config"]
        groups = (
            f"{kind} at {', '.join(config.removeprefix('rank ') for config in configs)}"
            for kind, configs in by_verdict
        )
        parts.append(f"{label} {', '.join(groups)}")
    statements = there[there["metric"] == "exact_match"].set_index("config")["statement"]
    parts += [statements[c] for c in study.configs("lora", "") if c in statements][-1:]
    return f"{name}, {test}: {agreed(answers)}. {'; '.join(parts)}."


def _reached(verdicts: Mapping[str, str]) -> str:
    """Whether any of LoRA's models is as good as full fine-tuning."""
    if good := [c for c, v in verdicts.items() if v == "higher" or v.startswith("equal")]:
        return f"yes at {', '.join(good)}"
    if {*verdicts.values()} == {"too few tasks"}:
        return "too few tasks to tell"
    return "undecided" if "undecided" in verdicts.values() else "no"


def _from_paper(numbers: Frame) -> list[str]:
    lines = []
    known = numbers[numbers["exact_match_difference"].notna()]
    for test, group in known.groupby("test"):
        parts = []
        for metric, label in METRICS.items():
            full = group[group["method"] == "full"].set_index("set")[[metric, f"{metric}_paper"]]
            lora = group[group["method"] == "lora"].join(full.add_suffix("_full"), on="set")
            lora = lora.dropna(subset=f"{metric}_full")
            ours = lora[metric] >= lora[f"{metric}_full"]
            papers = lora[f"{metric}_paper"] >= lora[f"{metric}_paper_full"]
            parts.append(
                f"{label} {group[f'{metric}_difference'].abs().mean():.2f} points away on average, "
                f"{(ours == papers).sum()} of {len(lora)} orders of LoRA and full as in the paper"
            )
        lines.append(f"{test}: {'; '.join(parts)}.")
    return lines


def _halfway(curve: Mapping[str, Estimate], configs: Sequence[str]) -> str:
    start, end = (curve[configs[i]].value for i in (0, -1))
    return next(c for c in configs if (curve[c].value - start) / (end - start) >= 0.5)
