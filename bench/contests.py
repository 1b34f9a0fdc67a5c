"""What a case is made of: contests, gradients, competitors, peers, limits, memory."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.optim._muon as torch_muon
from torch import Tensor
from torch.optim import Optimizer

from stiefel.kernels import gram_stack
from stiefel.optimizers import GaLore

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from helpers.allocations import AllocationCounter
from helpers.peers import Missing, fira_adamw, galore_torch_adamw

Shape = tuple[int, ...]
Model = tuple[Shape, ...]
"""Shapes of the weights that one optimizer has."""
Maker = Callable[[list[Any]], Optimizer]
"""From parameters to an optimizer on them."""
Swap = Callable[[], contextlib.AbstractContextManager[None]]
"""A context that holds during a step, such as a replaced function of a peer."""
NEVER = 10**9
"""Steps between refreshes, for cases that time the steps between them."""
POOL = 3
"""Gradients made beforehand and cycled."""
LARGE = 2**24
"""Entries above which a gradient is Gaussian: its product would take longer than the steps."""


# --- Shapes ---


def parse_model(text: str) -> Model:
    """Weights from ``mxn``, ``mxnxk`` for k of them, and sums of such terms.

    Raises:
        ValueError: Not of that form.
    """
    shapes: list[Shape] = []
    for term in text.split("+"):
        sizes = [int(size) for size in term.split("x")]
        if len(sizes) not in (2, 3) or min(sizes) < 1:
            raise ValueError(f"a shape is mxn or mxnxk, joined by +; got {text!r}")
        shapes += [(sizes[0], sizes[1])] * (sizes[2] if len(sizes) == 3 else 1)
    return tuple(shapes)


def label(model: Model) -> str:
    """The text from which :func:`parse_model` makes this model."""
    counts: dict[Shape, int] = {}
    for shape in model:
        counts[shape] = counts.get(shape, 0) + 1
    return "+".join(
        "x".join(map(str, shape if k == 1 else (*shape, k))) for shape, k in counts.items()
    )


def rank_for(model: Model) -> int:
    """A quarter of the shortest side: 256 of 1024."""
    return max(1, min(min(shape) for shape in model) // 4)


@dataclass(frozen=True)
class Setting:
    """What the command line asks of a case.

    Attributes:
        quick: Tiny shapes.
        given: Models to run on instead of the case's own.
    """

    quick: bool = False
    given: tuple[Model, ...] = ()

    def models(self, usual: str, tiny: str) -> list[Model]:
        """The models given, or those of the case, written with spaces between."""
        texts = (tiny if self.quick else usual).split()
        return list(self.given or map(parse_model, texts))

    @property
    def judged(self) -> bool:
        """Targets were set for the case's own shapes."""
        return not self.quick and not self.given


# --- What a case is made of ---


class Competitor(Protocol):
    """Something whose ``run`` is timed; ``prepare(i)`` comes before it, untimed."""

    def prepare(self, i: int) -> None:
        """Make round i ready."""

    def run(self) -> None:
        """The timed call."""


Cell = tuple[str, str, str]
"""Panel, row and column of a figure that belongs into a table."""


@dataclass(frozen=True)
class Ratio:
    """A weighted sum of times over another one, taken in each round, and its target.

    Attributes:
        name: What is printed.
        top: Weight of each competitor's time above the line.
        bottom: The same below.
        target: The median ratio must not be above it; None: only shown.
        cell: Where it stands if its case is shown as tables.
    """

    name: str
    top: Mapping[str, float]
    bottom: Mapping[str, float]
    target: float | None = None
    cell: Cell | None = None


@dataclass(frozen=True)
class Figure:
    """A number that is not a time; its target is an upper limit as for ratios."""

    name: str
    value: float
    target: float | None = None
    unit: str = ""
    cell: Cell | None = None


