"""Random uses of every optimizer: how a case is run, judged and made smaller.

A case is plain data (``fuzz_cases.py``). It is right, or refused by one sentence that names the
parameter or keyword with nothing changed; all else is a finding.
"""

from __future__ import annotations

import copy
import inspect
import numbers
import pickle
import random
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from helpers.fuzz_cases import OPTIONS, Case, value_of
from helpers.fuzz_checkpoints import mutate
from helpers.fuzz_uses import Use, bits, differences, is_dense, snapshot, spec_of
from helpers.fuzz_values import (
    BITWISE_EVENTS,
    FOREIGN_KEYS,
    KINDS,
    LORA,
    ODD_GRADS,
)
from stiefel.optimizers import StackedOptimizer
from stiefel.optimizers._driver.adamw import betas_of, decay_of, lr_of
from stiefel.optimizers._driver.saved_state import SUMS


@dataclass
class Outcome:
    """What became of a case: right, refused (and about what), or a finding."""

    verdict: str
    stepped: bool = False
    finding: tuple[str, ...] = ()
    text: str = ""


class Found(Exception):
    """A finding; its arguments are equal for findings of one kind."""


# judging ------------------------------------------------------------------------------------------

TORCH_TEXTS = re.compile(
    "optimizer got an empty parameter list|params argument given to the optimizer should be"
    "|optimizer parameters need to be organized in ordered|optimizer can only optimize Tensors"
    "|can't optimize a non-leaf Tensor|some parameters appear in more than one parameter group"
    "|should be with/without names|does not support sparse gradients"
    "|loaded state dict has a different number of|loaded state dict contains a parameter group"
    "|all optimizer params should be|expected dtype .* for `(end|weight)`"
)
"""Sentences of torch.optim.Optimizer and AdamW, which every torch optimizer says."""
WORDS = {
    "adjust_lr_fn": "Adjust learning rate function", "lr": "learning rate", "eps": "epsilon",
    "betas": "beta parameter", "adamw_betas": "beta", "adamw_lr": "learning rate",
    "rule": "method", "num_heads": "view", "split_sizes": "view", "matrix_view": "view",
    "views": "view", "sides": "side", "rules": "rule",
}  # fmt: skip
"""How torch's sentences, and ours, speak of some keywords."""
AMOUNTS = ("lr", "weight_decay", "adamw_lr", "adamw_weight_decay", "adamw_lr_ratio")


def says(word: str, text: str) -> bool:
    return re.search(rf"(?<![\w]){re.escape(word)}(?![\w])", text) is not None


def names_it(error: BaseException, case: Case, use: Use, stage: str) -> bool:
    """Whether a sentence names what it is about."""
    text = str(error)
    if TORCH_TEXTS.search(text):
        return True
    if re.search(r"parameter (group )?(\d+|'|\S+\.)|pair \d+", text):
        return True
    words = [key for key, _ in case.options] + [key for _, key, _ in case.group_keys]
    words += [key for _, key, _ in case.writes] + list(use.names)
    if case.load:  # a value of the checkpoint's groups may be refused at the step
        words += OPTIONS[case.cls]
    if stage == "load":
        words += ["checkpoint", "state_dict", "param_groups"]
    return any(says(w, text) or (w in WORDS and WORDS[w] in text) for w in words)


