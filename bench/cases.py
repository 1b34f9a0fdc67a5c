"""The table of cases: who competes, on which shapes, and which ratio has which target."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from contests import (
    FIRAS,
    GALORES,
    LIMITS,
    MUONS,
    NEVER,
    SOAPS,
    Backward,
    Call,
    Case,
    Cell,
    Contest,
    Figure,
    Maker,
    Missing,
    Model,
    Peers,
    Ratio,
    Setting,
    Step,
    Swap,
    adamw_rule,
    label,
    ours_galore,
    parse_model,
    peak_of,
    pool_of,
    published_galore,
    rank_for,
    state_bytes,
    torch_float32,
)
from torch import Tensor

from stiefel import optimizers
from stiefel.kernels import (
    Rounding,
    parameter_keys,
    polar_factor,
    polar_report,
    rounding_keys,
)
from stiefel.kernels.polar.coefficients import ZOLO
from stiefel.kernels.polar.inverse_sums import sum_of_inverses
from stiefel.optimizers import (
    APOLLO,
    FRUGAL,
    AdaPreLoRA,
    AltLoRA,
    AuON,
    DCTAdamW,
    Dense,
    Direction,
    Fira,
    GaLore,
    Member,
    Muon,
    RowNorm,
    Rule,
    StackedOptimizer,
    SwitchLoRA,
    Trion,
    pairs_to_groups,
)
from stiefel.optimizers._driver.decay import Decay
from stiefel.optimizers._driver.write import write_
from stiefel.optimizers._lora.pair_groups import PairOptimizer
from stiefel.optimizers._toolkit.projectors import top_basis


def limit(name: str, model: Model) -> Callable[[], Call]:
    """Maker of a competitor that does what no step can do without."""
    return lambda: Call(LIMITS[name](model), model)


# --- GaLore ---


def galore_step(setting: Setting) -> Iterator[Contest]:
    """Steps between refreshes, on a wide and on a tall weight."""
    for model in setting.models("1024x4096 4096x1024", "32x64 64x32"):
        name, rank = label(model), rank_for(model)
        contest = Contest(
            {
                "ours": partial(Step, ours_galore(rank, NEVER), model),
                "two products": limit("two products", model),
            }
        )
        contest.ratio(f"{name} ours / two products", "ours", "two products", 1.10)
        for other, find in GALORES.items():
            try:
                maker, swap = find(rank)
                contest.competitors[other] = partial(Step, maker, model, swap=swap)
            except Missing as why:
                contest.skipped.append(f"{other}: {why}")
            contest.ratio(f"{name} ours / {other}", "ours", other, 1.0)
        yield contest


def short_rows(G: Tensor) -> Tensor:
    """G, transposed if it is tall."""
    return G if G.shape[0] <= G.shape[1] else G.mT


def galore_refresh(setting: Setting) -> Iterator[Contest]:
    """A new basis against the thin SVD, and what it makes of the mean step."""
    for model in setting.models("1024x4096", "32x64"):
        name, rank = label(model), rank_for(model)

        def bases(grads: list[Tensor], rank: int = rank) -> None:
            for G in grads:
                top_basis(short_rows(G)[None], rank, "svd")

        def thin(grads: list[Tensor]) -> None:
            for G in grads:
                torch.linalg.svd(short_rows(G), full_matrices=False)

        contest = Contest(
            {
                "top_basis": partial(Call, bases, model),
                "thin SVD": partial(Call, thin, model),
                "ours, step": partial(Step, ours_galore(rank, NEVER), model),
                "two products": limit("two products", model),
            }
        )
        contest.ratio(f"{name} top_basis / thin SVD", "top_basis", "thin SVD", 0.15)
        mean = {"ours, step": 1.0, "top_basis": 1 / 200}
        text = f"{name} mean step, refresh every 200 /"
        contest.ratios.append(Ratio(f"{text} two products", mean, {"two products": 1.0}))
        try:
            maker, _ = published_galore(rank)
            contest.competitors["galore_torch, step"] = partial(Step, maker, model)
            theirs = {"galore_torch, step": 1.0, "thin SVD": 1 / 200}
            contest.ratios.append(Ratio(f"{text} galore_torch's", mean, theirs, 1.0))
        except Missing as why:
            contest.skipped.append(f"galore_torch: {why}")
        yield contest


# --- Fira ---


def fira_step(setting: Setting) -> Iterator[Contest]:
    """Steps between refreshes."""
    for model in setting.models("1024x4096 4096x1024", "32x64 64x32"):
        name, rank = label(model), rank_for(model)
        ours = partial(Fira, rank=rank, update_proj_gap=NEVER, weight_decay=0.1)
        contest = Contest(
            {
                "ours": partial(Step, ours, model),
                "GaLore": partial(Step, ours_galore(rank, NEVER), model),
                "two products and pass": limit("two products and pass", model),
            }
        )
        contest.ratio(f"{name} ours / our GaLore", "ours", "GaLore", 1.20)
        contest.ratio(f"{name} ours / its limit", "ours", "two products and pass", 1.10)
        for other, target in (("fira", 0.50), ("pytorch_optimizer", 0.60)):
            try:
                maker, swap = FIRAS[other](rank)
                contest.competitors[other] = partial(Step, maker, model, swap=swap)
            except Missing as why:
                contest.skipped.append(f"{other}: {why}")
            contest.ratio(f"{name} ours / {other}", "ours", other, target)
        yield contest


# --- APOLLO ---


def apollo_step(setting: Setting) -> Iterator[Contest]:
    """Steps between draws against the product and the pass that no step can do without."""
    for model in setting.models("1024x1024 1024x4096 4096x1024", "32x64 64x32"):
        name, rank = label(model), rank_for(model)
        given: dict[str, Any] = {"rank": rank, "update_proj_gap": NEVER, "weight_decay": 0.1}
        contest = Contest(
            {
                "ours": partial(Step, partial(APOLLO, **given), model),
                "Fira": partial(Step, partial(Fira, **given), model),
                "product and pass": limit("product and pass", model),
                "product, squares and pass": limit("product, squares and pass", model),
            }
        )
        for bottom in ("product and pass", "product, squares and pass"):
            contest.ratio(f"{name} ours / {bottom}", "ours", bottom, 1.15)
        contest.ratio(f"{name} ours / our Fira", "ours", "Fira")
        yield contest


# --- DCT-AdamW ---


def dct_step(setting: Setting) -> Iterator[Contest]:
    """Between two choices against our GaLore between two bases; then all that transforms G."""
    for model in setting.models("1024x4096 4096x1024", "32x64 64x32"):
        name, rank = label(model), rank_for(model)
        forms: dict[str, dict[str, Any]] = {
            "between choices": {"update_proj_gap": NEVER},
            "choosing at every step": {},
        }
        for kind in ("full", "int8", "int4"):
            forms[f"{kind} feedback"] = {"update_proj_gap": NEVER, "error_feedback": kind}
        contest = Contest({"GaLore": partial(Step, ours_galore(rank, NEVER), model)})
        for form, options in forms.items():
            make = partial(DCTAdamW, rank=rank, weight_decay=0.1, **options)
            contest.competitors[form] = partial(Step, make, model)
            limit = 1.10 if form == "between choices" else None
            contest.ratio(f"{name} {form} / GaLore between bases", form, "GaLore", limit)
        yield contest


def dct_stack(setting: Setting) -> Iterator[Contest]:
    """A stack of small matrices (experts) at the default rank, which takes all cosines."""
    side, count = (8, 4) if setting.quick else (64, 512)
    for rank, target in ((128, 12.0), (side // 4, None)):
        model = ((count, side, side),)
        contest = Contest(
            {
                "ours": partial(Step, partial(DCTAdamW, rank=rank, weight_decay=0.1), model),
                "AdamW fused": partial(
                    Step, partial(torch.optim.AdamW, weight_decay=0.1, fused=True), model
                ),
            }
        )
        name = f"{count} of {side}x{side}, rank {rank}: ours / AdamW fused"
        contest.ratio(name, "ours", "AdamW fused", target)
        yield contest


# --- Muon ---


def muon_step(setting: Setting) -> Iterator[Contest]:
    """A transformer's matrices: squares, wide and tall ones."""
    for model in setting.models("512x512x12+512x2048x6+2048x512x6", "16x16x2+16x64+64x16"):
        theirs = partial(torch.optim.Muon, weight_decay=0.1)
        contest = Contest(
            {
                "ours": partial(Step, partial(Muon, weight_decay=0.1), model),
                "ours, ns5": partial(Step, partial(Muon, weight_decay=0.1, polar="ns5"), model),
                "torch": partial(Step, theirs, model, swap=torch_float32),
                "Gram and apply": limit("Gram and apply", model),
                "Gram, inverses and apply": limit("Gram, inverses and apply", model),
            }
        )
        contest.ratio("ours / torch (float32)", "ours", "torch", 0.42)
        contest.ratio("ours with ns5 / torch (float32)", "ours, ns5", "torch")
        for products in ("Gram and apply", "Gram, inverses and apply"):
            contest.ratio(f"ours / {products}", "ours", products)
        for name, find in MUONS.items():
            try:
                maker, swap = find(0)
                contest.competitors[name] = partial(Step, maker, model, swap=swap)
            except Missing as why:
                contest.skipped.append(f"{name}: {why}")
            contest.ratio(f"ours / {name} (float32)", "ours", name, 1.0)
        yield contest