@dataclass
class Contest:
    """One set of competitors on the same shapes.

    Attributes:
        competitors: Their makers by name; the runner calls them, in an order of its own.
        ratios: What is reported.
        skipped: Why a competitor is missing.
    """

    competitors: dict[str, Callable[[], Competitor]]
    ratios: list[Ratio] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def ratio(self, name: str, top: str, bottom: str, target: float | None = None) -> None:
        """Add the ratio of two competitors, if both are there."""
        if top in self.competitors and bottom in self.competitors:
            self.ratios.append(Ratio(name, {top: 1.0}, {bottom: 1.0}, target))


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
        title: One line for the reader.
        contests: Makes the timed contests.
        figures: Makes numbers that are no times.
        floor: Least number of rounds.
        seconds: Time after which no further round begins once the floor is reached.
        builds: How often the competitors are made anew; rounds of all builds are pooled. A pass
            over memory is faster or slower by 15 % depending on where its tensors happened to
            land, for as long as they live, so one build says little about such a step.
        shaped: Whether it runs on other shapes than its own.
    """

    title: str
    contests: Callable[[Setting], Iterator[Contest]] = lambda setting: iter(())
    figures: Callable[[Setting], Iterator[Figure]] = lambda setting: iter(())
    floor: int = 15
    seconds: float = 20.0
    builds: int = 1
    shaped: bool = True


# --- Gradients and competitors ---


def decaying(shape: Shape, generator: torch.Generator) -> Tensor:
    """A gradient, or a stack, of singular values like 1/i: A diag(1/i) B with Gaussian A and B."""
    if len(shape) == 1 or math.prod(shape) > LARGE:
        return torch.randn(shape, generator=generator)
    *stack, m, n = shape
    k = min(m, n)
    w = 1.0 / torch.arange(1, k + 1)
    A, B = (torch.randn(*stack, *side, generator=generator) for side in ((m, k), (k, n)))
    G: Tensor = (A * w) @ B / n**0.5
    return G


@lru_cache(maxsize=2)
def pool_of(model: Model) -> list[list[Tensor]]:
    """A few sets of gradients, the same for every competitor; nobody writes into them."""
    generator = torch.Generator().manual_seed(0)
    return [[decaying(shape, generator) for shape in model] for _ in range(POOL)]


class Step:
    """An optimizer on weights of its own; ``swap`` is a context that holds during its steps."""

    def __init__(
        self,
        make: Maker,
        model: Model,
        warm: int = 2,
        swap: Swap = contextlib.nullcontext,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in model
        ]
        for p in self.params:
            p.grad = torch.empty_like(p)
        self.pool, self.optimizer, self.swap = pool_of(model), make(self.params), swap
        for i in range(warm):
            self.prepare(i)
            self.run()

    def prepare(self, i: int) -> None:
        """Fresh gradients, copied: each competitor then finds its own in the same state."""
        for p, G in zip(self.params, self.pool[i % POOL], strict=True):
            assert p.grad is not None
            p.grad.copy_(G)

    def run(self) -> None:
        """One step."""
        with self.swap():
            self.optimizer.step()


class Backward(Step):
    """A backward pass that makes the round's gradients, and the step: after it, or inside of it."""

    def __init__(self, make: Maker, model: Model, is_inside: bool) -> None:
        super().__init__(make, model, warm=0)
        self.optimizer.zero_grad()
        self.is_inside = is_inside
        if is_inside:
            self.handle = self.optimizer.step_in_backward()  # type: ignore[attr-defined]
        for i in range(2):
            self.prepare(i)
            self.run()

    def prepare(self, i: int) -> None:
        """The loss whose gradients are those of the round."""
        pairs = zip(self.params, self.pool[i % POOL], strict=True)
        self.losses = [(p * G).sum() for p, G in pairs]

    def run(self) -> None:
        """One pass and one step, after which no gradient is left."""
        torch.autograd.backward(self.losses, retain_graph=True)
        if not self.is_inside:
            self.optimizer.step()
            self.optimizer.zero_grad()


class Call:
    """A function of the round's gradients."""

    def __init__(self, fn: Callable[[list[Tensor]], Any], model: Model) -> None:
        self.fn, self.pool = fn, pool_of(model)
        self.grads = [G.clone() for G in self.pool[0]]
        self.run()

    def prepare(self, i: int) -> None:
        """Fresh gradients."""
        for G, new in zip(self.grads, self.pool[i % POOL], strict=True):
            G.copy_(new)

    def run(self) -> None:
        """One call."""
        self.fn(self.grads)


# --- Limits: what a step cannot do without ---