def where(error: BaseException) -> str:
    """File and function of the last frames of a traceback, without line numbers."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "fuzz.py" not in f.filename]
    parts = [f"{f.filename.rpartition('/')[2]}:{f.name}" for f in ours[-2:]]
    return " > ".join(parts)


def shape_of_text(text: str) -> str:
    return re.sub(r"'[^']*'|\d[\d.e+-]*", "#", text.splitlines()[0] if text else "")[:80]


def judge(error: BaseException, case: Case, use: Use, stage: str, changed: list[str]) -> str:
    """The kind of a refusal; raises Found where it is none."""
    kind, text = type(error), str(error)
    of_torch = kind is AssertionError and "capturable" in text and "foreach" not in text
    if kind not in (ValueError, TypeError, RuntimeError) and not of_torch:
        raise Found(f"{kind.__name__} in {stage}", where(error), shape_of_text(text))
    if changed:
        raise Found(f"changed by a refused {stage}", ", ".join(changed), where(error))
    if not names_it(error, case, use, stage):
        raise Found(f"{kind.__name__} in {stage} names nothing", where(error), shape_of_text(text))
    if "\n" in text.strip() and len(text) > 600:
        raise Found("a refusal of many lines", where(error))
    if case.event:
        return "parameter"
    if case.site == "plain" and not case.group_keys:
        return "keyword" if len(case.options) else _refused_plainly(error, case)
    return "keyword" if case.site == "plain" else case.site


def _refused_plainly(error: BaseException, case: Case) -> str:
    raise Found("a documented use is refused", where(error), shape_of_text(str(error)))


def is_tame(optimizer: StackedOptimizer) -> bool:
    """Whether all sizes of the groups are such that finite gradients give finite weights.

    An eps of 0 is not, as in ``torch.optim.AdamW``, unless the class itself has it as its default;
    what ``adamw_eps`` does is compared with torch.
    """
    signature = inspect.signature(type(optimizer)).parameters
    defaults = {key: parameter.default for key, parameter in signature.items()}
    defaults["adamw_eps"] = optimizer.defaults.get("adamw_eps")
    for group in optimizer.param_groups:
        for key, value in group.items():
            if isinstance(value, Tensor):
                fits = value.numel() == 1 and value.device.type == "cpu" and not value.is_complex()
                value = float(value) if fits else 99.0
            if isinstance(value, (list, tuple)) and "betas" not in key:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
                continue
            if key in AMOUNTS and not 0 <= value <= 1:
                return False
            if "eps" in key and value < 1e-12 and value != defaults.get(key):
                return False
            if not abs(value) <= (50 if isinstance(value, float) else 10_000):
                return False
    return True


# running ------------------------------------------------------------------------------------------


def run_case(case: Case) -> Outcome:
    """Run and judge a case."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _run(case)
        except Found as found:
            return Outcome("finding", finding=found.args, text=str(found.__cause__ or ""))


def _run(case: Case) -> Outcome:
    try:
        use = Use(case)
    except Exception as error:  # the fuzzer's own
        raise AssertionError(f"the case cannot be built: {error}\n{case}") from error
    weights = [bits(p) for p in use.params]
    try:
        use.make()
    except Exception as error:
        changed = ["weights"] if weights != [bits(p) for p in use.params] else []
        return Outcome(judge(error, case, use, "construction", changed), text=str(error))
    _check_foreign_keys(use)
    saved: Any = None
    stepped, moved = False, set[int]()  # seen at any step: two first steps may cancel
    for k in range(len(case.grads)):
        if k == case.save_at and not case.load:
            saved = ([_clone(p) for p in use.params], copy.deepcopy(_state_dict(use)))
        if k == case.save_at and case.load:
            refusal = _load_mutated(use)
            if isinstance(refusal, Outcome):
                return replace(refusal, stepped=stepped)
            use = refusal
        refusal = _step(use, k)
        if refusal is not None:
            return replace(refusal, stepped=stepped)
        now = [bits(p) for p in use.params]
        stepped = stepped or now != weights
        moved |= {i for i, (a, b) in enumerate(zip(weights, now, strict=False)) if a != b}
    if case.load and case.save_at == len(case.grads):
        refusal = _load_mutated(use)
        if isinstance(refusal, Outcome):
            return replace(refusal, stepped=stepped)
        use = refusal
        refusal = _step(use, len(case.grads) - 1)
        if refusal is not None:
            return replace(refusal, stepped=stepped)
    if not case.load:
        if not case.event or case.event in BITWISE_EVENTS:
            _check_resume(replace(case, event=""), use, *saved)
        _check_moved(use, moved)
    return Outcome("right", stepped=stepped)


def _clone(p: Any) -> Any:
    return p.detach().clone() if is_dense(p) else p


def _state_dict(use: Use) -> Any:
    try:
        return use.optimizer.state_dict()
    except Exception as error:
        raise Found("state_dict raises", type(error).__name__, where(error)) from error


def _check_foreign_keys(use: Use) -> None:
    for _, key, source in use.case.group_keys:
        kept = any(
            bits(group.get(key)) == bits(value_of(source)) for group in use.optimizer.param_groups
        )
        if key in FOREIGN_KEYS and not kept:
            raise Found("a foreign group key is lost", key)


