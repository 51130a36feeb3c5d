"""What user code does with gradients: backward passes inside a loss, `.grad` changed in a closure or a block.

All of it means what it means in plain training, once for each pass: ĝ = P(g1) + c (P(g2) − P(g1)), where P is whatever
the pass made of its gradient.
"""

import pytest
import torch
from by_hand import (
    DOORS,
    SEED,
    Idle,
    batch,
    each_door,
    expected,
    expected_of_passes,
    loss_of,
    net,
    own_passes,
    regularizer_of,
    smooth,
    step,
)
from problems import assert_close, assert_same, gradients
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradreg
from gradreg.training.watch import Note

# Backward passes inside a loss.


def attacked(model, clears, start=torch.ones_like):
    """Adversarial training: an inner loop of backward passes up the loss."""
    x, y = batch()
    delta = (0.1 * start(x)).requires_grad_()
    for _ in range(2):
        F.cross_entropy(model(x + delta), y).backward()
        delta = (delta + 0.05 * delta.grad.sign()).detach().requires_grad_()
    if clears:
        model.zero_grad()
    return F.cross_entropy(model(x + delta.detach()), y)


def by_autograd_grad(model):
    """An attack that leaves `.grad` alone."""
    x, y = batch()
    delta = torch.zeros_like(x).requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x + delta), y), delta)
    return F.cross_entropy(model(x + 0.1 * slope.sign()), y)


def in_chunks(model):
    """The first rows are run backward inside; the rest is left to the caller."""
    x, y = batch()
    (F.cross_entropy(model(x[:4]), y[:4]) / 2).backward()
    return F.cross_entropy(model(x[4:]), y[4:]) / 2


def twice_over(model):
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    return 2 * loss


def with_fisher_penalty(model):
    loss = loss_of(model)
    slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + 0.1 * sum(g.square().sum() for g in slopes)


def with_gradient_that_kept_its_graph(model):
    """R1: ‖∂L/∂x‖² by `backward(create_graph=True)`, whose gradients of the weights are cleared."""
    x, y = batch()
    x.requires_grad_()
    loss = F.cross_entropy(model(x), y)
    loss.backward(create_graph=True)
    penalty = x.grad.square().sum()
    model.zero_grad()
    return F.cross_entropy(model(x.detach()), y) + penalty


def one_step_ahead(model):
    """MAML: the loss after a step of gradient descent."""
    weights = dict(model.named_parameters())
    slopes = torch.autograd.grad(loss_of(model), list(weights.values()), create_graph=True)
    ahead = {name: p - 0.1 * g for (name, p), g in zip(weights.items(), slopes)}
    x, y = batch()
    return F.cross_entropy(torch.func.functional_call(model, ahead, (x,)), y)


def with_hook_on_activations(model):
    x, y = batch()
    logits = model(x)
    logits.register_hook(lambda g: g.clamp(-0.02, 0.02))
    return F.cross_entropy(logits, y)


def checkpointed(model):
    x, y = batch()
    return F.cross_entropy(checkpoint(model, x.requires_grad_(), use_reentrant=True), y)


def balanced(model):
    """GradNorm: two losses, weighted by their gradients' norms at the last layer."""
    x, y = batch()
    logits = model(x)
    parts = F.cross_entropy(logits, y), logits.square().mean()
    last = [torch.autograd.grad(part, model[-1].weight, retain_graph=True)[0].norm() for part in parts]
    return sum(part / slope.detach() for part, slope in zip(parts, last))


LOSSES = {
    "attacked, cleared": lambda model: attacked(model, clears=True),
    "attacked, not cleared": lambda model: attacked(model, clears=False),
    "attacked by autograd.grad": by_autograd_grad,
    "in chunks": in_chunks,
    "twice over": twice_over,
    "Fisher": with_fisher_penalty,
    "R1": with_gradient_that_kept_its_graph,
    "MAML": one_step_ahead,
    "hook on activations": with_hook_on_activations,
    "balanced": balanced,
}
each_loss = pytest.mark.parametrize("name", LOSSES)
ignores_create_graph = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