class TwoProducts:
    """GaLore's: project, and lift into the weight."""

    def __init__(self, model: Model) -> None:
        self.rank, self.work = rank_for(model), []
        for m, n in model:
            P = torch.linalg.qr(torch.randn(min(m, n), self.rank)).Q.contiguous()
            N = torch.randn(self.rank, n) if m < n else torch.randn(m, self.rank)
            self.work.append((torch.randn(m, n), P, N))

    def __call__(self, grads: list[Tensor]) -> None:
        """One step's worth."""
        for G, (W, P, N) in zip(grads, self.work, strict=True):
            if G.shape[0] < G.shape[1]:
                torch.mm(P.mT, G)
                W.addmm_(P, N, beta=0.9999, alpha=-1e-4)
            else:
                torch.mm(G, P)
                W.addmm_(N, P.mT, beta=0.9999, alpha=-1e-4)


class ProductAndPass:
    """APOLLO's: project, and one pass over the weight."""

    def __init__(self, model: Model) -> None:
        self.rank, self.add = rank_for(model), AddGradient(model)
        self.bases = [torch.linalg.qr(torch.randn(min(s), self.rank)).Q.contiguous() for s in model]

    def __call__(self, grads: list[Tensor]) -> None:
        """One step's worth."""
        for G, P in zip(grads, self.bases, strict=True):
            if G.shape[0] < G.shape[1]:
                torch.mm(P.mT, G)
            else:
                torch.mm(G, P)
        self.add(grads)


class TwoProductsAndPass(TwoProducts):
    """Fira's: project and lift, and one pass over gradient and weight for what is not lifted."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.add = AddGradient(model)

    def __call__(self, grads: list[Tensor]) -> None:
        """One step's worth."""
        super().__call__(grads)
        self.add.weights = [W for W, _, _ in self.work]
        self.add(grads)


class ProductSquaresAndPass(ProductAndPass):
    """The same and the squares of G's columns, which phi and the limiter need: a second read."""

    def __call__(self, grads: list[Tensor]) -> None:
        """One step's worth."""
        super().__call__(grads)
        for G in grads:
            if G.shape[0] <= G.shape[1]:
                sums = G[:64].square()
                for part in G[64:].split(64):
                    sums[: len(part)].addcmul_(part, part)
                sums.sum(0)
            else:
                torch.linalg.vector_norm(G, dim=-1)


class GramApply:
    """Muon's: the Gram matrix of the short side, and a square matrix times the momentum."""

    def __init__(self, model: Model) -> None:
        self.work = [torch.randn(min(shape), min(shape)) for shape in model]

    def __call__(self, grads: list[Tensor]) -> None:
        """One step's worth."""
        for G, T in zip(grads, self.work, strict=True):
            if G.shape[0] <= G.shape[1]:
                torch.mm(G, G.mT)
                torch.mm(T, G)
            else:
                torch.mm(G.mT, G)
                torch.mm(G, T)


class GramInversesApply(GramApply):
    """The same and LAPACK's three inverses of the short side, of which ``zolo`` is the sum."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.shifted = [T @ T.mT / len(T) + torch.eye(len(T)) for T in self.work]

    def __call__(self, grads: list[Tensor]) -> None:
        """One step's worth."""
        super().__call__(grads)
        for S in self.shifted:
            for _ in range(3):
                torch.cholesky_inverse(torch.linalg.cholesky_ex(S)[0])


class PairProducts:
    """AltLoRA's: X^T X, X^T X_old, T M and K G for each factor; X kept, and M and W written."""

    def __init__(self, model: Model) -> None:
        self.work = []
        for (r, n), (m, _) in zip(model[::2], model[1::2], strict=True):
            A, M_A, A_old = (torch.randn(r, n) for _ in range(3))
            B, M_B, B_old = (torch.randn(m, r) for _ in range(3))
            T = torch.eye(r)
            self.work += [(A, M_A, B.mT, B_old.mT, T), (B.mT, M_B.mT, A, A_old, T)]

    def __call__(self, grads: list[Tensor]) -> None:
        """One step's worth."""
        for i, (G, (W, M, X, X_old, T)) in enumerate(zip(grads, self.work, strict=True)):
            G = G.mT if i % 2 else G
            torch.mm(X, X.mT)
            torch.mm(X, X_old.mT)
            X_old.copy_(X)
            N = torch.mm(T, M) if M.is_contiguous() else torch.mm(M.mT, T.mT).mT
            M.copy_(N.addmm_(T, G, beta=0.9, alpha=0.1))
            W.add_(M, alpha=-1e-9)


