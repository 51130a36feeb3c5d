"""Arithmetic on lists of tensors, against the same on one concatenated vector."""

import pytest
import torch

from gradreg import _vectors as vectors


def mixed():
    """Shapes, dtypes, a complex and a 0-dim tensor."""
    return [torch.randn(3, 2), torch.randn(4).double(), torch.randn(2, dtype=torch.complex128), torch.tensor(0.5)]


def one(tensors):
    return torch.cat([torch.view_as_real(t + 0j).flatten().double() for t in tensors])


def sparse():
    return torch.sparse_coo_tensor(
        torch.tensor([[0, 2, 0]]), torch.tensor([[1.0], [2.0], [3.0]]), (4, 1), check_invariants=True
    )


def test_norm_is_that_of_all_tensors_together():
    x = mixed()
    torch.testing.assert_close(vectors.norm(x), one(x).norm(), check_dtype=False)


def test_dot_reads_complex_numbers_as_pairs():
    for x, y in zip(mixed(), mixed()):
        torch.testing.assert_close(vectors.dot(x, y), one([x]) @ one([y]), check_dtype=False)


def test_the_norm_of_a_sparse_tensor_adds_duplicates_first():
    # rows 0: 1 + 3 = 4, and 2: 2
    torch.testing.assert_close(vectors.norm([sparse()]), torch.tensor(20.0).sqrt())


@pytest.mark.parametrize("pair", [(sparse, lambda: sparse().to_dense()), (lambda: sparse().to_dense(), sparse)])
def test_the_dot_of_sparse_and_dense(pair):
    x, y = (make() for make in pair)
    torch.testing.assert_close(vectors.dot(x, y), torch.tensor(20.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_narrow_tensors_are_wide(dtype):
    # 4096 ones: a sum in bfloat16 would stop at 256, in float16 at 2048
    x = [torch.ones(4096, dtype=dtype)]
    torch.testing.assert_close(vectors.norm(x), torch.tensor(64.0))
    torch.testing.assert_close(vectors.dot(x[0], x[0]), torch.tensor(4096.0))


@pytest.mark.parametrize("other", ["cpu", "meta"], ids=["read", "masked"])
@pytest.mark.parametrize("step", [0.5, 0.0])
@pytest.mark.parametrize("bad", [1.0, float("nan"), float("inf")])
def test_add_scaled_moves_by_step_and_not_at_all_at_zero(other, step, bad):
    """A second tensor off the host takes the masked path for both."""
    x, y = torch.tensor([1.0, -2.0]), torch.tensor([2.0, bad])
    xs, ys, outs = ([t, torch.ones(2, device=other)] for t in (x, y, torch.empty(2)))
    vectors.add_scaled(xs, torch.tensor(step), ys, out=outs)
    expected = x + step * y if step else x
    torch.testing.assert_close(outs[0], expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("other", ["cpu", "meta"], ids=["read", "masked"])
def test_add_scaled_takes_sparse_directions(other):
    out = [torch.empty(4, 1), torch.empty(1, device=other)]
    xs, ys = [torch.ones(4, 1), torch.ones(1, device=other)], [sparse(), torch.ones(1, device=other)]
    vectors.add_scaled(xs, torch.tensor(0.5), ys, out=out)
    torch.testing.assert_close(out[0], torch.tensor([[3.0], [1.0], [2.0], [1.0]]))


@pytest.mark.parametrize(("x", "expected"), [(0.0, 0.0), (2.0, 0.5), (-4.0, -0.25)])
def test_the_reciprocal_of_zero_is_zero(x, expected):
    assert vectors.safe_reciprocal(torch.tensor(x)).item() == expected
