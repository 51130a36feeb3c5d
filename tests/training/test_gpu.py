"""On a CUDA device: the step of the host, without waiting for the device, and inside a captured graph."""

import copy
from contextlib import contextmanager

import pytest
import torch
from methods import METHODS, STENCILS, by_backward
from problems import Trial, assert_close

from gradreg import GradientRegularizer, RegularizedOptimizer

pytestmark = pytest.mark.gpu

DETERMINISTIC = ["mlp", "branching", "complex", "sparse", "spectral"]  # dropout draws other masks on a device


def to_device(trial):
    trial.model.cuda()
    trial.batch = tuple(x.cuda() for x in trial.batch)
    return trial


@contextmanager
def no_waiting():
    """Not while models and batches are brought there, which waits."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_step_equals_that_of_the_host(name, method):
    host, device = Trial(name), to_device(Trial(name))
    method.run(host)
    method.run(device)
    assert_close([g.cpu() for g in device.gradients()], host.gradients(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["cnn", "transformer"])
@pytest.mark.parametrize("method", STENCILS, ids=str)
def test_both_passes_draw_the_same_on_the_device(name, method):
    trial = to_device(Trial(name))
    draws, loss = [], trial.loss

    def drawing():
        value = loss()
        draws.append(torch.rand(8, device="cuda"))  # after the model, whose draws every door replays
        return value

    trial.loss = drawing
    method.run(trial)
    assert len(draws) > 1
    assert all(torch.equal(draw, draws[0]) for draw in draws)
    assert all(torch.equal(w, p) for w, p in zip(trial.weights[0], trial.model.parameters()))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("door", ["backward", "closure"])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_step_does_not_wait_for_the_device(name, door):
    trial = to_device(Trial(name))
    regularizer = GradientRegularizer(trial.model, 0.1, 0.1)
    optimizer = RegularizedOptimizer(torch.optim.SGD(trial.model.parameters(), lr=0.1), regularizer)

    def loss():
        return torch.nn.functional.cross_entropy(trial.model(trial.batch[0]), trial.batch[1])

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    def step():
        if door == "closure":
            optimizer.step(closure)
        else:
            optimizer.zero_grad()
            regularizer.backward(loss)
            optimizer.step()

    step()  # which checks the replay by its values, and so waits
    with no_waiting():
        for _ in range(3):
            step()


def test_a_step_can_be_captured_in_a_graph():
    trial = to_device(Trial("mlp"))
    eager = copy.deepcopy(trial)
    regularizer = GradientRegularizer(trial.model, 0.1, 0.1)
    optimizer = torch.optim.SGD(trial.model.parameters(), lr=0.1)
    initial = copy.deepcopy(trial.model.state_dict())

    def loss():
        return torch.nn.functional.cross_entropy(trial.model(trial.batch[0]), trial.batch[1])

    def step():
        optimizer.zero_grad()
        regularizer.backward(loss)
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    trial.model.load_state_dict(initial)
    for _ in range(3):
        graph.replay()

    other = GradientRegularizer(eager.model, 0.1, 0.1)
    sgd = torch.optim.SGD(eager.model.parameters(), lr=0.1)
    for _ in range(3):
        by_backward(other, eager.loss)
        sgd.step()
    assert_close(list(trial.model.parameters()), list(eager.model.parameters()))