def low_rank_polar(setting: Setting) -> Iterator[Contest]:
    """The randomized low-rank polar step against the whole one, on one matrix."""
    for model in setting.models("1024x4096", "32x64"):
        r = max(1, min(model[0]) // 8)
        kinds: dict[str, dict[str, Any]] = {
            "ns5": {"method": "ns5"},
            "zolo": {"method": "zolo"},
            "r = m / 8": {"method": "low_rank", "rank": r, "oversample": 0},
            "r = m / 8 + 10": {"method": "low_rank", "rank": r},
            "r = m / 8, kaczmarz": {
                "method": "low_rank", "rank": r, "oversample": 0, "sketch": "kaczmarz"
            },
        }  # fmt: skip
        contest = Contest(
            {
                name: partial(
                    Call, lambda Gs, given=given: [polar_factor(G, **given) for G in Gs], model
                )
                for name, given in kinds.items()
            }
        )
        for name in list(kinds)[1:]:
            target = 0.12 if name == "r = m / 8" else None
            contest.ratio(f"{label(model)} {name} / ns5", name, "ns5", target)
        yield contest


def low_rank_quality(setting: Setting) -> Iterator[Figure]:
    """What a sketch of m / 8 + 10 columns leaves out."""
    for model in setting.models("512x512", "16x64"):
        for spectrum, M in spectra(*sorted(model[0])):
            report = polar_report(M, polar_factor(M, "low_rank"))
            yield Figure(f"{label(model)}, {spectrum}: d_A", report.alignment_deficit)
            yield Figure(f"{label(model)}, {spectrum}: ||O||_2", report.operator_norm)


def spectra(m: int, n: int) -> Iterator[tuple[str, Tensor]]:
    """Matrices m x n whose singular values fall as gradients' do."""
    generator = torch.Generator().manual_seed(2)
    U = torch.linalg.qr(torch.randn(m, m, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, m, generator=generator)).Q
    i = torch.arange(m)
    yield "1/i", (U / (i + 1)) @ V.mT
    yield "geometric to 1e-7", (U * 10.0 ** (-7 * i / max(1, m - 1))) @ V.mT
    r = max(1, m // 8)
    noise = torch.randn(m, n, generator=generator) * (0.01 / n**0.5)
    yield f"rank {r} plus noise", U[:, :r] @ V[:, :r].mT + noise


def muon_quality(setting: Setting) -> Iterator[Figure]:
    """What the speed costs: alignment deficit and largest singular value of the direction."""
    models = setting.models("512x512 512x2048", "16x16 16x64")
    for m, n in sorted({(min(shape), max(shape)) for model in models for shape in model}):
        for spectrum, M in spectra(m, n):
            for method in ("zolo", "ns5"):
                report = polar_report(M, polar_factor(M, method))
                name = f"{m}x{n}, {spectrum}, {method}:"
                yield Figure(f"{name} d_A", report.alignment_deficit)
                yield Figure(f"{name} ||O||_2", report.operator_norm)


# --- LoRA pairs ---


def pairs_step(setting: Setting) -> Iterator[Contest]:
    """The adapters of a model of 7B (224 pairs of 4096 and 4096, rank 16) against AdamW."""

    def ours(
        params: list[Tensor], cls: type[PairOptimizer] = AltLoRA, **options: Any
    ) -> PairOptimizer:
        pairs = zip(params[::2], params[1::2], strict=True)
        return cls(pairs_to_groups(pairs, scale=2.0), lr=1e-3, **options)

    count, side, rank = (4, 32, 2) if setting.quick else (224, 4096, 16)
    model = ((rank, side), (side, rank)) * count
    adamw = partial(torch.optim.AdamW, foreach=True)
    contest = Contest(
        {
            "AltLoRA": partial(Step, ours, model),
            "AltLoRA+": partial(Step, partial(ours, second_moment="elementwise"), model),
            "AdaPreLoRA": partial(Step, partial(ours, cls=AdaPreLoRA), model),
            "AdaPreLoRA, no metric": partial(
                Step, partial(ours, cls=AdaPreLoRA, stats="none"), model
            ),
            "AdamW foreach": partial(Step, adamw, model),
            "products and passes": limit("products and passes of pairs", model),
        }
    )
    name = f"{count} pairs of rank {rank}, {side}x{side},"
    contest.ratio(f"{name} AltLoRA / AdamW foreach", "AltLoRA", "AdamW foreach", 1.2)
    for other in ("AltLoRA+", "AdaPreLoRA", "AdaPreLoRA, no metric"):
        contest.ratio(f"{name} {other} / AdamW foreach", other, "AdamW foreach")
    contest.ratio(f"{name} AltLoRA / its products and passes", "AltLoRA", "products and passes")
    yield contest


# --- AuON and Trion ---


def auon_step(setting: Setting) -> Iterator[Contest]:
    """AuON against what it amounts to, momentum SGD, and its hybrid against Muon."""
    for model in setting.models("1024x4096", "32x64"):
        sgd = partial(
            torch.optim.SGD, lr=1e-3, momentum=0.95, nesterov=True, weight_decay=0.1, foreach=True
        )
        # torch's SGD spends a pass on its decay, AuON none: so without it too
        bare = partial(sgd, weight_decay=0.0)
        contest = Contest(
            {
                "AuON": partial(Step, partial(AuON, weight_decay=0.1), model),
                "SGD": partial(Step, sgd, model),
                "AuON, no decay": partial(Step, AuON, model),
                "SGD, no decay": partial(Step, bare, model),
                "hybrid": partial(Step, partial(AuON, weight_decay=0.1, ns_steps=1), model),
                "Muon, ns5": partial(Step, partial(Muon, weight_decay=0.1, polar="ns5"), model),
            }
        )
        contest.ratio(f"{label(model)} AuON / SGD foreach", "AuON", "SGD", 1.5)
        name = f"{label(model)} AuON / SGD foreach, both without decay"
        contest.ratio(name, "AuON, no decay", "SGD, no decay")
        contest.ratio(f"{label(model)} hybrid / Muon with ns5", "hybrid", "Muon, ns5", 0.27)
        yield contest


def trion_step(setting: Setting) -> Iterator[Contest]:
    """A choice of cosines at every step, rank a quarter of the shorter side, against Muon."""
    for model in setting.models("1024x4096 4096x1024", "32x64"):
        contest = Contest(
            {
                "Trion": partial(Step, partial(Trion, weight_decay=0.1), model),
                "Muon, ns5": partial(Step, partial(Muon, weight_decay=0.1, polar="ns5"), model),
            }
        )
        contest.ratio(f"{label(model)} Trion / Muon with ns5", "Trion", "Muon, ns5")
        yield contest


# --- FRUGAL ---


def frugal_step(setting: Setting) -> Iterator[Contest]:
    """Steps between two choices of columns, rows or entries, a quarter of them state-full."""
    for model in setting.models("1024x4096", "32x64"):
        contest = Contest(
            {
                f"AdamW {flag}": partial(
                    Step, partial(torch.optim.AdamW, weight_decay=0.1, **{flag: True}), model
                )
                for flag in ("fused", "foreach")
            }
        )
        for split in ("columns", "rows", "randk"):
            make = partial(FRUGAL, weight_decay=0.1, split=split, update_gap=NEVER)
            contest.competitors[split] = partial(Step, make, model)
            for flag, target in (("fused", 2.2), ("foreach", 0.6)):
                name = f"{label(model)} {split} / AdamW {flag}"
                wanted = target if split == "columns" else None
                contest.ratio(name, split, f"AdamW {flag}", wanted)
        yield contest


# --- ARO ---


def aro_step(setting: Setting) -> Iterator[Contest]:
    """A step with a new rotation, and one without, against Muon's polynomial iteration."""
    for model in setting.models("512x512 1024x1024", "16x16"):
        name = label(model)
        muon = partial(optimizers.Muon, weight_decay=0.1, polar="ns5")
        contest = Contest(
            {
                "ours": partial(Step, optimizers.ARO, model),
                "ours, rotation kept": partial(
                    Step, partial(optimizers.ARO, rotation_every=NEVER), model
                ),
                "Muon, ns5": partial(Step, muon, model),
            }
        )
        contest.ratio(f"{name} ours / Muon with ns5", "ours", "Muon, ns5", 0.65)
        contest.ratio(f"{name} rotation kept / Muon with ns5", "ours, rotation kept", "Muon, ns5")
        yield contest


# --- SOAP ---


def soap_step(setting: Setting) -> Iterator[Contest]:
    """Steps that keep their bases, steps that change them, and their mean at every tenth."""
    for model in setting.models("1024x1024 1024x4096", "32x48"):
        contest = Contest({})
        for every in (NEVER, 1):
            name = "kept" if every == NEVER else "new"
            ours = partial(optimizers.SOAP, precondition_frequency=every)
            contest.competitors[f"ours, {name}"] = partial(Step, ours, model)
            with contextlib.suppress(Missing):
                theirs, _ = SOAPS["pytorch_optimizer"](0, every)  # type: ignore[call-arg]
                contest.competitors[f"theirs, {name}"] = partial(Step, theirs, model)
        contest.competitors["limit, kept"] = limit("SOAP's products", model)
        contest.competitors["limit, new"] = limit("SOAP's products, new", model)
        for name in ("kept", "new"):
            title = f"{label(model)} {name} bases, ours / pytorch_optimizer"
            contest.ratio(title, f"ours, {name}", f"theirs, {name}", 0.7)
        ours, least, theirs = (
            {f"{who}, kept": 0.9, f"{who}, new": 0.1} for who in ("ours", "limit", "theirs")
        )
        title = f"{label(model)} new bases every 10 steps,"
        contest.ratios.append(Ratio(f"{title} ours / its products", ours, least))
        if "theirs, new" in contest.competitors:
            contest.ratios.append(Ratio(f"{title} ours / pytorch_optimizer", ours, theirs, 0.7))
            name = f"{title} our products / pytorch_optimizer"
            contest.ratios.append(Ratio(name, least, theirs))
        yield contest


# --- Stacks of experts ---


class StackStep(Step):
    """An optimizer on one parameter (K, m, n), the matrices of a model, as experts lie."""

    def __init__(self, make: Maker, model: Model) -> None:
        self.params = [torch.nn.Parameter(0.02 * torch.randn(len(model), *model[0]))]
        self.params[0].grad = torch.empty_like(self.params[0])
        self.pool = [[torch.stack(grads)] for grads in pool_of(model)]
        self.optimizer, self.swap = make(self.params), contextlib.nullcontext
        for i in range(2):
            self.prepare(i)
            self.run()


class StackArithmetic:
    """The products, factors and passes of a stack's step, in one call each, and nothing else."""

    def __init__(self, method: str, model: Model) -> None:
        self.method, m = method, model[0][0]
        self.G, self.M, self.W, self.U, self.V = torch.randn(5, len(model), *model[0]).unbind()
        self.rows = torch.rand(len(model), 2, m)
        self.run()

    def prepare(self, i: int) -> None:
        """Nothing: all is overwritten but for G."""

    def run(self) -> None:
        """Momentum, the method, the write."""
        self.M.lerp_(self.G, 0.05)
        torch.lerp(self.G, self.M, 0.95, out=self.U)
        (self.factor if self.method == "Muon" else self.rotate)()
        self.W.mul_(0.9999).add_(self.V, alpha=-1e-3)

    def factor(self) -> None:
        """Gram and apply; two Cholesky factors of blocks of 16, and products of their rows."""
        size = max(1, 2**17 // self.G[0].numel())  # in the cache
        for i in range(0, len(self.G), size):
            X = self.U[i : i + size] / torch.linalg.matrix_norm(self.U[i : i + size], keepdim=True)
            S = torch.bmm(X, X.mT)
            norm = torch.linalg.matrix_norm(S, keepdim=True)
            torch.bmm(sum_of_inverses(S, ZOLO, norm)[0], X, out=self.V[i : i + size])

    def rotate(self) -> None:
        """A QR factorization, two Sinkhorns of five rounds, and four products."""
        torch.bmm(self.U, self.M, out=self.V)
        torch.linalg.householder_product(*torch.geqrf(self.V))
        torch.bmm(self.U, self.M, out=self.V)
        torch.bmm(self.U, self.M.mT, out=self.V)
        for _ in range(10):
            torch.bmm(torch.bmm(self.rows, self.M.mT), self.M)
        torch.bmm(self.U, self.M, out=self.V)


def stacks_step(setting: Setting) -> Iterator[Contest]:
    """One stack of square experts against torch's AdamW, and against bare arithmetic."""
    targets = {"Muon": 25.0, "Spectral": 25.0, "ARO": 60.0, "DCTAdamW": 12.0}
    for model in setting.models("64x64x512", "16x16x3"):
        adamw = partial(torch.optim.AdamW, weight_decay=0.1, fused=True)
        contest = Contest({"AdamW fused": partial(StackStep, adamw, model)})
        name = f"one stack of {len(model)} of {'x'.join(map(str, model[0]))},"
        for method, target in targets.items():
            make = partial(getattr(optimizers, method), weight_decay=0.1)
            contest.competitors[method] = partial(StackStep, make, model)
            contest.ratio(f"{name} {method} / AdamW fused", method, "AdamW fused", target)
        for method in ("Muon", "ARO"):
            bare = f"{method}'s arithmetic"
            contest.competitors[bare] = partial(StackArithmetic, method, model)
            contest.ratio(f"{name} {method} / its arithmetic", method, bare)
            contest.ratio(f"{name} {bare} / AdamW fused", bare, "AdamW fused")
        yield contest


# --- AdamW and overhead ---

FLAGS: dict[str, dict[str, bool]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def adamw_parity(setting: Setting) -> Iterator[Contest]:
    """The AdamW parameters of this package against torch.optim.AdamW."""
    models = {label(model): model for model in setting.models("1024x4096", "32x64")}
    if not setting.given:
        count = 4 if setting.quick else 200
        models[f"{count} vectors of 512"] = ((512,),) * count
    for name, model in models.items():
        for flag, options in FLAGS.items():
            theirs = partial(torch.optim.AdamW, weight_decay=0.1, **options)
            contest = Contest(
                {
                    "ignore": partial(Step, adamw_rule(nonfinite="ignore", **options), model),
                    "skip": partial(Step, adamw_rule(**options), model),
                    "torch": partial(Step, theirs, model),
                }
            )
            contest.ratio(f"{name}, {flag}: unguarded / torch", "ignore", "torch", 1.05)
            contest.ratio(f"{name}, {flag}: bad gradients skipped / torch", "skip", "torch", 1.15)
            yield contest


@dataclass(frozen=True)
class ZeroRule(Rule):
    """Does nothing: what is left of its step is the driver."""

    def update(self, w: Member) -> Direction:
        """A direction of zeros."""
        assert w.grad is not None
        return w.step(Dense(torch.zeros_like(w.grad)))


def overhead(setting: Setting) -> Iterator[Contest]:
    """Many small matrices, where arithmetic is nothing and Python is all."""
    model = parse_model("8x8x6" if setting.quick else "8x8x200")
    fused = partial(torch.optim.AdamW, weight_decay=0.1, fused=True)
    driver = partial(StackedOptimizer, rule=ZeroRule(), lr=1e-3, weight_decay=0.1)
    contest = Contest(
        {
            "driver": partial(Step, driver, model),
            "Muon": partial(Step, partial(Muon, weight_decay=0.1), model),
            "GaLore": partial(Step, ours_galore(4, NEVER), model),
            "AdamW fused": partial(Step, fused, model),
        }
    )
    contest.ratio("zero rule / AdamW fused", "driver", "AdamW fused", 0.70)
    contest.ratio("Muon / AdamW fused", "Muon", "AdamW fused")
    contest.ratio("GaLore rank 4 / AdamW fused", "GaLore", "AdamW fused")
    yield contest


def group_for_each(make: Maker) -> Maker:
    """The same optimizer with a group, and a learning rate, for each parameter."""

    def in_groups(params: Any) -> torch.optim.Optimizer:
        return make([{"params": [p], "lr": 1e-3 * 0.99**i} for i, p in enumerate(params)])

    return in_groups


def many_groups(setting: Setting) -> Iterator[Contest]:
    """Layer-wise decay of the learning rate: one group for each of 120 matrices, against one."""
    makers: dict[str, Maker] = {
        "Muon": partial(Muon, weight_decay=0.1),
        "AuON": partial(AuON, weight_decay=0.1),
        "Fira": partial(Fira, rank=8, update_proj_gap=NEVER, weight_decay=0.1),
        "AdamW": partial(torch.optim.AdamW, weight_decay=0.1, foreach=True),
    }
    for side in (16,) if setting.quick else (64, 256):
        model = parse_model(f"{side}x{side}x{6 if setting.quick else 120}")
        for name, make in makers.items():
            contest = Contest(
                {
                    "many groups": partial(Step, group_for_each(make), model),
                    "one group": partial(Step, make, model),
                }
            )
            target = () if name == "AdamW" else (1.3,)
            text = f"{label(model)} {name}: a group for each / one group"
            contest.ratio(text, "many groups", "one group", *target)
            yield contest


# --- Weights of low precision ---


class Write:
    """The write of a dense step alone, into bfloat16 weights."""

    def __init__(self, model: Model, mode: str) -> None:
        generator = torch.Generator().manual_seed(1)
        # near 1 the steps are far below a grid point, near 0 they are many: both are there
        self.weights = [torch.randn(1, *shape, generator=generator).bfloat16() for shape in model]
        self.terms = [torch.randn(1, *shape, generator=generator) for shape in model]
        self.roundings = [self._rounding(W, mode) for W in self.weights]
        self.run()

    @staticmethod
    def _rounding(W: Tensor, mode: str) -> Rounding | None:
        if mode == "nearest":
            return None
        keys = rounding_keys(parameter_keys(0, [1], W.device), 1)
        residual = torch.zeros_like(W) if mode == "kahan" else None
        return Rounding(keys, 0, (0, W.shape[-1], 1), residual)

    def prepare(self, i: int) -> None:
        """Nothing: a write leaves no trace that matters."""

    def run(self) -> None:
        """One write of every weight, with decay."""
        for W, U, rounding in zip(self.weights, self.terms, self.roundings, strict=True):
            member = Member(None, lambda W=W: W, {}, t=1, refreshed=0, m=1, n=1, indices=(0,))  # type: ignore[misc]
            write_(W, member.step(Dense(U)), 1e-4, Decay(0.1), None, rounding)


def writes(setting: Setting) -> Iterator[Contest]:
    """Ways to write bfloat16 weights: the write alone, then whole steps."""
    modes = ("nearest", "stochastic", "kahan")
    for model in setting.models("1024x4096", "32x64"):
        name = f"{label(model)} bfloat16"
        contest = Contest({mode: partial(Write, model, mode) for mode in modes})
        contest.ratio(f"{name}, the write alone: stochastic / nearest", *modes[1::-1], 3.0)
        contest.ratio(f"{name}, the write alone: kahan / nearest", "kahan", "nearest")
        yield contest
        makers: dict[str, tuple[Callable[..., Maker], tuple[float, ...]]] = {
            "GaLore": (partial(ours_galore, rank_for(model), NEVER), (1.10,)),
            "Muon": (partial(partial, Muon, weight_decay=0.1), (1.02,)),
            "AdamW": (adamw_rule, ()),
        }
        for method, (make, target) in makers.items():
            step = partial(Step, model=model, dtype=torch.bfloat16)
            contest = Contest({mode: partial(step, make(write=mode)) for mode in modes})
            text = f"{name}, a step of {method}: stochastic / nearest"
            contest.ratio(text, *modes[1::-1], *target)
            contest.ratio(f"{name}, a step of {method}: kahan / nearest", "kahan", "nearest")
            yield contest


def in_backward(setting: Setting) -> Iterator[Contest]:
    """Steps inside of the backward pass, which lose their stacks, against steps after it."""
    makers: dict[str, Maker] = {
        "Muon": partial(Muon, weight_decay=0.1),
        "GaLore": partial(GaLore, rank=0.25, update_proj_gap=NEVER),
        "Fira": partial(Fira, rank=0.25, update_proj_gap=NEVER),
        "RowNorm": RowNorm,
    }
    for model in setting.models("64x64x200 1024x1024x4", "16x16x6"):
        for name, make in makers.items():
            contest = Contest(
                {
                    "in backward": partial(Backward, make, model, True),
                    "after it": partial(Backward, make, model, False),
                }
            )
            text = f"{label(model)} {name}: backward and steps inside of it / and a step after it"
            contest.ratio(text, "in backward", "after it")
            yield contest


# --- Memory ---


def held(model: Model) -> Iterator[Figure]:
    """State of each optimizer against its formula, in float32."""
    rank, sides = rank_for(model), [sorted(shape) for shape in model]
    formulas = {
        "GaLore": sum(rank * (m + 2 * n) for m, n in sides),
        "Muon": sum(m * n for m, n in sides),
        "AdamW": 2 * sum(m * n for m, n in sides),
    }
    for name, step in memory_steps(model):
        held_now, text = state_bytes(step.optimizer), f"{label(model)} state"
        yield Figure(f"{text}, {name}", held_now / 2**20, unit="MiB")
        if name in formulas:
            yield Figure(f"{text} / formula, {name}", held_now / (4 * formulas[name]), 1.0)


def temporaries(model: Model) -> Iterator[Figure]:
    """Peak bytes allocated in a step, and in one that refreshes, in units of what is bounded."""
    m, n = max((sorted(shape) for shape in model), key=lambda sides: sides[0] * sides[1])
    matrix, buffer = 4 * m * n, 4 * rank_for(model) * n
    for name, step in memory_steps(model):
        # With a refresh at every second update one of two steps has it; it needs more, not less.
        low, high = sorted(peak_of(step, i) for i in (2, 3))
        text = f"{label(model)} temporaries, {name}"
        yield Figure(text, low / 2**20, unit="MiB")
        yield Figure(text, low / matrix, 5.0 if name == "Muon" else None, "matrices")
        if "GaLore" in name:
            yield Figure(text, low / buffer, unit="r x n buffers")
            yield Figure(f"{text}, refresh", high / 2**20, unit="MiB")
            yield Figure(f"{text}, refresh", high / matrix, unit="matrices")


def memory_steps(model: Model) -> Iterator[tuple[str, Step]]:
    """Optimizers on one model, after two updates."""
    rank = rank_for(model)
    makers: dict[str, Maker] = {
        "GaLore": ours_galore(rank, 2),
        "Muon": partial(Muon, weight_decay=0.1),
        "AdamW": adamw_rule(),
        "torch AdamW": partial(torch.optim.AdamW, weight_decay=0.1),
        "torch AdamW fused": partial(torch.optim.AdamW, weight_decay=0.1, fused=True),
        "torch Muon": partial(torch.optim.Muon, weight_decay=0.1),
    }
    for name, find in GALORES.items():
        with contextlib.suppress(Missing):
            makers[f"GaLore of {name}"] = find(rank, 2)[0]
    for name, maker in makers.items():
        yield name, Step(maker, model, swap=torch_float32)


def memory(setting: Setting) -> Iterator[Figure]:
    """State and temporaries."""
    for model in setting.models("1024x4096", "32x64"):
        yield from held(model)
        yield from temporaries(model)


# --- Every optimizer ---


@dataclass(frozen=True)
class Variant:
    """One way in which a class takes part; what is not said follows from its constructor.

    Attributes:
        options: Keywords of the constructor. ``weight_decay`` and, where there is one, ``rank``
            are set anyway.
        limit: What no step can do without, a name of ``LIMITS``.
        peers: Published implementations of the same method.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    limit: str | None = None
    peers: Peers = field(default_factory=dict)


def kinds(name: str, limit: str) -> dict[str, Variant]:
    """GaLore by its projections."""
    return {kind: Variant({"projection": kind}, limit) for kind in name.split()}


VARIANTS: dict[str, dict[str, Variant]] = {
    "GaLore": {
        "svd": Variant({"projection": "svd"}, "two products", GALORES),
        **kinds("range power random dct", "two products"),
        **kinds("randk topk", "W += a G"),
    },
    "Fira": {"": Variant(limit="two products", peers=FIRAS)},
    "APOLLO": {
        "": Variant(limit="product and pass"),
        "Mini": Variant({"rank": 1, "scaling": "tensor", "projection": "gaussian"}, "W += a G"),
    },
    "SinkGD": {"": Variant(limit="W += a G")},
    "DCTAdamW": {
        "": Variant(limit="two products"),
        "int8": Variant({"error_feedback": "int8", "moments": "slot"}, "two products"),
    },
    "Muon": {
        "": Variant(limit="Gram and apply", peers=MUONS),
        "low rank": Variant({"polar": "low_rank"}, "Gram and apply"),
        "NorMuon": Variant({"second_moment": "normuon"}, "Gram and apply"),
    },
    "AuON": {"": Variant(limit="W += a G"), "hybrid": Variant({"ns_steps": 1}, "Gram and apply")},
    "Trion": {"": Variant(limit="two products")},
    "ARO": {
        "": Variant(limit="Gram and apply"),
        "row norm": Variant({"base": "row_norm"}, "Gram and apply"),
        "eigh": Variant({"rotation": "eigh"}, "Gram and apply"),
    },
    "SOAP": {
        "": Variant(limit="Gram and apply", peers=SOAPS),
        "short": Variant({"sides": "short"}, "Gram and apply"),
        "kl": Variant({"factors": "kl"}, "Gram and apply"),
    },
    "SOAPMuon": {"": Variant(limit="Gram and apply")},
    "RowNorm": {
        "": Variant(limit="W += a G"),
        "columns": Variant({"axis": "cols"}, "W += a G"),
        "centred": Variant({"centred": True}, "W += a G"),
    },
    "Spectral": {
        "": Variant(limit="Gram and apply"),
        "published": Variant(
            {"polar": "inverse_root", "alpha": 1.0, "adjust_lr_fn": "none"}, "Gram and apply"
        ),
    },
    "Hybrid": {"": Variant(limit="Gram and apply")},
    "SymmetryStack": {"": Variant(limit="Gram and apply")},  # on bare matrices it is Muon
}
"""Class name: its variants. A class that is not here takes part once, as it is."""
GAPS = ("gap", "every", "frequency", "interval")
"""Last words of a keyword that counts the steps between refreshes."""


@dataclass(frozen=True)
class Entrant:
    """An optimizer in the sweep.

    Attributes:
        step: Makes it so that it never refreshes again.
        refresh: The same, refreshing in every step.
        gap: Its default number of steps between refreshes.
        polar: Whether it is compared with torch.optim.Muon.
    """

    step: Maker
    refresh: Maker | None = None
    gap: int = 1
    polar: bool = False
    limit: str | None = None
    peers: Peers = field(default_factory=dict)


def classes() -> dict[str, type[StackedOptimizer]]:
    """Every optimizer that the package exports and that takes any matrix."""
    exported = {name: getattr(optimizers, name) for name in optimizers.__all__}
    return {
        name: found
        for name, found in exported.items()
        if isinstance(found, type)
        and issubclass(found, StackedOptimizer)
        and found is not StackedOptimizer
        and not issubclass(found, PairOptimizer)
    }


def entrants(rank: int) -> dict[str, Entrant]:
    """Every variant of every class, and the AdamW for what is no matrix."""
    found = {
        "AdamW rule": Entrant(adamw_rule(), limit="passes of AdamW"),
        "AdamW rule fused": Entrant(adamw_rule(fused=True), limit="passes of AdamW"),
    }
    for name, cls in classes().items():
        keys = inspect.signature(cls).parameters
        common = {k: v for k, v in {"weight_decay": 0.1, "rank": rank}.items() if k in keys}
        gap = next((key for key in keys if key.rpartition("_")[2] in GAPS), None)
        for suffix, variant in VARIANTS.get(name, {"": Variant()}).items():
            make = partial(cls, **{**common, **variant.options})
            rest = ("polar" in keys, variant.limit, variant.peers)
            found[f"{name} {suffix}".strip()] = (
                Entrant(make, None, 1, *rest)
                if gap is None
                else Entrant(
                    partial(make, **{gap: NEVER}),
                    partial(make, **{gap: 1}),
                    keys[gap].default,
                    *rest,
                )
            )
    return found


def baselines() -> dict[str, tuple[Maker, Swap]]:
    """What torch has."""
    adamw = partial(torch.optim.AdamW, weight_decay=0.1)
    return {
        "AdamW foreach": (partial(adamw, foreach=True), contextlib.nullcontext),
        "AdamW fused": (partial(adamw, fused=True), contextlib.nullcontext),
        "torch Muon": (partial(torch.optim.Muon, weight_decay=0.1), torch_float32),
    }


def cell_ratio(contest: Contest, cell: Cell, top: Mapping[str, float], bottom: str) -> None:
    """Add a ratio to a table, if there is something to divide by."""
    if bottom in contest.competitors:
        name = f"{cell[0]} {cell[1]}: {cell[2]}"
        contest.ratios.append(Ratio(name, top, {bottom: 1.0}, cell=cell))


def add_entrant(contest: Contest, name: str, entrant: Entrant, model: Model) -> None:
    """Its competitors and ratios; baselines and peers are there already."""
    text, ours, once = label(model), contest.competitors, {name: 1.0}
    ours[name] = partial(Step, entrant.step, model)
    for other in ("foreach", "fused"):
        cell_ratio(contest, (text, name, f"/ {other}"), once, f"AdamW {other}")
    if entrant.limit is not None:
        ours.setdefault(entrant.limit, limit(entrant.limit, model))
        cell_ratio(contest, (text, name, "/ limit"), once, entrant.limit)
    if entrant.refresh is not None:
        again = f"{name}, refresh"
        ours[again] = partial(Step, entrant.refresh, model)
        cell_ratio(contest, (text, name, "refresh / step"), {again: 1.0}, name)
        mean = {name: 1 - 1 / entrant.gap, again: 1 / entrant.gap}
        cell_ratio(contest, (text, name, "mean / fused"), mean, "AdamW fused")
    if entrant.polar:
        cell_ratio(contest, (text, name, "/ torch Muon"), once, "torch Muon")
    for other in entrant.peers:
        cell = (f"{text}, time / peer's", name, other)
        cell_ratio(contest, cell, once, f"{other} for {name}")


def every_optimizer(setting: Setting) -> Iterator[Contest]:
    """Step, refresh and mean step of each against torch, its peers and its limit.

    A contest for each class, so that the light ones need not wait for Muon.
    """
    for model in setting.models(USUAL, TINY):
        families: dict[str, dict[str, Entrant]] = {}
        for name, entrant in entrants(rank_for(model)).items():
            families.setdefault(name.split()[0], {})[name] = entrant
        for family in families.values():
            yield family_contest(family, model)


def family_contest(family: Mapping[str, Entrant], model: Model) -> Contest:
    """The variants of one class, torch's AdamW, and torch's Muon where that is a rival."""
    polar = any(entrant.polar for entrant in family.values())
    contest = Contest(
        {
            name: partial(Step, maker, model, swap=swap)
            for name, (maker, swap) in baselines().items()
            if polar or name != "torch Muon"
        }
    )
    for name, entrant in family.items():
        for other, find in entrant.peers.items():
            try:
                maker, swap = find(rank_for(model))
                key = f"{other} for {name}"
                contest.competitors[key] = partial(Step, maker, model, swap=swap)
            except Missing as why:
                contest.skipped.append(f"{other}: {why}")
        add_entrant(contest, name, entrant, model)
    return contest


def every_memory(setting: Setting) -> Iterator[Figure]:
    """State and peak temporaries of each, in bytes per byte of weights."""
    for model in setting.models(USUAL, TINY):
        total = 4 * sum(m * n for m, n in model)
        steps = [(name, "", maker, swap) for name, (maker, swap) in baselines().items()]
        for name, entrant in entrants(rank_for(model)).items():
            steps.append((name, "", entrant.step, contextlib.nullcontext))
            if entrant.refresh is not None:
                steps.append((name, "refresh ", entrant.refresh, contextlib.nullcontext))
            for other, find in entrant.peers.items():
                with contextlib.suppress(Missing):
                    maker, swap = find(rank_for(model))
                    steps.append((f"{other} for {name}", "", maker, swap))
        for name, kind, maker, swap in steps:
            step, text = Step(maker, model, swap=swap), label(model)
            numbers = {} if kind else {"state": state_bytes(step.optimizer)}
            numbers[f"{kind}temporaries"] = peak_of(step, 2)
            for column, value in numbers.items():
                title = f"{text} {name}: {column} / weights"
                panel = f"{text}, bytes / weights'"
                yield Figure(title, value / total, cell=(panel, name, column))


# --- The mean step of every class: a column of the README's table ---

COPIES = 3
"""AdamWs that a class is compared with: where their tensors lie makes 15 % of their time."""
MEAN = "mean step"
"""The column of the case and of the README: refreshes at the gap that a class comes with."""


def every_mean(setting: Setting) -> Iterator[Contest]:
    """Every class in its first variant on one weight; those for LoRA on 16 pairs of such."""
    (model,) = setting.models("1024x4096", "32x48")
    found = entrants(rank_for(model))
    for name in classes():
        suffix = next(iter(VARIANTS.get(name, {"": None})))
        entrant = found[f"{name} {suffix}".strip()]
        parts = {name: (entrant.step, 1.0)}
        if entrant.refresh is not None:
            share = 1 / entrant.gap
            parts = {name: (entrant.step, 1 - share), f"{name}, refresh": (entrant.refresh, share)}
        yield mean_contest(name, parts, model, "fused")
    (m, n), count, rank = model[0], 2 if setting.quick else 16, 16
    for name, parts in pair_parts(m, n, rank).items():
        yield mean_contest(name, parts, ((rank, n), (m, rank)) * count, "foreach")


def pair_parts(m: int, n: int, rank: int) -> dict[str, dict[str, tuple[Maker, float]]]:
    """The classes for LoRA; SwitchLoRA at the rate with which it begins to exchange vectors."""

    def made(
        params: list[Tensor], cls: type[PairOptimizer], has_base: bool = False, **options: Any
    ) -> PairOptimizer:
        base = (torch.nn.Parameter(torch.randn(m, n), requires_grad=False) for _ in params)
        factors = params[::2], params[1::2], *([base] if has_base else [])
        groups = pairs_to_groups(zip(*factors, strict=False), scale=2.0)
        return cls(groups, lr=1e-3, weight_decay=0.1, **options)

    # k vectors are due at a step, k = rank / interval0: none, or one at every step
    switch = partial(made, cls=SwitchLoRA, has_base=True, ratio=None)
    share = rank / inspect.signature(SwitchLoRA).parameters["interval0"].default
    return {
        "AltLoRA": {"AltLoRA": (partial(made, cls=AltLoRA), 1.0)},
        "AdaPreLoRA": {"AdaPreLoRA": (partial(made, cls=AdaPreLoRA), 1.0)},
        "SwitchLoRA": {
            "SwitchLoRA": (partial(switch, interval0=float("inf")), 1 - share),
            "SwitchLoRA, refresh": (partial(switch, interval0=float(rank)), share),
        },
    }


def mean_contest(
    name: str, parts: Mapping[str, tuple[Maker, float]], model: Model, flag: str
) -> Contest:
    """Steps of several kinds, each with its share of all steps, against torch's AdamW."""
    adamw = partial(torch.optim.AdamW, weight_decay=0.1, **{flag: True})
    rivals = [f"AdamW {flag} {i + 1}" for i in range(COPIES)]
    parts = {part: (maker, share) for part, (maker, share) in parts.items() if share}
    contest = Contest({rival: partial(Step, adamw, model) for rival in rivals})
    contest.competitors |= {part: partial(Step, maker, model) for part, (maker, _) in parts.items()}
    bottom = {rival: 1 / COPIES for rival in rivals}
    for part in parts:
        column = part.removeprefix(name).strip(" ,") or "step"
        cell = ("time / AdamW", name, column)
        contest.ratios.append(Ratio(f"{part} / AdamW {flag}", {part: 1.0}, bottom, cell=cell))
    cell = ("time / AdamW", name, MEAN)
    top = {part: share for part, (_, share) in parts.items()}
    contest.ratios.append(Ratio(f"{name}: {MEAN} / AdamW {flag}", top, bottom, cell=cell))
    return contest


USUAL = "1024x4096 4096x1024 96x96x16+256x96x8+96x256x4"
TINY = "16x32+32x16"

CASES: dict[str, Case] = {
    "galore-step": Case(
        "GaLore between refreshes, rank a quarter of the shorter side",
        galore_step,
        seconds=8.0,
        builds=3,
    ),
    "galore-refresh": Case(
        "a new basis, rank a quarter of the shorter side", galore_refresh, floor=5, seconds=30.0
    ),
    "fira-step": Case("Fira between refreshes, rank a quarter of the shorter side", fira_step),
    "apollo-step": Case(
        "APOLLO between draws, rank a quarter of the shorter side", apollo_step, seconds=8.0
    ),
    "dct-step": Case(
        "DCT-AdamW, rank a quarter of the shorter side", dct_step, seconds=15.0, builds=3
    ),
    "dct-stack": Case("DCT-AdamW on a stack", dct_stack, seconds=5.0, shaped=False),
    "muon-step": Case(
        "Muon on a transformer's matrices", muon_step, muon_quality, floor=7, seconds=60.0
    ),
    "low-rank-polar": Case(
        "randomized low-rank polar step", low_rank_polar, low_rank_quality, seconds=30.0, builds=2
    ),
    "frugal-step": Case(
        "FRUGAL between two splits, density a quarter", frugal_step, seconds=4.0, builds=5
    ),
    "auon-step": Case("AuON and its hybrid on one matrix", auon_step, floor=9, seconds=20.0),
    "trion-step": Case("Trion on one matrix", trion_step, floor=7, seconds=20.0),
    "pairs-step": Case("LoRA pairs", pairs_step, floor=7, seconds=20.0, shaped=False),
    "soap-step": Case("SOAP", soap_step, floor=3, seconds=30.0),
    "aro-step": Case("ARO on squares", aro_step, floor=7, seconds=30.0),
    "stacks": Case(
        "a stack of small experts in one parameter", stacks_step, seconds=15.0, shaped=False
    ),
    "adamw-parity": Case(
        "AdamW parameters against torch.optim.AdamW", adamw_parity, seconds=2.0, builds=9
    ),
    "overhead": Case(
        "200 matrices of 8x8", overhead, floor=61, seconds=4.0, builds=3, shaped=False
    ),
    "many-groups": Case(
        "a group for each parameter, 120 matrices", many_groups, seconds=4.0, shaped=False
    ),
    "writes": Case("bfloat16 weights, rounded in every way", writes, seconds=10.0, builds=3),
    "in-backward": Case("steps inside of the backward pass", in_backward, seconds=6.0),
    "memory": Case("state and temporaries", figures=memory),
    "optimizers": Case(
        "every optimizer; time ratios, then bytes per byte of weights",
        every_optimizer,
        every_memory,
        floor=4,
        seconds=10.0,
        builds=2,
    ),
    "amortised": Case(
        "mean step of every class, refreshes at their default gap; the README's column",
        every_mean,
        floor=3,
        seconds=5.0,
        shaped=False,
    ),
}
