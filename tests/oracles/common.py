"""What several oracles rest on: polar factors, AdamW, the signs of a basis."""

import torch


def polar(U):
    """The exact polar factor through an SVD."""
    left, s, right = torch.linalg.svd(U, full_matrices=False)
    keep = (s > max(U.shape) * torch.finfo(U.dtype).eps * s[0]).to(U.dtype) if s[0] > 0 else s * 0
    return (left * keep) @ right


def newton_schulz(U, a=3.4445, b=-4.7750, c=2.0315, steps=5):
    """The quintic iteration of torch.optim.Muon in the precision of U."""
    X = U.T if U.shape[0] > U.shape[1] else U
    X = X / max(float(X.norm()), 1e-7)
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if U.shape[0] > U.shape[1] else X


def adamw(W, grads, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """torch.optim.AdamW; returns the weights after every step."""
    W, M, V, out = W.double().clone(), 0.0, 0.0, []
    for t, G in enumerate(grads, 1):
        G = G.double()
        M = betas[0] * M + (1 - betas[0]) * G
        V = betas[1] * V + (1 - betas[1]) * G * G
        N = (M / (1 - betas[0] ** t)) / ((V / (1 - betas[1] ** t)).sqrt() + eps)
        W = (1 - lr * weight_decay) * W - lr * N
        out.append(W.clone())
    return out


def signs(P):
    """Every column's largest entry positive."""
    top = P.gather(0, P.abs().argmax(0, keepdim=True))
    return torch.where(top < 0, -P, P)
