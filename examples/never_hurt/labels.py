"""What names and numbers are called in tables and figures."""

from examples.never_hurt import images

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
    "spd": "SPD",
    "ftp": "FTP",
    "auto_lambda": "Auto-λ, first order",
    "early_stopping": "early stopping",
    "wise_ft": "WiSE-FT, share chosen",
    "wise_ft_half": "WiSE-FT, half",
    "lp_ft": "LP-FT",
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
    "held_out_global": "held out, gate",
    "held_out_0.5": "held out, gate, average 0.5",
    "held_out_0.99": "held out, gate, average 0.99",
    "held_out_layer": "held out, gate, by layer",
    "held_out_returned": "held out, gate, returned at half",
    "held_out_project": "held out, projection",
    "held_out_current": "held out, gate, current bound",
    "held_out_unbounded": "held out, gate, no bound",
    "trial_runs": "trial runs, bound by the running maximum",
    "trial_runs_2": "trial runs, twice that bound",
    "running_bound": "bound by the running maximum alone",
    "running_bound_2": "twice that bound",
    "running_bound_4": "four times that bound",
    "l2_sp": "L2-SP",
    "distillation": "distillation",
    "feature_distillation": "feature distillation",
    "attention_transfer": "attention transfer",
    "delta": "DELTA",
    "batch_spectral_shrinkage": "BSS",
    "co_tuning": "Co-Tuning",
    "tinyimagenet": "Tiny-ImageNet",
    "gtsrb": "GTSRB",
    "medmnist": "MedNIST",
    "random_labels_imagenette": "Imagenette, random labels",
    "random_weights": "random weights",
    "cifar10_resnet20.safetensors": "CIFAR-10 (public weights)",
    "cifar10_resnet56.safetensors": "CIFAR-10 (public ResNet-56)",
    "caltech101": "Caltech-101",
    "cifar10": "CIFAR-10 (JPEG)",
    "scene15": "15-Scenes",
    "flowers17": "Flowers-17",
    "dtd10": "DTD-10",
}


def label(value: object) -> str:
    """Names a source, a target, a regularizer, a rule or, if it is a number, a strength."""
    if isinstance(value, float):
        return f"λ × {value:g}"
    return ", ".join(map(_part, str(value).split(", ")))


def _part(value: str) -> str:
    folder, n_classes, noise = images.parsed(value)
    texts = [LABELS.get(folder, folder.replace("_", " "))]
    if n_classes:
        texts.append(f"{n_classes} classes")
    if noise:
        texts.append(f"{noise:.0%} wrong labels")
    return ", ".join(texts)


def points(value: float) -> str:
    """Formats percentage points, with a minus sign instead of a hyphen."""
    return f"{value:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")
