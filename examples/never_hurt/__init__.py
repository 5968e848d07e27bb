"""Does regularized transfer ever hurt? A grid of sources, targets, regularizers, rules, weights."""
