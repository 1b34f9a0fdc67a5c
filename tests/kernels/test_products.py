"""Products of stacks have the bits of their matrices, whatever their sizes, sides and dtypes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.kernels import adam, add_product_, product, rotated, row_step_, sinkhorn

SIDES = st.sampled_from([1, 2, 3, 5, 7, 8, 10, 17, 24, 33, 50, 96, 129])
DTYPES = st.sampled_from([torch.float32, torch.float64])


def draw(*shape, dtype, seed, transposed):
    shape = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    X = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return X.mT if transposed else X


def alone(X, i):
    """Matrix i in a buffer of its own, turned as in the stack."""
    return X[i : i + 1].clone()


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIDES, DTYPES, st.integers(0, 2**16), st.tuples(*[st.booleans()] * 3))
def test_stack_equals_its_matrices_bitwise(m, k, n, dtype, seed, transposed):
    a, b, w = transposed
    A = draw(3, m, k, dtype=dtype, seed=seed, transposed=a)
    B = draw(3, k, n, dtype=dtype, seed=seed + 1, transposed=b)
    W = draw(3, m, n, dtype=dtype, seed=seed + 2, transposed=w)
    parts = [product(alone(A, i), alone(B, i)) for i in range(3)]
    assert torch.equal(product(A, B), torch.cat(parts))
    torch.testing.assert_close(product(A, B), torch.einsum("kmi,kin->kmn", A, B))
    if w:
        return  # the driver writes a turned weight turned back
    whole = W.clone()
    add_product_(whole, A, B, beta=0.9, alpha=-0.3)
    for i in range(3):
        one = W[i : i + 1].clone()
        add_product_(one, alone(A, i), alone(B, i), beta=0.9, alpha=-0.3)
        assert torch.equal(whole[i : i + 1], one)
    torch.testing.assert_close(whole, 0.9 * W - 0.3 * torch.einsum("kmi,kin->kmn", A, B))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_the_narrower_operand_is_widened(narrow):
    A, B = torch.randn(2, 3, 4).to(narrow), torch.randn(2, 4, 5)
    assert product(A, B).dtype == torch.float32
    torch.testing.assert_close(product(A, B), A.float() @ B)


@pytest.mark.parametrize("mode", ["relative", "add"])
def test_a_step_of_rows_refuses_a_mode_that_it_cannot_do(mode):
    W, M, G = (torch.ones(1, 2, 3) for _ in range(3))
    with pytest.raises(ValueError, match="mode"):
        row_step_(W, M, G, 0.9, 1e-8, mode, 1.0, -0.1)
    assert bool((W == 1).all() and (M == 1).all())


@pytest.mark.parametrize("shape", [(40, 64), (128, 512), (7, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_by_column", [False, True])
def test_a_direction_in_the_place_of_its_gradient_has_the_same_bits(shape, dtype, is_by_column):
    """One parameter of zeros, or R times zero, is the same start; negative zeros count as zeros."""

    def laid_out(X):
        return X.mT.contiguous().mT if is_by_column else X

    R, M, V = (laid_out(draw(2, *shape, dtype=dtype, seed=i, transposed=False)) for i in range(3))
    R[0, 0], V = 0.0, V.square()
    M[0, 0] = 0.0
    given = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    kept = R.clone(), M.clone(), V.clone()
    N = adam(R, M, V, 3, **given)
    assert torch.equal(R, kept[0])
    S, K, U = kept
    O = adam(S, K, U, 3, overwrite=True, **given)
    assert torch.equal(O, N) and torch.equal(K, M) and torch.equal(U, V)


@pytest.mark.parametrize("shape", [(256, 256), (300, 320), (128, 1024), (301, 331), (96, 96)])
@pytest.mark.parametrize("is_by_column", [False, True])
def test_a_sinkhorn_of_large_matrices_has_the_bits_of_each_and_equal_norms(shape, is_by_column):
    """Large ones are multiplied by vectors one at a time, others all at once."""
    X = draw(3, *shape, dtype=torch.float32, seed=5, transposed=is_by_column)
    Y = sinkhorn(X, 5)
    for k in range(3):
        assert torch.equal(sinkhorn(alone(X, k), 5)[0], Y[k])
    torch.testing.assert_close(Y, sinkhorn(X.double(), 5).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(Y.square().mean(-2), torch.ones(3, shape[1]), rtol=1e-5, atol=0)


def test_a_rotation_may_take_the_place_of_its_matrix():
    A = draw(2, 48, 48, dtype=torch.float32, seed=1, transposed=False)
    old = torch.eye(48).expand(2, -1, -1).clone()
    A[1, :, 7] = 0.0
    kept = A.clone()
    Q = rotated(A, old)
    assert torch.equal(A, kept)
    assert torch.equal(rotated(kept, old, overwrite=True), Q)