def _step(use: Use, k: int) -> Outcome | None:
    """One step; None, or the outcome of a refusal, after which the optimizer must go on."""
    case, optimizer = use.case, use.optimizer
    undo = []
    for at, key, source in case.writes:
        if at == k:
            group = optimizer.param_groups[-1]
            undo.append((group, key, group.get(key, undo)))
            group[key] = value_of(source)
    if case.event and k == len(case.grads) - 1:
        happen(use, case.event)
        optimizer = use.optimizer
    bad = use.set_gradients(k)
    before, as_torch = snapshot(use), _NotFiniteInTorch(use)
    try:
        if case.event == "other device default" and k == len(case.grads) - 1:
            with torch.device("meta"):
                optimizer.step()
        else:
            optimizer.step()
    except Exception as error:
        kind = judge(error, case, use, "step", differences(before, snapshot(use)))
        _go_on(use, k, undo)
        return Outcome(kind, text=str(error))
    choices = {str(group.get("nonfinite")) for group in optimizer.param_groups}
    ignore = "ignore" in choices
    if is_tame(optimizer) and not (bad and ignore):
        _check_finite(use, k, as_torch)
    if bad and choices == {"raise"}:
        raise Found("nonfinite='raise' does not raise", case.cls)
    return None


def happen(use: Use, event: str) -> None:
    """Let something happen to model and optimizer between two steps."""
    if event in ("copy", "pickle"):
        pair = (use.params, use.optimizer)
        pair = copy.deepcopy(pair) if event == "copy" else pickle.loads(pickle.dumps(pair))
        use.params, use.optimizer = pair
        return
    for p in use.params:
        if not is_dense(p) or not p.is_floating_point():
            continue
        if event == "cast":
            p.data, p.grad = p.data.bfloat16(), None
        elif event == "other memory" and p.ndim > 1:
            p.data = p.data.mT.contiguous().mT
    group = use.optimizer.param_groups[-1]
    if event == "clear state":
        use.optimizer.state.clear()
    elif event == "append" and use.case.cls not in LORA and "param_names" not in group:
        group["params"].append(nn.Parameter(torch.ones(3, 3)))


def _go_on(use: Use, k: int, undo: list[Any]) -> None:
    """After a refused step, the step without the odd thing is taken."""
    if use.case.site not in ("write", "gradient"):
        return
    for group, key, old in undo:
        if old is undo:
            del group[key]
        else:
            group[key] = old
    group = use.optimizer.param_groups[-1]
    for at, key, _ in use.case.writes:  # what was written while nothing could be stepped
        if at < k and key in use.optimizer.defaults:
            group[key] = use.optimizer.defaults[key]
    use.set_gradients(k, drop_odd=True)
    try:
        use.optimizer.step()
    except Exception as error:
        raise Found("no step after a refused one", type(error).__name__, where(error)) from error


class _NotFiniteInTorch:
    """What ``torch.optim.AdamW`` makes not finite where its eps is 0: zero gradients give 0 / 0.

    It is made before a step, and copies what AdamW reads.
    """

    def __init__(self, use: Use) -> None:
        state = use.optimizer.state
        self.before = {
            id(p): (p.detach().clone(), copy.deepcopy(dict(state.get(p, {}))), group)
            for group in use.optimizer.param_groups
            if isinstance(eps := group.get("adamw_eps"), numbers.Real) and eps == 0
            for p in group["params"]
            if is_dense(p) and p.dtype.is_floating_point
        }

    def agrees(self, p: Tensor) -> bool:
        """Whether a parameter was as little finite before, or is so after torch's step."""
        if id(p) not in self.before:
            return False
        W, entry, group = self.before[id(p)]
        if p.grad is None or torch.equal(W.isfinite(), p.isfinite()):
            return torch.equal(W.isfinite(), p.isfinite())
        W.grad = p.grad
        options = {"lr": lr_of(group), "betas": betas_of(group), "eps": group["adamw_eps"]}
        theirs = torch.optim.AdamW([W], **options, weight_decay=decay_of(group))
        if entry:
            theirs.state[W] = entry
        theirs.step()
        return torch.equal(W.isfinite(), p.isfinite())


