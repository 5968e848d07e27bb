"""Which leaves have a pre-trained value: by pattern, by label, and what is said otherwise."""

import jax
import numpy as np
import pytest
from helpers import random_tree

from dtnh_jax import regularizers

PARAMS = random_tree(
    0,
    shapes={
        "conv": {"kernel": (3, 4), "bias": (4,)},
        "norm": {"scale": (4,), "bias": (4,)},
        "head": {"kernel": (4, 2), "bias": (2,)},
    },
)
SOURCE = random_tree(
    1,
    shapes={
        "conv": {"kernel": (3, 4), "bias": (4,)},
        "norm": {"scale": (4,), "bias": (4,)},
        "head": {"kernel": (4, 10), "bias": (10,)},
    },
)


def test_patterns():
    match = regularizers.match_pretrained(
        PARAMS, SOURCE, new="head", excluded=["*/bias", "norm/scale"]
    )
    assert match.report == (
        ("conv/kernel",),
        ("head/kernel",),
        ("conv/bias", "head/bias", "norm/bias", "norm/scale"),
        ("head/bias", "head/kernel"),
    )
    assert match.pretrained["head"] == {"kernel": None, "bias": None}
    assert match.pretrained["conv"]["kernel"] is SOURCE["conv"]["kernel"]
    assert match.mask == {
        "conv": {"kernel": True, "bias": False},
        "norm": {"scale": False, "bias": False},
        "head": {"kernel": True, "bias": False},
    }
    value = regularizers.l2_sp(PARAMS, match.pretrained, beta=0.5, mask=match.mask)
    difference = np.float64(PARAMS["conv"]["kernel"]) - SOURCE["conv"]["kernel"]
    wanted = np.sum(difference**2) / 2 + np.sum(np.float64(PARAMS["head"]["kernel"]) ** 2) / 4
    np.testing.assert_allclose(value, wanted, rtol=1e-6)


def test_labels_say_the_same():
    labels = {
        "conv": {"kernel": "shared", "bias": "excluded"},
        "norm": "excluded",
        "head": "new",
    }
    by_label = regularizers.match_pretrained(PARAMS, SOURCE, labels=labels)
    by_pattern = regularizers.match_pretrained(
        PARAMS, SOURCE, new="head/*", excluded=("conv/bias", "norm/*")
    )
    assert by_label.report == by_pattern.report
    assert jax.tree.structure(by_label) == jax.tree.structure(by_pattern)
    assert by_label.mask == by_pattern.mask


def test_report_is_readable():
    text = str(regularizers.match_pretrained(PARAMS, SOURCE, new="head").report)
    lines = text.splitlines()
    assert lines[0] == "4 shared, 2 new, 0 excluded, 2 unused"
    assert "shared    norm/scale" in lines
    assert "unused    head/kernel" in lines


def test_excluded_needs_no_counterpart_and_old_heads_may_have_other_names():
    source = {"conv": SOURCE["conv"], "fc": SOURCE["head"]}
    match = regularizers.match_pretrained(PARAMS, source, new="head", excluded=("norm", "fc"))
    assert match.report.unused == ("fc/bias", "fc/kernel")
    assert match.pretrained["norm"] == {"scale": None, "bias": None}
    assert regularizers.l2_sp_gradient(PARAMS, match.pretrained, mask=match.mask)["norm"] == {
        "scale": None,
        "bias": None,
    }


def test_error_lists_everything():
    source = {
        "conv": {"kernel": np.ones((3, 5), np.float32), "bias": SOURCE["conv"]["bias"]},
        "fc": SOURCE["head"],
        "norm": {"scale": SOURCE["norm"]["scale"]},
    }
    with pytest.raises(ValueError, match="pretrained does not match params") as caught:
        regularizers.match_pretrained(PARAMS, source, new="haed/*")
    text = str(caught.value)
    assert "without a pre-trained value: 'head/bias', 'head/kernel', 'norm/bias'\n" in text
    assert "only in pretrained: 'fc/bias', 'fc/kernel'\n" in text
    assert "with another shape in pretrained: 'conv/kernel': (3, 5) for (3, 4)\n" in text
    assert "patterns that match no leaf: 'haed/*'\n" in text
    assert "new=" in text
    assert "excluded=" in text


def test_bad_labels():
    with pytest.raises(
        ValueError, match=r"'shared', 'new' or 'excluded'; got 'old' at 'conv/bias'"
    ):
        regularizers.match_pretrained(
            PARAMS, SOURCE, labels={"conv": "old", "norm": "shared", "head": "new"}
        )
    with pytest.raises(ValueError, match=r"patterns, new= and excluded=, or labels="):
        regularizers.match_pretrained(PARAMS, SOURCE, new="head", labels={})


def test_flax_state_and_plain_dict():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    source = {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(9, np.float32)}
    match = regularizers.match_pretrained(params, source, new="bias")
    assert match.report.shared == ("kernel",)
    grads = regularizers.l2_sp_gradient(params, match.pretrained, mask=match.mask)
    np.testing.assert_allclose(grads["kernel"].get_value(), params["kernel"].get_value() - 1)
    assert jax.tree.leaves(grads["bias"]) == []
