from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradreg.lab.config import RunConfig
from gradreg.lab.data import load
from gradreg.lab.data.parts import Part
from gradreg.lab.models import build
from gradreg.lab.objective import Evaluation, evaluate, gradient_norm, loss
from gradreg.studies.demo.tasks import TASKS

ROWS = 23


def problem(kind):
    torch.manual_seed(0)
    if kind == "text":
        model = nn.Sequential(nn.Embedding(7, 5), nn.Dropout(0.5), nn.Linear(5, 7))
        part = Part(torch.randint(7, (ROWS, 4)), torch.randint(7, (ROWS, 4)))
    else:
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 7))
        model(torch.randn(50, 6))  # running statistics that are not those of the rows
        part = Part(torch.randn(ROWS, 6, dtype=torch.float64), torch.randint(7, (ROWS,)))
    return model.double(), part


EACH_KIND = pytest.mark.parametrize("kind", ["signals", "text"])


def row_by_row(model, part):
    """Loss, share correct and ‖∇L‖ the obvious way: one label at a time."""
    model.eval()
    model.zero_grad()
    total, correct, count = 0.0, 0, part.y.numel()
    for k in range(len(part)):
        logits, labels = model(part.x[k : k + 1]).reshape(-1, 7), part.y[k].reshape(-1)
        for logit, label in zip(logits, labels):
            total = total - logit.log_softmax(0)[label] / count
            correct += int(logit.argmax() == label)
    gradients = torch.autograd.grad(total, list(model.parameters()))
    return total.item(), correct / count, torch.cat([g.flatten() for g in gradients]).norm().item()


@EACH_KIND
@pytest.mark.parametrize("rows", [None, 1, 7, 23, 100])
def test_chunks_of_any_size_give_the_mean_over_all_rows(kind, rows):
    model, part = problem(kind)
    mean, share, norm = row_by_row(model, part)
    evaluation = evaluate(model, part, rows)
    assert evaluation.loss == pytest.approx(mean, rel=1e-12)
    assert evaluation.score == pytest.approx(share, rel=1e-6)
    assert gradient_norm(model, part, rows) == pytest.approx((mean, norm), rel=1e-12)
    assert loss(model, part).item() == pytest.approx(mean, rel=1e-12)


@EACH_KIND
def test_measuring_leaves_no_trace(kind):
    model, part = problem(kind)
    model.train()
    loss(model, part).backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [param.grad.clone() for param in model.parameters()]
    random_state = torch.get_rng_state()
    with torch.no_grad():
        evaluate(model, part)
        gradient_norm(model, part, rows=5)
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(param.grad, grad) for param, grad in zip(model.parameters(), grads))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_parameters_that_do_not_train_or_take_no_part_add_nothing():
    model, part = problem("signals")
    _, _, norm = row_by_row(model, part)
    model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    assert gradient_norm(model, part)[1] == pytest.approx(norm)
    frozen = model[0].weight.requires_grad_(False)
    gradients = torch.autograd.grad(F.cross_entropy(model.eval()(part.x), part.y), list(model[1:].parameters()))
    bias = torch.autograd.grad(F.cross_entropy(model(part.x), part.y), model[0].bias)
    expected = torch.cat([g.flatten() for g in (*gradients, *bias)]).norm().item()
    assert not frozen.requires_grad
    assert gradient_norm(model, part)[1] == pytest.approx(expected)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.task)
def test_the_rows_of_the_demo_are_measured_in_one_chunk(task):
    """Bitwise what the formula gives on all rows at once, so that stored numbers stay what they are."""
    split = load(task)
    model = build(replace(task, seed=2), split)
    model.eval()
    for part in (split.train, split.validation, split.test):
        mean = F.cross_entropy(model(part.x), part.y)
        gradients = torch.autograd.grad(mean, list(model.parameters()))
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        assert gradient_norm(model, part) == (mean.item(), norm.item())
        correct = (model(part.x).argmax(1) == part.y).float().mean().item()
        assert evaluate(model, part) == Evaluation(mean.item(), correct, len(part))


@pytest.mark.parametrize(("data", "most"), [("mnist1d", 4000), ("text", 256)])
def test_large_rows_go_in_small_chunks(data, most):
    config = RunConfig(data=data, model="mlp" if data == "mnist1d" else "gpt", depth=1, width=4)
    split = load(config)
    model, seen = build(config, split), []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    gradient_norm(model, split.train)
    assert max(seen) <= most
    assert sum(seen) == len(split.train)