def _check_finite(use: Use, k: int, as_torch: _NotFiniteInTorch) -> None:
    case, adamw = use.case, _adamw_parameters(use.optimizer)
    for i, p in enumerate(use.params):
        if not is_dense(p) or not p.dtype.is_floating_point or p.dtype.itemsize == 1:
            continue
        if bool(p.isfinite().all()):
            continue
        if id(p) in adamw and spec_of(case, use, p).dtype == "float16":
            continue  # moments in float16, as in torch.optim.AdamW: 0 / 0; a cast may follow
        if id(p) in adamw and as_torch.agrees(p):
            continue
        kinds = {row[i] for row in case.grads[: k + 1] if i < len(row)}
        odd = sorted(kinds & set(ODD_GRADS)) or ["plain gradients"]
        if id(p) in adamw:
            raise Found("AdamW parameter is not finite", odd[0])
        raise Found("matrix is not finite", case.cls, f"{p.dtype} {odd[0]}")
    huge = {"1e20", "1e30", "1e37"} & {kind for row in case.grads for kind in row}
    for p, entry in use.optimizer.state.items():
        if not isinstance(entry, dict):
            raise Found("an entry of the state is no dict", type(entry).__name__)
        for key, value in entry.items():
            if not is_dense(value) or not value.is_floating_point():
                continue
            if bool(value.isnan().any()):
                raise Found("NaN in the state", case.cls, key)
            half = id(p) in adamw and value.dtype is torch.float16
            # gradients above 1e19 make infinite sums of squares, which may be loaded too
            is_sum = key.partition(".")[0].removesuffix("_scale") in SUMS
            may_be_inf = half or (is_sum and (huge or case.load)) or key == "polar_report"
            if bool(value.isinf().any()) and not may_be_inf:
                raise Found("inf in the state", case.cls, key)