class SoapProducts:
    """SOAP's: into the bases and back, two Gram matrices; at new bases the moment turned, two QR.

    Of those only the turn of the moment is ours: others project it at every step.
    """

    def __init__(self, model: Model, is_new: bool) -> None:
        self.is_new, self.work = is_new, []
        for m, n in model:
            self.work.append((torch.randn(m, m), torch.randn(n, n), torch.randn(m, n)))

    def __call__(self, grads: list[Tensor]) -> None:
        """One step's worth."""
        for G, (Q_L, Q_R, M) in zip(grads, self.work, strict=True):
            if self.is_new:
                for Q, X in ((Q_L, M), (Q_R, M.mT)):
                    new = torch.linalg.householder_product(*torch.geqrf(Q @ Q))
                    if len(X) > X.shape[1]:
                        new.mT @ (Q @ X)
                    else:
                        (new.mT @ Q) @ X
            M.addmm_(Q_L @ (Q_L.mT @ (G @ Q_R)), Q_R.mT, beta=0.9999, alpha=-1e-9)
            gram_stack(G[None]), gram_stack(G.mT[None])


class AddGradient:
    """The pass of a step without state: W += a G."""

    def __init__(self, model: Model) -> None:
        self.weights = [torch.randn(shape) for shape in model]

    def __call__(self, grads: list[Tensor]) -> None:
        """One step's worth."""
        torch._foreach_add_(self.weights, grads, alpha=1e-4)


class AdamPass(AddGradient):
    """The passes of AdamW: W read and written with G read, two moments read and written."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.moments = [torch.randn(shape) for shape in model * 2]

    def __call__(self, grads: list[Tensor]) -> None:
        """One step's worth."""
        super().__call__(grads)
        torch._foreach_mul_(self.moments, 0.9999)


LIMITS: dict[str, Callable[[Model], Callable[[list[Tensor]], Any]]] = {
    "two products": TwoProducts,
    "two products and pass": TwoProductsAndPass,
    "product and pass": ProductAndPass,
    "product, squares and pass": ProductSquaresAndPass,
    "Gram and apply": GramApply,
    "Gram, inverses and apply": GramInversesApply,
    "products and passes of pairs": PairProducts,
    "SOAP's products": partial(SoapProducts, is_new=False),
    "SOAP's products, new": partial(SoapProducts, is_new=True),
    "W += a G": AddGradient,
    "passes of AdamW": AdamPass,
}


# --- Peers ---


def peer(module: str, name: str) -> Any:
    """An attribute of an installed package."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Missing(f"{module}.{name} is not there: {error}") from error


def published_galore(rank: int, gap: int = NEVER) -> tuple[Maker, Swap]:
    """galore_torch's AdamW at its README's settings."""
    cls = galore_torch_adamw()
    keys = {"rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    return (
        lambda params: cls(
            [{"params": params, **keys}], weight_decay=0.1, no_deprecation_warning=True
        ),
        contextlib.nullcontext,
    )


def pytorch_optimizer_galore(rank: int, gap: int = NEVER) -> tuple[Maker, Swap]:
    """pytorch_optimizer's GaLore."""
    cls = peer("pytorch_optimizer", "GaLore")
    keys = {"rank": rank, "update_proj_gap": gap, "scale": 0.25, "projection_type": "std"}
    return (
        lambda params: cls([{"params": params, **keys}], weight_decay=0.1),
        contextlib.nullcontext,
    )


def published_fira(rank: int, gap: int = NEVER) -> tuple[Maker, Swap]:
    """fira's AdamW at its README's settings."""
    cls = fira_adamw()
    keys = {"rank": rank, "update_proj_gap": gap, "alpha": 1.0, "proj_type": "std"}
    return (
        lambda params: cls(
            [{"params": params, **keys}], weight_decay=0.1, no_deprecation_warning=True
        ),
        contextlib.nullcontext,
    )


