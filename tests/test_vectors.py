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


@pytest.mark.parametrize("most", [1, 40, 2**22])
@pytest.mark.parametrize("step", [0.5, 0.0])
@pytest.mark.parametrize("bad", [1.0, torch.nan, torch.inf])
def test_groups_move_as_each_tensor_would(most, step, bad, monkeypatch):
    """Of mixed kinds and strides, whatever a group holds; in place and not."""
    monkeypatch.setattr(vectors, "MANY", most)
    torch.manual_seed(0)
    shapes = [(3, 4), (), (2, 3, 3, 3), (0,), (5,), (2, 3, 3, 3), (4, 3), (7,)]
    xs = [torch.randn(shape, dtype=torch.float64 if k == 4 else torch.float32) for k, shape in enumerate(shapes)]
    ys = [torch.randn_like(x) for x in xs]
    for k in (2, 5):
        xs[k] = xs[k].to(memory_format=torch.channels_last)
    xs[6], ys[7] = xs[6].t().contiguous().t(), torch.stack([ys[7], ys[7]], 1)[:, 0]
    xs[0][0, 0], ys[0][0, 0], ys[5][1, 2, 0, 1], ys[7][3] = -0.0, bad, bad, bad
    expected = [x + step * y if step else x.clone() for x, y in zip(xs, ys)]
    for out in ([torch.empty_like(x) for x in xs], xs):
        vectors._add_masked(xs, torch.tensor(step), ys, out)
        for o, want in zip(out, expected):
            torch.testing.assert_close(o, want, equal_nan=True)
            assert step or torch.equal(o.signbit(), want.signbit())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_a_move_launches_does_not_grow_with_the_tensors(layout, monkeypatch):
    """And all that it hands over is contiguous: else a foreach goes tensor by tensor."""

    def flat(tensors):
        assert all(t.is_contiguous() for t in tensors)
        return made(tensors)

    def launches(count):
        xs, ys = ([torch.ones(4, 2, 3, 3).to(memory_format=layout) for _ in range(count)] for _ in range(2))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            vectors._add_masked(xs, torch.tensor(0.5), ys, xs)
        views = ("view", "permute", "unflatten")
        return sum(not any(word in e.name for word in views) for e in profile.events() if e.cpu_parent is None)

    made = vectors.flat
    monkeypatch.setattr(vectors, "flat", flat)
    assert launches(40) == launches(10) > 0


@pytest.mark.parametrize(("x", "expected"), [(0.0, 0.0), (2.0, 0.5), (-4.0, -0.25)])
def test_the_reciprocal_of_zero_is_zero(x, expected):
    assert vectors.safe_reciprocal(torch.tensor(x)).item() == expected


@pytest.mark.parametrize("count", [1, 3])
def test_flat_is_a_copy(count):
    x = [torch.ones(2, 2) for _ in range(count)]
    vectors.flat(x).zero_()
    assert all((t == 1).all() for t in x)


def test_a_vector_is_in_one_piece_where_its_tensors_are_few_and_alike():
    alike, large = [torch.ones(2), torch.zeros(3)], [torch.ones(vectors.FEW), torch.ones(2)]
    assert torch.equal(vectors.Vector(alike).piece, torch.cat(alike))
    assert [vectors.Vector(x).piece for x in (large, mixed(), [sparse(), torch.ones(1)], [])] == [None] * 4
    assert vectors.Vector([sparse(), torch.ones(1)], together=True).piece is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [None, torch.inf, -torch.inf, torch.nan])
def test_are_finite_looks_at_every_number_and_changes_none(bad, dtype):
    x = [torch.tensor([1.0, -0.0, torch.finfo(dtype).smallest_normal], dtype=dtype), torch.ones((), dtype=dtype)]
    if bad is not None:
        x[0][1] = bad
    before = [t.clone() for t in x]
    assert vectors.are_finite(x) == (bad is None)
    for t, old in zip(x, before):
        torch.testing.assert_close(t, old, rtol=0, atol=0, equal_nan=True)


def test_memory_that_somebody_else_can_reach_is_not_alone():
    t = torch.zeros(4)
    assert vectors.is_alone(t)
    view = t[:2]
    assert not vectors.is_alone(t)
    del view
    array = t.numpy()
    assert not vectors.is_alone(t)
    del array
    assert vectors.is_alone(t)
    assert not any(map(vectors.is_alone, [torch.zeros(4)[:2], torch.zeros(2, 3).t(), sparse()]))