def _adamw_parameters(optimizer: StackedOptimizer) -> set[int]:
    """Ids of the parameters that AdamW trains."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        rows = list(optimizer.assignment())
    except Exception as error:
        raise Found("assignment raises", type(error).__name__, where(error)) from error
    return {id(p) for p, row in zip(params, rows, strict=False) if row.rule == "adamw"}


def _check_moved(use: Use, moved: set[int]) -> None:
    """Every parameter with only normal gradients has moved."""
    case, options = use.case, dict(use.case.options)
    if case.site not in ("plain", "gradient") or case.writes or case.group_keys:
        return
    rests = {"state_free", "split", "schedule", "freeze_steps", "state_dtype", "spike_ratio"}
    if rests & options.keys() or case.cls in LORA or case.cls == "FRUGAL":
        return
    for i, p in enumerate(use.params):
        row = {kinds[i] for kinds in case.grads}
        spec = spec_of(case, use, p)
        if case.cls == "SOAP" and (len(case.grads) == 1 or case.event):
            continue  # the first gradient, also that after an event, gives bases and moves nothing
        short = spec.shape[-1:] if options.get("axis") == "'cols'" else spec.shape[:1]
        if options.get("centred") == "True" and short == (1,):
            continue  # one row less its mean is zero
        if row == {"normal"} and spec.kind in ("plain", "strided") and p.numel():
            if i not in moved and spec.dtype in ("float32", "float64"):
                raise Found("a parameter with a gradient does not move", case.cls, str(spec.shape))


def _check_resume(case: Case, use: Use, weights: list[Any], saved: Any) -> None:
    """A new optimizer that loads the saved state gives the bits of the uninterrupted run."""
    other = Use(case, weights)
    for i, p in enumerate(other.params):  # a model that was unfrozen before stays so
        spec = spec_of(case, other, p) if isinstance(p, Tensor) else None
        if spec is not None and spec.kind == "thawed" and case.save_at > 1:
            p.requires_grad_(True)
        if spec is not None and spec.kind == "lazy" and case.save_at > 0:
            p.materialize(spec.shape)
            with torch.no_grad():
                p.copy_(weights[i])
    other.make()
    try:
        other.optimizer.load_state_dict(saved)
    except Exception as error:
        overflowed = not all(bool(W.isfinite().all()) for W in weights if is_dense(W))
        if overflowed and "is not finite" in str(error):
            return  # state that follows weights which huge settings have made infinite
        raise Found(
            "its own checkpoint is refused", type(error).__name__, where(error),
            shape_of_text(str(error)),
        ) from error  # fmt: skip
    redraws = any(group.get("save_pools") is False for group in other.optimizer.param_groups)
    for k in range(case.save_at, len(case.grads)):
        if _step(other, k) is not None:
            raise Found("a resumed run refuses a step", case.cls)
    if redraws:
        return  # candidates that no checkpoint holds are drawn anew, as the option says
    found = differences((*snapshot(use)[:2], ()), (*snapshot(other)[:2], ()))
    if found:
        first = "from the start" if case.save_at == 0 else "resumed"
        raise Found(f"{first}: other bits", case.cls, ", ".join(found))


def _load_mutated(use: Use) -> Use | Outcome:
    """Load a mutated checkpoint; the use that goes on, or the outcome of a refusal."""
    case = use.case
    saved = copy.deepcopy(_state_dict(use))
    rng = random.Random(case.seed)
    for kind in case.load:
        saved = mutate(saved, kind, rng)
    target = use
    if not case.into_running:
        target = Use(case, [_clone(p) for p in use.params])
        for spec, p in zip(case.params, target.params, strict=False):
            if spec.kind == "thawed" and len(case.grads) > 1:
                p.requires_grad_(True)
        target.make()
    before = snapshot(target)
    try:
        target.optimizer.load_state_dict(saved)
    except Exception as error:
        changed = differences(before, snapshot(target))
        kind = judge(error, case, use, "load", changed)
        try:
            target.set_gradients(len(case.grads) - 1)
            target.optimizer.step()
        except Exception as later:
            raise Found("no step after a refused load", where(later)) from later
        return Outcome(kind, text=str(error))
    return target


# smaller cases ------------------------------------------------------------------------------------


def smaller(case: Case) -> Iterator[Case]:
    """Cases with one thing less."""
    if case.late is not None:
        yield replace(case, late=None)
    if case.event:
        yield replace(case, event="")
    for name in ("options", "group_keys", "writes", "load"):
        items = getattr(case, name)
        for i in range(len(items)):
            yield replace(case, **{name: items[:i] + items[i + 1 :]})
    if len(case.grads) > 1:
        for k in range(len(case.grads)):
            yield replace(
                case,
                grads=case.grads[:k] + case.grads[k + 1 :],
                save_at=min(case.save_at, len(case.grads) - 1),
                writes=tuple((min(at, len(case.grads) - 2), *rest) for at, *rest in case.writes),
            )
    step = 1 if case.cls not in LORA else 3 if case.cls == "SwitchLoRA" else 2
    if len(case.params) > 1:
        for i in range(len(case.params)):
            yield replace(
                case,
                params=case.params[:i] + case.params[i + 1 :],
                grads=tuple(row[: step * i] + row[step * (i + 1) :] for row in case.grads),
            )
    for i, spec in enumerate(case.params):
        for plain in (replace(spec, kind="plain"), replace(spec, dtype="float32")):
            if plain != spec:
                yield replace(case, params=(*case.params[:i], plain, *case.params[i + 1 :]))
    for k, row in enumerate(case.grads):
        for i, kind in enumerate(row):
            if kind != "normal":
                new = (*row[:i], "normal", *row[i + 1 :])
                yield replace(case, grads=(*case.grads[:k], new, *case.grads[k + 1 :]))
    plain_form = "pairs" if case.cls in LORA else "list"
    if case.form != plain_form:
        yield replace(case, form=plain_form)


def reduce_case(case: Case, finding: tuple[str, ...], tries: int = 200) -> Case:
    """A smaller case with the same finding."""
    shrunk = True
    while shrunk and tries > 0:
        shrunk = False
        for candidate in smaller(case):
            tries -= 1
            try:
                outcome = run_case(candidate)
            except Exception:
                continue
            if outcome.finding == finding:
                case, shrunk = candidate, True
                break
            if tries <= 0:
                break
    return case


@dataclass
class Report:
    """Counts of outcomes, and the first case of each kind of finding."""

    verdicts: Counter[str] = field(default_factory=Counter)
    stepped: int = 0
    findings: dict[tuple[str, ...], Case] = field(default_factory=dict)
    counts: Counter[tuple[str, ...]] = field(default_factory=Counter)

    def add(self, case: Case, outcome: Outcome) -> None:
        self.verdicts[outcome.verdict] += 1
        self.stepped += outcome.stepped
        if outcome.finding:
            self.findings.setdefault(outcome.finding, case)
            self.counts[outcome.finding] += 1

    @property
    def cases(self) -> int:
        return sum(self.verdicts.values())

    def __str__(self) -> str:
        refused = ", ".join(f"{kind} {self.verdicts[kind]}" for kind in KINDS)
        return (
            f"{self.cases} cases: {self.stepped} took a step; {self.verdicts['right']} right; "
            f"refused: {refused}; findings: {self.verdicts['finding']} of "
            f"{len(self.findings)} kinds"
        )

    def reproducers(self, most: int = 20) -> str:
        """One small case for each kind of finding."""
        parts = []
        for finding, count in self.counts.most_common(most):
            case = reduce_case(self.findings[finding], finding)
            parts.append(f"{count} x {' | '.join(finding)}\n{case}")
        return "\n\n".join(parts)
