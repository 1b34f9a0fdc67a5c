"""Published coefficient lists, the rules that regenerate them, and the maps they compose to.

Every polar method of this package acts on the singular values of its input alone: a singular
value x of the normalized matrix becomes phi(x). A polynomial step is x -> a x + b x^3 + c x^5, the
rational step is x -> C x (1 + sum_j a_j / (x^2 + c_j)). Nothing here touches a tensor.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from torch import Tensor

Triple = tuple[float, float, float]
Schedule = tuple[Triple, ...]
Scalar = TypeVar("Scalar", float, Tensor)

# The tuned quintic of the original Muon (and of torch.optim.Muon), used at every step.
NS5: Schedule = ((3.4445, -4.7750, 2.0315),)

# Five different quintics tuned by YouJiacheng.
NS5_TUNED: Schedule = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# Taylor's quintic: the limit of the minimax quintic as its interval shrinks to 1.
TAYLOR5: Schedule = ((15 / 8, -10 / 8, 3 / 8),)

# The classical Newton-Schulz cubic.
CUBIC: Schedule = ((1.5, -0.5, 0.0),)

# Polar Express (arXiv 2505.16932), l = 1e-3, before the safety factor.
POLAR_EXPRESS_CUSHION = 0.02407327424182761
POLAR_EXPRESS_SAFETY = 1.01
POLAR_EXPRESS_RAW: Schedule = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

# The variant of modded-nanogpt and dion: cushion 0.02, and the safety factor 1.02 taken inside the
# recursion, so that later polynomials know about it.
POLAR_EXPRESS_SAFE: Schedule = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

# Turbo-Muon (arXiv 2512.04632), for use after its row scaling.
TURBO: Schedule = (
    (4.6051, -9.6552, 5.6769),
    (4.7505, -6.0861, 2.1790),
    (2.7763, -2.3190, 0.5523),
    (2.4231, -2.2861, 0.8193),
)

# DeepSeek-V4's ten steps: Muon's quintic, which lifts and does not settle, then a map with the
# fixed point 1, where its derivative is 0.
DEEPSEEKV4: Schedule = (*((3.4445, -4.7750, 2.0315),) * 8, *((2.0, -1.5, 0.5),) * 2)

# Quintics of CANS (arXiv 2506.10935), with no room above 1: 1.001 ends at 2e23.
CANS: Schedule = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)

# Five cubics (arXiv 2606.00371), which need no product A A; 1.004 changes its sign.
CUBIC5: Schedule = (
    (3.3656576, -3.3420992, 0.0),
    (2.5744352, -1.4957376, 0.0),
    (2.5368962, -1.4312570, 0.0),
    (2.4418906, -1.2764040, 0.0),
    (2.2230472, -0.9630650, 0.0),
)


class Rational(NamedTuple):
    """One odd rational step x -> scale * x * (1 + sum_j weights[j] / (x^2 + shifts[j]))."""

    shifts: tuple[float, ...]
    weights: tuple[float, ...]
    scale: float


# zolotarev(l=3e-3, r=2): singular values of [3e-3, 1] land in 0.8709..1.1291.
ZOLO = Rational(
    shifts=(3.5636322490104075e-05, 0.012726403624296065),
    weights=(0.013362322128179524, 0.22713414108043445),
    scale=0.9123147825660636,
)


def with_safety(schedule: Schedule, factor: float) -> Schedule:
    """Replace p(x) by p(x / factor) in every step but the last, so that rounding cannot diverge."""
    *head, last = schedule
    return (*(_shrink(step, factor) for step in head), last)


def at_step(schedule: Schedule, steps: int) -> Schedule:
    """The first ``steps`` entries of a schedule whose last entry repeats for ever."""
    return schedule[:steps] + schedule[-1:] * (steps - len(schedule))


def _shrink(step: Triple, factor: float) -> Triple:
    a, b, c = step
    return a / factor, b / factor**3, c / factor**5


POLAR_EXPRESS: Schedule = with_safety(POLAR_EXPRESS_RAW, POLAR_EXPRESS_SAFETY)

# The Gram form wants more room below one: with 1.05 one restart is enough, with 1.01 it is not.
GRAM: Schedule = with_safety(POLAR_EXPRESS_RAW, 1.05)


def odd_quintic(step: Triple, x: Scalar) -> Scalar:
    """The value a x + b x^3 + c x^5."""
    a, b, c = step
    y = x * x
    return x * (a + y * (b + y * c))


def odd_rational(step: Rational, x: Scalar) -> Scalar:
    """The value scale * x * (1 + sum_j weights[j] / (x^2 + shifts[j]))."""
    total = 0.0 * x + 1.0
    for shift, weight in zip(step.shifts, step.weights, strict=True):
        total = total + weight / (x * x + shift)
    return step.scale * x * total


# --- Minimax quintics (Polar Express, arXiv 2505.16932) ---


def polar_express_schedule(
    l: float = 1e-3,
    steps: int = 8,
    *,
    cushion: float = POLAR_EXPRESS_CUSHION,
    safety: float = 1.0,
) -> Schedule:
    """Greedy minimax odd quintics for singular values in [l, 1].

    Each step is the best odd quintic approximation of 1 on the interval that the previous steps
    left. An interval wider than ``1 / cushion`` is cut to that ratio, because the unrestricted
    optimum would push small singular values the wrong way in finite precision; the result is then
    scaled so that it is centred on the true interval again.

    Args:
        l: lower end of the singular values, relative to the norm used.
        steps: length of the schedule.
        cushion: least ratio of lower to upper end that a polynomial is fitted on.
        safety: p(x / safety) replaces p(x) inside the recursion for every step but the last. (The
            published Polar Express list takes its factor afterwards: see ``with_safety``.)

    Returns:
        A tuple of ``steps`` triples (a, b, c).

    Source: Amsel et al., Polar Express, arXiv 2505.16932.
    """
    u = 1.0
    schedule: list[Triple] = []
    for index in range(steps):
        step = _minimax_quintic(max(l, cushion * u), u)
        if cushion * u > l:
            centre = 2 / (odd_quintic(step, l) + odd_quintic(step, u))
            step = (step[0] * centre, step[1] * centre, step[2] * centre)
        if index < steps - 1:
            step = _shrink(step, safety)
        schedule.append(step)
        l = odd_quintic(step, l)
        u = 2 - l
    return tuple(schedule)


def _minimax_quintic(l: float, u: float) -> Triple:
    """The odd quintic nearest to 1 on [l, u], by exchange on the four points l < q < r < u."""
    if l / u >= 1 - 5e-6:  # the exchange is ill conditioned here, and Taylor is as good
        return 15 / 8 / u, -10 / 8 / u**3, 3 / 8 / u**5
    q, r = (3 * l + u) / 4, (l + 3 * u) / 4
    last = math.inf
    while True:
        points = np.array([l, q, r, u])
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        system = np.stack([points, points**3, points**5, signs], axis=1)
        a, b, c, error = (float(v) for v in np.linalg.solve(system, np.ones(4)))
        if abs(error - last) < 1e-15:
            return a, b, c
        last = error
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))


def cheb_cubic_schedule(l: float = 1e-3, steps: int = 10) -> Schedule:
    """Greedy minimax odd cubics for singular values in [l, 1], in closed form.

    On [l, u] let e^2 = (u^2 + u l + l^2) / 3, where the cubic has its maximum, and
    D = 2 e^3 + l u (l + u). Then a = 6 e^2 / D, b = -2 / D and the error is
    E = (2 e^3 - l u (l + u)) / D, so that [1 - E, 1 + E] is the next interval.

    Args:
        l: lower end of the singular values, relative to the norm used.
        steps: length of the schedule.

    Returns:
        A tuple of ``steps`` triples (a, b, 0).

    Source: the family of CANS, arXiv 2506.10935.
    """
    u = 1.0
    schedule: list[Triple] = []
    for _ in range(steps):
        e2 = (u * u + u * l + l * l) / 3
        cube, rest = 2 * e2**1.5, l * u * (l + u)
        schedule.append((6 * e2 / (cube + rest), -2 / (cube + rest), 0.0))
        error = (cube - rest) / (cube + rest)
        l, u = 1 - error, 1 + error
    return tuple(schedule)


CHEB_CUBIC: Schedule = cheb_cubic_schedule()


# --- Zolotarev's rational function (Nakatsukasa and Freund, SIAM Review 58(3), 2016) ---


@lru_cache(maxsize=64)
def zolotarev(l: float = 3e-3, r: int = 2) -> Rational:
    """The odd rational function of type (2r+1, 2r) that is nearest to 1 on [l, 1].

    With K' = K(1 - l^2) and i = 1..2r the nodes are c_i = l^2 tan^2(am(i K'/(2r+1) | 1 - l^2));
    the odd ones are the poles, the even ones the zeros. The function equioscillates on 2r + 2
    points, both ends among them, lowest at l and highest at 1, so ``scale`` centres it on 1.

    Args:
        l: lower end of the singular values, 0 < l < 1.
        r: number of poles, that is of Cholesky factorizations, at least 1.

    Returns:
        The step in partial fractions: ``shifts`` are c_1, c_3, ..., ``weights`` a_1, ..., a_r.

    Raises:
        ValueError: if l or r is out of range.

    Source: Nakatsukasa and Freund, Computing fundamental matrix decompositions accurately via the
    matrix sign function in two iterations, SIAM Review 58(3), 2016.
    """
    if not 0 < l < 1:
        raise ValueError(f"l={l} must lie strictly between 0 and 1: pass a value such as 3e-3")
    if r < 1:
        raise ValueError(f"r={r} must be at least 1: pass r=2 for the default accuracy")
    nodes = [l * l * t * t for t in _tan_amplitudes(l, 2 * r)]
    poles, zeros = nodes[0::2], nodes[1::2]
    weights = tuple(
        -math.prod(c - z for z in zeros) / math.prod(c - p for p in poles if p != c) for c in poles
    )
    raw = Rational(tuple(poles), weights, 1.0)
    return raw._replace(scale=2 / (odd_rational(raw, l) + odd_rational(raw, 1.0)))


def _tan_amplitudes(l: float, count: int) -> list[float]:
    """tan(am(i K / (count + 1) | 1 - l^2)) for i = 1..count, by the arithmetic-geometric mean."""
    a, b = 1.0, l
    ratios: list[float] = []
    while abs(a - b) > 1e-16 * a and len(ratios) < 40:
        a, b, c = (a + b) / 2, math.sqrt(a * b), (a - b) / 2
        ratios.append(c / a)
    # K = pi / (2 a), and the ascent starts from 2^N a u, so the mean itself cancels.
    tangents: list[float] = []
    for i in range(1, count + 1):
        phi = 2.0 ** len(ratios) * math.pi / 2 * i / (count + 1)
        for ratio in reversed(ratios):
            phi = (phi + math.asin(ratio * math.sin(phi))) / 2
        tangents.append(math.tan(phi))
    return tangents


def as_schedule(coefficients: Sequence[float] | Sequence[Sequence[float]]) -> Schedule:
    """Read one triple (a, b, c), or a sequence of them, as a schedule.

    Raises:
        ValueError: if it is neither.
    """
    rows: list[object] = list(coefficients)
    if len(rows) == 3 and all(isinstance(v, int | float) for v in rows):
        rows = [rows]
    schedule: list[Triple] = []
    for row in rows:
        if not isinstance(row, Sequence) or len(row) != 3:
            raise ValueError(
                "coefficients must be a tuple of exactly 3 values or a sequence of such tuples: "
                "pass for example (3.4445, -4.7750, 2.0315)"
            )
        schedule.append((float(row[0]), float(row[1]), float(row[2])))
    if not schedule:
        raise ValueError("coefficients is empty: pass at least one triple (a, b, c)")
    return tuple(schedule)


ZOLO_LARGE = zolotarev(1e-3, 3)
"""The step of ``zolo`` for large matrices: three poles, 0.94..1.06 on [1e-3, 1], slope 1322."""