@each_loss
@each_door
@ignores_create_graph
def test_a_backward_pass_inside_the_loss_counts_once_for_each_pass(door, name):
    model = smooth()
    by_hand = expected(model, LOSSES[name])
    step(door, regularizer_of(model), LOSSES[name])
    assert_close(gradients(model), by_hand)


@pytest.mark.filterwarnings("ignore:.*outside the model")  # its input is trainable, as reentrant checkpoints need it
@own_passes
def test_the_backward_passes_of_reentrant_checkpoints_count_once_for_each_pass(door):
    model = net()
    by_hand = expected(model, checkpointed)
    step(door, regularizer_of(model), checkpointed)
    assert_close(gradients(model), by_hand)


@pytest.mark.parametrize("name", ["attacked, cleared", "attacked, not cleared", "in chunks", "MAML"])
@each_door
def test_a_backward_pass_inside_the_loss_draws_the_same_random_numbers(door, name):
    model = net()
    by_hand = expected(model, LOSSES[name])
    regularizer = regularizer_of(model)
    for _ in range(2):  # the first step checks the replay, the second does not
        model.load_state_dict(net().state_dict())
        step(door, regularizer, LOSSES[name])
        assert_close(gradients(model), by_hand)


@pytest.mark.parametrize("clears", [True, False])
@own_passes
def test_an_attack_that_starts_at_random_starts_there_in_each_pass(door, clears):
    def loss(model):
        return attacked(model, clears, start=torch.rand_like)

    model = net()
    by_hand = expected(model, loss)
    step(door, regularizer_of(model), loss)
    assert_close(gradients(model), by_hand)


@pytest.mark.parametrize("scheme", ["backward", "central"])
@each_loss
@ignores_create_graph
def test_a_backward_pass_inside_the_loss_counts_in_every_scheme(scheme, name):
    model = smooth()
    by_hand = expected(model, LOSSES[name], scheme=scheme)
    step("backward", regularizer_of(model, scheme=scheme), LOSSES[name])
    assert_close(gradients(model), by_hand)


@each_loss
@ignores_create_graph
def test_a_backward_pass_inside_the_loss_leaves_what_is_not_selected_alone(name):
    model, plain = smooth(), smooth()
    torch.manual_seed(SEED)
    LOSSES[name](plain).backward()
    step("backward", regularizer_of(model, include="0.*"), LOSSES[name])
    assert_same(gradients(model)[2:], gradients(plain)[2:])


@pytest.mark.parametrize("name", ["in chunks", "attacked by autograd.grad", "Fisher"])
def test_a_backward_pass_inside_the_loss_adds_to_earlier_gradients(name):
    model = smooth()
    by_hand = expected(model, LOSSES[name])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.manual_seed(SEED)
    regularizer_of(model).backward(lambda: LOSSES[name](model))
    assert_close(gradients(model), [g + 1 for g in by_hand])


@pytest.mark.parametrize("name", ["in chunks", "attacked, not cleared", "Fisher"])
def test_a_backward_pass_inside_the_loss_counts_in_a_window(name):
    model = smooth()

    def window(model):
        LOSSES[name](model).backward()
        return 3 * LOSSES[name](model)

    by_hand = expected(model, window)
    torch.manual_seed(SEED)
    regularizer_of(model).backward(lambda factor: factor * LOSSES[name](model), [1, 3])
    assert_close(gradients(model), by_hand)


def test_the_loss_sees_no_gradient_of_another_pass():
    model, seen = smooth(), []

    def loss():
        seen.extend(gradients(model))
        return loss_of(model)

    model.zero_grad()
    regularizer_of(model).backward(loss)
    assert seen
    assert all(g is None for g in seen)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_gamma_at_epsilon_and_at_zero_take_what_the_pass_made(gamma):
    model = smooth()
    by_hand = expected(model, in_chunks, gamma=gamma, epsilon=0.3)
    step("backward", regularizer_of(model, gamma=gamma, epsilon=0.3), in_chunks)
    assert_close(gradients(model), by_hand)


# `.grad` changed when the backward pass is over.