def pytorch_optimizer_fira(rank: int, gap: int = NEVER) -> tuple[Maker, Swap]:
    """pytorch_optimizer's Fira."""
    cls = peer("pytorch_optimizer", "Fira")
    keys = {"rank": rank, "update_proj_gap": gap, "scale": 1.0, "projection_type": "std"}
    return (
        lambda params: cls([{"params": params, **keys}], weight_decay=0.1),
        contextlib.nullcontext,
    )


def ours_galore(rank: int, gap: int, **options: Any) -> Maker:
    """Constructor of this package's GaLore."""
    return lambda params: GaLore(
        params, rank=rank, update_proj_gap=gap, weight_decay=0.1, **options
    )


def adamw_rule(**flags: Any) -> Maker:
    """Constructor of the AdamW that every class has for what is no matrix."""
    return lambda params: GaLore([{"params": params, "rule": "adamw"}], weight_decay=0.1, **flags)


def float32_newton_schulz(
    grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> Tensor:
    """The iteration of torch.optim.Muon in float32: bfloat16 is emulated on many CPUs."""
    a, b, c = ns_coefficients
    tall = grad.size(0) > grad.size(1)
    X = grad.float()
    X = X / X.norm().clamp(min=eps)
    X = X.mT if tall else X
    for _ in range(ns_steps):
        A = X @ X.mT
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module replaced for the length of the context."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def torch_float32() -> contextlib.AbstractContextManager[None]:
    """torch.optim.Muon with a float32 iteration."""
    return replaced(torch_muon, "_zeropower_via_newtonschulz", float32_newton_schulz)


def pytorch_optimizer_muon(rank: int = 0) -> tuple[Maker, Swap]:
    """pytorch_optimizer's Muon; the dtype of its iteration is no option, so it is swapped in."""
    cls = peer("pytorch_optimizer", "Muon")
    base = importlib.import_module("pytorch_optimizer.optimizer.muon.base")
    name = "zero_power_via_newton_schulz_5"
    fn = partial(peer(base.__name__, name), dtype=torch.float32)
    return (
        lambda params: cls([{"params": params, "use_muon": True}], weight_decay=0.1),
        lambda: replaced(base, name, fn),
    )


def pytorch_optimizer_soap(rank: int = 0, every: int = NEVER) -> tuple[Maker, Swap]:
    """pytorch_optimizer's SOAP."""
    cls = peer("pytorch_optimizer", "SOAP")
    return lambda params: cls(params, precondition_frequency=every), contextlib.nullcontext


def optimuon_muon(rank: int = 0) -> tuple[Maker, Swap]:
    """optimuon's Muon; ns_dtype=None iterates in the weights' dtype."""
    cls = peer("optimuon", "Muon")
    return lambda params: cls(params, weight_decay=0.1, ns_dtype=None), contextlib.nullcontext


Peers = Mapping[str, Callable[[int], tuple[Maker, Swap]]]
"""By name: what makes one at a rank, and what holds during its steps."""
GALORES: dict[str, Callable[..., tuple[Maker, Swap]]] = {
    "galore_torch": published_galore,
    "pytorch_optimizer": pytorch_optimizer_galore,
}
FIRAS: dict[str, Callable[..., tuple[Maker, Swap]]] = {
    "fira": published_fira,
    "pytorch_optimizer": pytorch_optimizer_fira,
}
SOAPS: Peers = {"pytorch_optimizer": pytorch_optimizer_soap}
MUONS: Peers = {"pytorch_optimizer": pytorch_optimizer_muon, "optimuon": optimuon_muon}


# --- Memory ---


def tensors_in(x: Any) -> Iterator[Tensor]:
    """Tensors in a state: in dicts, in sequences, and in the projector objects of peers."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from tensors_in(value)
    elif isinstance(x, (list, tuple)):
        for value in x:
            yield from tensors_in(value)
    elif hasattr(x, "__dict__"):
        yield from tensors_in(vars(x))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all storages that the state keeps alive, each counted once; scalars left out."""
    storages = {
        x.untyped_storage()._cdata: x.untyped_storage().nbytes()
        for entry in optimizer.state.values()
        for x in tensors_in(entry)
        if x.dim() > 0
    }
    return sum(storages.values())


def peak_of(step: Step, i: int) -> int:
    """Peak bytes allocated during one step."""
    step.prepare(i)
    with AllocationCounter() as counter:
        step.run()
    return int(counter.peak)
