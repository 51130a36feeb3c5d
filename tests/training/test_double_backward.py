"""The exact scheme refuses what cannot be differentiated twice, and names the way out."""

import pytest
import torch
from problems import Trial, assert_same
from torch import nn
from torch.nn import functional as F

from gradreg import GradientRegularizer


def exact(model):
    return GradientRegularizer(model, 0.1, 0.1, scheme="exact")


class DistributedDataParallel(nn.Module):
    """Stands for torch's: the name is what tells it."""

    def __init__(self, module):
        super().__init__()
        self.module = module


# torch.compile imports torch.jit, which warns of itself.
compiles = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@compiles
def test_a_compiled_module_is_refused():
    with pytest.raises(ValueError, match=r'cannot differentiate twice.*torch\.compile.*scheme="forward"'):
        exact(torch.compile(nn.Linear(2, 1)))


@compiles
def test_a_module_compiled_in_place_is_refused():
    model = nn.Sequential(nn.Linear(2, 1))
    model[0].compile()
    with pytest.raises(ValueError, match=r"compiled by torch\.compile \(Linear\)"):
        exact(model)


def test_a_distributed_module_is_refused():
    with pytest.raises(ValueError, match=r'DistributedDataParallel.*use scheme="forward"'):
        exact(DistributedDataParallel(nn.Linear(2, 1)))


class Fused(nn.Module):
    """Attention by whatever kernel torch picks; on the host that is flash attention."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.project(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v).mean()


@pytest.mark.parametrize("batches", [None, [0, 1]], ids=["one batch", "window"])
def test_fused_attention_is_refused_with_the_way_out_and_nothing_lost(batches):
    trial = Trial("mlp")
    trial.model, x = Fused(), torch.randn(2, 2, 16, 8)
    before = trial.snapshot()
    with pytest.raises(RuntimeError, match=r'SDPBackend\.MATH.*scheme="forward"'):
        exact(trial.model).backward(lambda batch=None: trial.model(x), batches)
    assert_same(trial.snapshot(), before)
    assert all(p.grad is None for p in trial.model.parameters())


def test_the_way_out_of_fused_attention():
    model, x = Fused(), torch.randn(2, 2, 16, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact(model).backward(lambda: model(x))
    assert model.project.weight.grad.isfinite().all()


def test_an_error_of_the_model_is_not_taken_for_a_missing_derivative():
    model = nn.Linear(2, 1)
    with pytest.raises(ZeroDivisionError):
        exact(model).backward(lambda: model(torch.ones(1, 2)).sum() * (1 / 0))
