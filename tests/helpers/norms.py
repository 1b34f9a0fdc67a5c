"""The published forms of weight control, one step after the other, in float64."""

import torch

from stiefel.optimizers._driver.norms import parse


def _norm(X, scope):
    dims = {"rows": (-1,), "matrix": (-2, -1), "whole": (-3, -2, -1)}[scope]
    return X.square().sum(dims, keepdim=True).sqrt()


def _dot(X, Y, scope):
    dims = {"rows": (-1,), "matrix": (-2, -1), "whole": (-3, -2, -1)}[scope]
    return (X * Y).sum(dims, keepdim=True)


def _share(is_outward, control):
    return is_outward.double() * control.outward + (~is_outward).double() * control.inward


def oracle_step(words, W, U, lr, decay, radii, cautious=False):
    """W (K, m, n) after a step along U, and the radii, None where there are none.

    Args:
        words: A value of `weight_norm`.
        W: The weights, rows as the words mean them.
        U: The step without lr.
        lr: Learning rate.
        decay: Weight decay.
        radii: What the step before returned, at first None.
        cautious: Whether decay comes after the step, where the step makes an entry smaller.
    """
    if words is None:
        return W * (1 - lr * decay) - lr * U, None
    control, old = parse(words), W
    steered = control.radius is not None
    if not (control.radius == "sphere" or (cautious and steered)):
        keep = 1 - lr * decay
        W = torch.where(U * W < 0, W, keep * W) if cautious else keep * W
    scope = control.radius_scope
    if control.radius == "sphere":
        radii = _norm(W, scope) if radii is None else radii
    if control.radius == "pin":
        c, w2 = _dot(U, old, scope), _norm(old, scope).square()
        share = _share(c < 0, control)
        U = U - (1 - share) * c / w2 * old
    undamped = U
    w, u = _norm(W, control.size_scope), _norm(U, control.size_scope)
    if control.size == "floor":
        U = torch.where(u > 0, U * (control.kappa * w / u).clamp(min=1), U)
    if control.size == "relative":
        same = control.radius == "sphere" and control.size_scope == scope
        U = torch.where(u > 0, U * (radii if same else w) / u, U)
    X = W - lr * U
    x, a = _norm(X, scope), _norm(W, scope)
    if control.radius == "sphere":
        X = X * radii / x
    if control.radius == "brake":
        share = _share(x > a, control)
        X = X * (a + share * (x - a)) / x
    if control.radius == "pin":
        X = X * (a - lr * _dot(U, old, scope) / _norm(old, scope)) / x
    if cautious and steered:
        X = torch.where(undamped * old >= 0, (1 - lr * decay) * X, X)
    return X, radii