def clip(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def clip_values(model):
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def sign(model):
    for p in model.parameters():
        p.grad.sign_()


def normalize_layers(model):
    for p in model.parameters():
        p.grad = p.grad / (p.grad.norm() + 1e-3)  # of a bias before a BatchNorm, rounding is all there is


def decay(model):
    """Weight decay in the gradient: at the weights where they stand."""
    for p in model.parameters():
        p.grad.add_(p.detach(), alpha=0.1)


def add_noise(model):
    """Differential privacy."""
    for p in model.parameters():
        p.grad += 0.1 * torch.randn_like(p)


def freeze_the_first(model):
    model[0].weight.grad = None


def zero_a_row(model):
    model[0].weight.grad[0].zero_()


def centralize(model):
    for p in model.parameters():
        if p.ndim > 1:
            p.grad.sub_(p.grad.mean(dim=1, keepdim=True))


def keep_an_outer_tensor(model):
    """A buffer of the user's own as `.grad`, the same in each pass."""
    for p in model.parameters():
        p.kept = getattr(p, "kept", torch.empty_like(p))
        p.kept.copy_(p.grad)
        p.grad = p.kept


AFTERWARDS = [
    clip,
    clip_values,
    sign,
    normalize_layers,
    decay,
    add_noise,
    freeze_the_first,
    zero_a_row,
    centralize,
    keep_an_outer_tensor,
]
each_change = pytest.mark.parametrize("change", AFTERWARDS, ids=lambda change: change.__name__)


def take_pass(model, change, clears=True):
    if clears:
        model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    change(model)
    return loss


def run_through(door, regularizer, run, clears=True):
    model = regularizer.model
    torch.manual_seed(SEED)
    if door == "perturbed":
        run(model)
        with regularizer.perturbed():
            run(model)
    else:
        gradreg.RegularizedOptimizer(Idle(model.parameters()), regularizer).step(lambda: run(model))


both_outside_doors = pytest.mark.parametrize("door", ["perturbed", "closure"])


@each_change
@both_outside_doors
def test_a_gradient_is_taken_as_the_pass_leaves_it(door, change):
    model = net()
    by_hand = expected_of_passes(model, lambda twin: take_pass(twin, change))
    run_through(door, regularizer_of(model), lambda model: take_pass(model, change))
    assert_close(gradients(model), by_hand)


@each_change
def test_a_gradient_is_taken_as_a_block_without_zero_grad_leaves_it(change):
    model = net()
    by_hand = expected_of_passes(model, lambda twin: take_pass(twin, change))
    model.zero_grad()
    run_through("perturbed", regularizer_of(model), lambda model: take_pass(model, change, clears=False))
    assert_close(gradients(model), by_hand)


@each_change
def test_a_gradient_is_taken_as_the_backward_function_leaves_it(change):
    model = net()
    by_hand = expected_of_passes(model, lambda twin: take_pass(twin, change))

    def backward(loss):
        loss.backward()
        change(model)

    torch.manual_seed(SEED)
    regularizer_of(model).backward(lambda: loss_of(model), backward=backward)
    assert_close(gradients(model), by_hand)


@each_change
def test_a_gradient_is_taken_as_the_pass_leaves_it_in_the_central_scheme(change):
    model = net()
    by_hand = expected_of_passes(model, lambda twin: take_pass(twin, change), scheme="central")
    run_through("closure", regularizer_of(model, scheme="central"), lambda model: take_pass(model, change))
    assert_close(gradients(model), by_hand)


@pytest.mark.parametrize("options", [{"cap": 1e9}, {"nonfinite": "first"}, {"gamma": 0.05}], ids=str)
@each_change
@both_outside_doors
def test_a_gradient_is_taken_as_the_pass_leaves_it_whatever_is_made_of_it(door, change, options):
    model = net()
    by_hand = expected_of_passes(model, lambda twin: take_pass(twin, change), options.get("gamma", 0.3))
    run_through(door, regularizer_of(model, **options), lambda model: take_pass(model, change))
    assert_close(gradients(model), by_hand)


def without_conflict(model):
    """PCGrad: of two tasks' gradients each loses what opposes the other, and their sum is assigned."""
    x, y = batch()
    logits = model(x)
    parameters = list(model.parameters())
    g = torch.autograd.grad(F.cross_entropy(logits, y), parameters, retain_graph=True)
    h = torch.autograd.grad(F.cross_entropy(logits, (y + 1) % 3), parameters)
    for p, a, b in zip(parameters, g, h):
        overlap = (a * b).sum().clamp(max=0)
        p.grad = a + b - overlap * (a / a.square().sum() + b / b.square().sum())
    return logits.detach().mean()


@both_outside_doors
def test_a_gradient_that_is_assigned_needs_no_backward_pass(door):
    model = net()
    by_hand = expected_of_passes(model, without_conflict)
    run_through(door, regularizer_of(model), without_conflict)
    assert_close(gradients(model), by_hand)


def of_each_row(model):
    """Gradients of each row by torch.func, clipped and averaged."""
    x, y = batch()

    def loss(weights, x, y):
        return F.cross_entropy(torch.func.functional_call(model, weights, (x[None],)), y[None])

    weights = {name: p.detach() for name, p in model.named_parameters()}
    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    for name, p in model.named_parameters():
        p.grad = rows[name].clamp(-0.1, 0.1).mean(0)
    return model(x).detach().mean()


@both_outside_doors
def test_a_gradient_made_by_torch_func_is_taken(door):
    model = smooth()
    by_hand = expected_of_passes(model, of_each_row)
    run_through(door, regularizer_of(model), of_each_row)
    assert_close(gradients(model), by_hand)


def test_gradients_of_several_backward_passes_in_a_closure_are_one_pass():
    model = net()

    def run(model):
        model.zero_grad()
        x, y = batch()
        losses = [F.cross_entropy(model(part), labels) for part, labels in zip(x.chunk(2), y.chunk(2))]
        for loss in reversed(losses):
            loss.backward()
            clip(model)
        return sum(losses)

    by_hand = expected_of_passes(model, run)
    run_through("closure", regularizer_of(model), run)
    assert_close(gradients(model), by_hand)


# Hooks on gradients.


def by_tensor_hook(p):
    return p.register_hook(lambda g: g.clamp(-0.01, 0.01))


def by_hook_after_accumulation(p):
    def clamp(p):
        p.grad.clamp_(-0.01, 0.01)

    return p.register_post_accumulate_grad_hook(clamp)


def by_hook_that_assigns(p):
    def assign(p):
        p.grad = p.grad.clamp(-0.01, 0.01)

    return p.register_post_accumulate_grad_hook(assign)


HOOKS = [by_tensor_hook, by_hook_after_accumulation, by_hook_that_assigns]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
@each_door
def test_hooks_on_gradients_act_on_each_pass(door, hook):
    model = net()

    def run(twin):
        for p in twin.parameters():
            hook(p)
        loss_of(twin).backward()

    by_hand = expected_of_passes(model, run)
    for p in model.parameters():
        hook(p)
    torch.manual_seed(SEED)
    DOORS[door](regularizer_of(model), lambda: loss_of(model))
    assert_close(gradients(model), by_hand)


@pytest.mark.parametrize("before", ["registered before the regularizer", "registered after"])
@each_door
def test_a_hook_that_reads_gradients_sees_those_of_each_pass(door, before):
    model, seen = smooth(), []
    points = expected(model, loss_of, gamma=0.05)  # γ = ε: g2
    regularizer = regularizer_of(model) if before == "registered after" else None
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    step(door, regularizer or regularizer_of(model), loss_of)
    twin = smooth()
    loss_of(twin).backward()
    assert_close([seen[0], seen[-1]], [twin[0].weight.grad, points[0]])


def test_an_address_that_is_used_again_is_not_the_same_batch():
    """Door 2 knows a batch again by the tensor itself: one that is gone may have left its address to the next."""
    first = torch.ones(3)
    note = Note(1, None, [first], [], is_own=True)
    assert note.was_given([first])
    assert not note.was_given([first.clone()])
    address = id(first)
    del first
    again = next((x for x in (torch.ones(3) for _ in range(10_000)) if id(x) == address), None)
    assert again is not None
    assert not note.was_given([again])
    changed = torch.ones(3)
    note = Note(1, None, [changed], [], is_own=True)
    changed.add_(1)
    assert not note.was_given([changed])
