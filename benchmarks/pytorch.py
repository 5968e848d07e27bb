"""The same computations in PyTorch, measured in the same run."""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import combination, machine, step, trees
from benchmarks.config import Regularizer, Sizes
from benchmarks.machine import Ceilings
from benchmarks.report import Row, Table
from benchmarks.timing import compare

TITLE = "PyTorch"
OURS = "dtnh leaf"
OUR_STEPS = (step.BASE, "dtnh layer")
SUM, PAIR = "weighted sum, one backward pass", "dtnh leaf, two backward passes"
TORCHJD = "TorchJD PCGrad"


class Packages(NamedTuple):
    """Optional packages."""

    torch: ModuleType
    torchvision: ModuleType | None
    torchjd: ModuleType | None


class Queued(NamedTuple):
    """A PyTorch result that ``jax.block_until_ready`` can wait for."""

    torch: ModuleType
    result: Any

    def block_until_ready(self) -> "Queued":
        """Waits until the device has finished."""
        if self.torch.cuda.is_available():
            self.torch.cuda.synchronize()
        return self


def run(sizes: Sizes, ceilings: Ceilings) -> Table:
    """Times the contestants; the table is empty if PyTorch is not installed."""
    del ceilings
    torch = _import("torch")
    if torch is None:
        return Table("torch", TITLE, "Not measured: `pip install torch torchvision torchjd`.", [])
    packages = Packages(torch, _import("torchvision.models"), _import("torchjd"))
    if (jax.default_backend() == "gpu") != torch.cuda.is_available():
        about = "Not measured: only one of JAX and PyTorch has GPU support. Install both with it."
        return Table("torch", TITLE, about, [])
    rows = []
    for name in sizes.trees:
        rows += combination_rows(name, packages, sizes)
    for architecture in sizes.architectures:
        for regularizer in sizes.regularizers:
            rows += step_rows(architecture, regularizer, packages, sizes)
    missing = [
        f"{name} is not installed" for name in ("torchvision", "torchjd") if not _import(name)
    ]
    return Table(
        "torch",
        TITLE,
        "Projection per tensor, with torch.autograd.grad called twice on one graph. Networks of "
        "torchvision, channels_last; on a GPU with torch.compile and autocast; threads: one or "
        "all, whichever was faster. " + "".join(f"{sentence}. " for sentence in missing),
        rows,
    )


def combination_rows(name: str, packages: Packages, sizes: Sizes) -> list[Row]:
    """Times the combination of two gradients of one tree."""
    torch = packages.torch
    shapes = trees.tree(name)
    inputs = combination.Inputs(*(trees.random_like(shapes, seed) for seed in range(4)))
    a, b = ([_tensor(torch, leaf) for leaf in jax.tree.leaves(tree)] for tree in inputs[:2])
    contestant = combination.contestants(all_rules=False)[OURS]
    program = combination.program(name, OURS)
    calls = {
        f"dtnh_jax, {OURS}": functools.partial(program.compiled, *contestant.arguments(inputs)),
        "weighted sum": lambda: Queued(
            torch, torch._foreach_add(a, b, alpha=combination.REG_WEIGHT)
        ),
        "projection per tensor": lambda: Queued(
            torch,
            [projected(torch, *pair, combination.REG_WEIGHT) for pair in zip(a, b, strict=True)],
        ),
    }
    threads = settle_threads(torch, calls["weighted sum"])
    samples = compare(calls, seconds=sizes.seconds, repetitions=sizes.repetitions)
    return [
        {
            "work": f"combination, {name}",
            "contestant": of_contestant,
            "threads": None if "dtnh_jax" in of_contestant else threads,
            **mine.cells(),
            "× dtnh_jax": mine.over(samples[f"dtnh_jax, {OURS}"]),
        }
        for of_contestant, mine in samples.items()
    ]


def step_rows(
    architecture: str, regularizer: Regularizer, packages: Packages, sizes: Sizes
) -> list[Row]:
    """Times the training step, if torchvision has the network."""
    if not hasattr(packages.torchvision, architecture):
        return []
    ours = step.calls(architecture, regularizer, OUR_STEPS, sizes)
    calls = {f"dtnh_jax, {name}": call for name, call in ours.items()}
    for name in (SUM, PAIR, *((TORCHJD,) if packages.torchjd else ())):
        calls[name] = torch_step(name, architecture, regularizer, packages, sizes)
    threads = settle_threads(packages.torch, calls[SUM])
    samples = compare(calls, seconds=sizes.seconds, repetitions=sizes.repetitions)
    return [
        {
            "work": f"step, {architecture}, {regularizer}",
            "contestant": name,
            "threads": None if "dtnh_jax" in name else threads,
            **mine.cells(),
            "× dtnh_jax": mine.over(samples[f"dtnh_jax, {OUR_STEPS[-1]}"]),
            "images/s": sizes.batch_size / mine.median,
        }
        for name, mine in samples.items()
    ]


