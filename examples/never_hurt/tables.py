"""Every table, as rows of text whose first is the head."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from examples.never_hurt import analysis
from examples.never_hurt.analysis import WEIGHTED_SUM, Estimate, Interval, Setting, Study
from examples.never_hurt.grids import KINDS
from examples.never_hurt.sources import RANDOM_WEIGHTS

Rows = list[list[str]]

LABELS = {
    "weighted_sum": "weighted sum",
    "dtnh_global": "DTNH, the paper's (global)",
    "dtnh_layer": "DTNH, the paper's (layer)",
    "gradient_cosine": "gradient cosine",
    "dynamic_barrier": "dynamic barrier",
    "bloop": "BLOOP",
    "pcgrad": "PCGrad",
    "agem": "A-GEM",
    "mgda": "MGDA",
    "imtl_g": "IMTL-G",
    "upgrad": "UPGrad",
    "cagrad": "CAGrad",
    "config": "ConFIG",
    "gate": "gate (layer)",
    "bounded_dtnh": "bounded DTNH",
    "gate_bounded": "gate, bound 1",
    "gate_bounded_0.3": "gate, bound 0.3",
    "project_bounded": "projection, bound 1",
    "cosine_bounded": "cosine, bound 1",
    "element_bounded": "gate by number, bound 1",
    "keep_bounded": "bound 1 alone",
    "average_gate_bounded": "gate against an average (0.99), bound 1",
    "momenta_gate": "momenta: gate, no bound",
    "momenta_gate_0.3": "momenta: gate, bound 0.3",
    "momenta_gate_2": "momenta: gate, bound 2",
    "momenta_project": "momenta: projection, bound 1",
    "momenta_cosine": "momenta: cosine, bound 1",
    "momenta_keep": "momenta: bound 1 alone",
    "momenta_global": "momenta: gate of all layers as one, bound 1",
    "momenta_element": "momenta: gate by number, bound 1",
    "placebo": "placebo: the preset on noise",
    "l2_sp": "L2-SP",
    "distillation": "distillation",
    "feature_distillation": "feature distillation",
    "attention_transfer": "attention transfer",
    "delta": "DELTA",
    "batch_spectral_shrinkage": "BSS",
    "tinyimagenet": "Tiny-ImageNet",
    "gtsrb": "GTSRB",
    "medmnist": "MedNIST",
    "random_labels_imagenette": "Imagenette, random labels",
    "random_weights": "random weights",
    "cifar10_resnet20.safetensors": "CIFAR-10 (public weights)",
    "caltech101": "Caltech-101",
    "cifar10": "CIFAR-10 (JPEG)",
    "scene15": "15-Scenes",
    "flowers17": "Flowers-17",
    "dtd10": "DTD-10",
}


def label(name: str) -> str:
    """What a name is called in tables and figures."""
    return LABELS.get(name, name.replace("_", " "))


def points(value: float) -> str:
    """Percentage points, with a real minus."""
    return f"{value:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def estimate(value: Estimate) -> str:
    """A mean and its interval."""
    return f"{points(value.mean)} ± {value.half_width:.1f}"


def interval(value: Interval) -> str:
    """A mean and its interval."""
    return f"{points(value.mean)} [{points(value.low)}, {points(value.high)}]"


def short(setting: Setting) -> str:
    """A setting in a cell of a table."""
    where = f"{label(setting.source)} → {label(setting.target)}"
    return f"{where}, {label(setting.regularizer)} × {setting.strength:g}"


def plain(study: Study) -> Rows:
    """Accuracy of plain fine-tuning, mean and standard deviation over seeds."""
    sources = list(dict.fromkeys(pair.source for pair in study.plain))
    targets = list(dict.fromkeys(pair.target for pair in study.plain))
    rows = [["source", "kind", *map(label, targets)]]
    for source in sources:
        row = [label(source), KINDS[source]]
        for target in targets:
            values = [*study.plain[analysis.Pair(source, target)].values()]
            row.append(f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}")
        rows.append(row)
    return rows


def verdicts(study: Study, against: Literal["plain", "the sum", "scratch"] = "plain") -> Rows:
    """For each rule how often it falls below plain fine-tuning, or below something else."""
    difference = {
        "plain": study.against_plain,
        "the sum": study.against_sum,
        "scratch": study.against_scratch,
    }[against]
    rows = [["rule", "settings", "mean", f"below {against}", "at once", "above", "worst setting"]]
    for rule in study.rules:
        if against == "the sum" and rule == WEIGHTED_SUM:
            continue
        settings = study.settings(rule=rule)
        if against == "scratch":
            settings = [each for each in settings if each.source != RANDOM_WEIGHTS]
        found = analysis.verdict(settings, difference)
        rows.append(
            [
                label(rule),
                str(found.n_settings),
                points(found.mean),
                f"{found.n_below} ({found.by_chance:.1f})",
                str(found.n_below_at_once),
                f"{found.n_above} ({found.by_chance:.1f})",
                f"{estimate(found.worst_estimate)}: {short(found.worst)}",
            ]
        )
    return rows


def settings(study: Study) -> Rows:
    """Each setting by itself."""
    estimated = analysis.estimates([*study.accuracy], study.against_plain)
    rows = [["setting", *map(label, study.rules)]]
    for each in dict.fromkeys(setting._replace(rule="") for setting in study.accuracy):
        of_rules = (each._replace(rule=rule) for rule in study.rules)
        rows.append([short(each), *(estimate(estimated[setting]) for setting in of_rules)])
    return rows


def by_strength(study: Study, **wanted: object) -> Rows:
    """For each rule and strength the mean over sources and targets, and its interval."""
    rows = [["rule", *(f"λ × {strength:g}" for strength in study.strengths)]]
    for rule in study.rules:
        row = [label(rule)]
        for strength in study.strengths:
            settings = study.settings(rule=rule, strength=strength, **wanted)
            row.append(_mean_of(settings, study.against_plain))
        rows.append(row)
    return rows


def worst_by_pair(study: Study, rules: Sequence[str]) -> Rows:
    """For each source and target the worst setting over strengths and regularizers, by rule."""
    rows = [["source", "target", *map(label, rules)]]
    for pair in study.plain:
        row = [label(pair.source), label(pair.target)]
        for rule in rules:
            settings = study.settings(source=pair.source, target=pair.target, rule=rule)
            row.append(points(min(float(study.against_plain(each).mean()) for each in settings)))
        rows.append(row)
    return rows


def against_sum(study: Study) -> Rows:
    """For each rule and strength: wins, ties and losses against the weighted sum."""
    rows = [["rule", *(f"λ × {strength:g}" for strength in study.strengths), "all"]]
    for rule in study.rules:
        if rule == WEIGHTED_SUM:
            continue
        row = [label(rule)]
        total = np.zeros(3, int)
        for strength in study.strengths:
            counts = analysis.win_tie_loss(study.settings(rule=rule, strength=strength), study)
            total += counts
            row.append(" / ".join(map(str, counts)))
        rows.append([*row, " / ".join(map(str, total.tolist()))])
    return rows


def gains(study: Study) -> Rows:
    """What each rule gains at the strength that validation images choose."""
    head = ["rule"]
    head += [f"{label(each)}: gain" for each in study.regularizers]
    rows = [[*head, "all: gain", "share of the weighted sum's"]]
    for rule in study.rules:
        best = analysis.best_gains(study, rule)
        row = [label(rule)]
        for regularizer in study.regularizers:
            of_it = [[gain.at_best] for (_, name), gain in best.items() if name == regularizer]
            row.append(interval(analysis.bootstrap_mean(of_it)))
        groups: dict[analysis.Pair, list[np.ndarray]] = {}
        for (pair, _), gain in best.items():
            groups.setdefault(pair, []).append(gain.at_best)
        row.append(interval(analysis.bootstrap_mean([*groups.values()])))
        if rule == WEIGHTED_SUM:
            row.append("")
        else:
            kept = analysis.kept_gain(study, rule)
            row.append(f"{kept.mean:.2f} [{kept.low:.2f}, {kept.high:.2f}]")
        rows.append(row)
    return rows


def best_by_pair(study: Study, rules: Sequence[str]) -> Rows:
    """The gain at the best strength, pair by pair."""
    best: Mapping = {rule: analysis.best_gains(study, rule) for rule in rules}
    rows = [["source", "target", "regularizer", *map(label, rules)]]
    for pair, regularizer in best[rules[0]]:
        row = [label(pair.source), label(pair.target), label(regularizer)]
        for rule in rules:
            gain = best[rule][pair, regularizer]
            row.append(f"{points(float(gain.at_best.mean()))} (λ × {gain.strength:g})")
        rows.append(row)
    return rows


def by_rule(study: Study) -> Rows:
    """For each rule and regularizer the mean over pairs and strengths, and the worst setting."""
    head = [f"{label(name)}: {what}" for name in study.regularizers for what in ("mean", "worst")]
    rows = [["rule", *head]]
    for rule in study.rules:
        row = [label(rule)]
        for regularizer in study.regularizers:
            settings = study.settings(regularizer=regularizer, rule=rule)
            estimated = analysis.estimates(settings, study.against_plain)
            row.append(points(float(np.mean([each.mean for each in estimated.values()]))))
            row.append(points(min(each.mean for each in estimated.values())))
        rows.append(row)
    return rows


def by_regularizer(study: Study) -> Rows:
    """For each rule and regularizer the mean over pairs at each strength, and the worst setting."""
    rows = [["regularizer", "rule", *(f"λ × {x:g}" for x in study.strengths), "worst setting"]]
    for regularizer in study.regularizers:
        for rule in study.rules:
            of_rule = study.settings(regularizer=regularizer, rule=rule)
            if not of_rule:
                continue
            row = [label(regularizer), label(rule)]
            for strength in study.strengths:
                settings = [each for each in of_rule if each.strength == strength]
                row.append(_mean_of(settings, study.against_plain, digits_only=True))
            estimated = analysis.estimates(of_rule, study.against_plain)
            worst = min(of_rule, key=lambda each: estimated[each].mean)
            rows.append([*row, estimate(estimated[worst])])
    return rows


def _mean_of(
    settings: Sequence[Setting],
    difference: Callable[[Setting], np.ndarray],
    digits_only: bool = False,
) -> str:
    if not settings:
        return ""
    if digits_only:
        return points(float(np.mean([difference(each).mean() for each in settings])))
    return interval(analysis.bootstrap_mean(analysis.by_pair(settings, difference)))


def as_latex(rows: Rows) -> str:
    """A table for a paper, in booktabs."""

    def line(row: Sequence[str]) -> str:
        return " & ".join(_latex_text(cell) for cell in row) + r" \\"

    head, *body = rows
    columns = "l" + "r" * (len(head) - 1)
    parts = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(head), r"\midrule"]
    return "\n".join([*parts, *map(line, body), r"\bottomrule", r"\end{tabular}", ""])


_LATEX = {
    "&": r"\&", "%": r"\%", "_": r"\_", "−": "$-$", "±": r"$\pm$", "→": r"$\to$",
    "λ": r"$\lambda$", "×": r"$\times$",
}  # fmt: skip


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