def settle_threads(torch: ModuleType, call: Callable[[], Any]) -> int:
    """Sets PyTorch to one thread or all, whichever is faster; all can be slower on shared cores."""

    def on(threads: int) -> Callable[[], Any]:
        def run() -> Any:
            torch.set_num_threads(threads)
            return call()

        return run

    choices = {str(n): on(n) for n in (1, machine.cores())}
    samples = compare(choices, seconds=1, repetitions=5)
    best = int(min(samples, key=lambda n: samples[n].median))
    torch.set_num_threads(best)
    return best


def torch_step(
    name: str,
    architecture: str,
    regularizer: Regularizer,
    packages: Packages,
    sizes: Sizes,
) -> Callable[[], Queued]:
    """One training step in PyTorch."""
    torch = packages.torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make = functools.partial(getattr(packages.torchvision, architecture), num_classes=100)
    model, source = (make().to(device, memory_format=torch.channels_last) for _ in range(2))
    model.train()
    source.eval()
    params = list(model.parameters())
    shared = [
        (mine, theirs.detach())
        for (key, mine), theirs in zip(model.named_parameters(), source.parameters(), strict=True)
        if not key.startswith("fc.")
    ]
    predict, teach = (torch.compile(net) if device == "cuda" else net for net in (model, source))
    optimizer = torch.optim.SGD(params, step.LEARNING_RATE, momentum=0.9)
    shape = sizes.batch_size, 3, sizes.image_size, sizes.image_size
    images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(sizes.batch_size, device=device) % 100
    autocast = torch.autocast(device, torch.bfloat16, enabled=sizes.activations == "bfloat16")

    def terms() -> tuple[Any, Any]:
        with autocast:
            logits = predict(images).float()
            loss = torch.nn.functional.cross_entropy(logits, labels)
            if regularizer == "l2_sp":
                return loss, 0.5 * sum(((w - w0) ** 2).sum() for w, w0 in shared)
            with torch.no_grad():
                targets = torch.log_softmax(teach(images).float() / 2, dim=1)
            kl = torch.nn.functional.kl_div(
                torch.log_softmax(logits / 2, dim=1),
                targets,
                log_target=True,
                reduction="batchmean",
            )
            return loss, 4 * kl

    def summed(loss: Any, reg: Any) -> None:
        (loss + step.REG_WEIGHT * reg).backward()

    def taken_apart(loss: Any, reg: Any) -> None:
        loss_grads = torch.autograd.grad(loss, params, retain_graph=True)
        reg_grads = torch.autograd.grad(reg, params, allow_unused=True)
        for param, a, b in zip(params, loss_grads, reg_grads, strict=True):
            param.grad = a if b is None else projected(torch, a, b, step.REG_WEIGHT)

    def by_torchjd(loss: Any, reg: Any) -> None:
        autojac, aggregation = (_import(f"torchjd.{part}") for part in ("autojac", "aggregation"))
        assert autojac
        assert aggregation
        autojac.backward([loss, step.REG_WEIGHT * reg], inputs=params, parallel_chunk_size=1)
        autojac.jac_to_grad(params, aggregation.PCGrad())

    backward = {SUM: summed, PAIR: taken_apart, TORCHJD: by_torchjd}[name]

    def take() -> Queued:
        optimizer.zero_grad()
        loss, reg = terms()
        backward(loss, reg)
        optimizer.step()
        return Queued(torch, loss.detach())

    return take


def projected(torch: ModuleType, a: Any, b: Any, reg_weight: float) -> Any:
    """The direction of DTNH for one tensor."""
    share = (torch.sum(a * b) / torch.sum(a * a)).clamp(max=0)
    return torch.add(a * (1 - reg_weight * share), b, alpha=reg_weight)


def _tensor(torch: ModuleType, leaf: jax.Array) -> Any:
    tensor = torch.from_numpy(np.array(leaf))
    return tensor.cuda() if torch.cuda.is_available() else tensor


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
