"""Do numbers carry over from another SAM? Weights after 20 steps of each, beside ours: the claims of docs/migrate.md.

pip install pytorch_optimizer optax          # what is missing is left out
python benchmarks/peers.py --sam sam.py      # the file of https://github.com/davda54/sam, which is not on an index
"""

import argparse
import copy
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradreg

STEPS, LR, MOMENTUM, RHO = 20, 0.1, 0.9, 0.05
torch.manual_seed(0)
x, y = torch.randn(STEPS, 64, 10), torch.randint(0, 3, (STEPS, 64))
start = nn.Sequential(nn.Linear(10, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def ours(make: Callable[[nn.Module], gradreg.GradientRegularizer]) -> Tensor:
    """Weights after training with one of our regularizers."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    regularizer = make(model)
    for k in range(STEPS):
        optimizer.zero_grad()
        regularizer.backward(lambda k=k: F.cross_entropy(model(x[k]), y[k]))
        optimizer.step()
    return weights(model)


def two_steps(sam: type, adaptive: bool) -> Tensor:
    """Weights after training with an optimizer that has `first_step` and `second_step`."""
    model = copy.deepcopy(start)
    optimizer = sam(model.parameters(), torch.optim.SGD, rho=RHO, adaptive=adaptive, lr=LR, momentum=MOMENTUM)
    for k in range(STEPS):
        F.cross_entropy(model(x[k]), y[k]).backward()
        optimizer.first_step(zero_grad=True)
        F.cross_entropy(model(x[k]), y[k]).backward()
        optimizer.second_step(zero_grad=True)
    return weights(model)


def by_wsam(strength: float) -> Tensor:
    """Weights after training with pytorch_optimizer's WSAM, its two terms in one gradient."""
    from pytorch_optimizer import WSAM

    model = copy.deepcopy(start)
    options = {"rho": RHO, "gamma": strength, "decouple": False, "lr": LR, "momentum": MOMENTUM}
    optimizer = WSAM(model, model.parameters(), torch.optim.SGD, **options)
    for k in range(STEPS):
        F.cross_entropy(model(x[k]), y[k]).backward()
        optimizer.first_step(zero_grad=True)
        F.cross_entropy(model(x[k]), y[k]).backward()
        optimizer.second_step(zero_grad=True)
    return weights(model)


def by_optax() -> Tensor:
    """Weights after training with optax.contrib.sam on the same network, written in JAX."""
    import jax
    import jax.numpy as jnp
    import optax
    from optax import contrib

    parameters = [jnp.asarray(p.detach().numpy()) for p in start.parameters()]

    def loss(parameters, inputs, labels):
        for weight, bias in zip(parameters[::2], parameters[1::2]):
            inputs = inputs @ weight.T + bias
            if len(weight) != 3:
                inputs = jax.nn.gelu(inputs, approximate=False)
        return optax.softmax_cross_entropy_with_integer_labels(inputs, labels).mean()

    adversary = optax.chain(contrib.normalize(), optax.sgd(RHO))
    optimizer = contrib.sam(optax.sgd(LR, momentum=MOMENTUM), adversary, sync_period=2, opaque_mode=True)
    state = optimizer.init(parameters)
    for k in range(STEPS):
        inputs, labels = jnp.asarray(x[k].numpy()), jnp.asarray(y[k].numpy())
        gradient = jax.grad(lambda p, _, inputs=inputs, labels=labels: loss(p, inputs, labels))
        updates, state = optimizer.update(gradient(parameters, 0), state, parameters, grad_fn=gradient)
        parameters = optax.apply_updates(parameters, updates)
    return torch.cat([torch.tensor(p.tolist()).flatten() for p in parameters])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sam", help="the file sam.py of davda54/sam")
    peers = {}
    if path := parser.parse_args().sam:
        spec = importlib.util.spec_from_file_location("sam", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        peers["davda54/sam"] = module.SAM
    if importlib.util.find_spec("pytorch_optimizer"):
        from pytorch_optimizer import SAM

        peers["pytorch_optimizer"] = SAM

    plain = ours(lambda model: gradreg.GradientRegularizer(model, 0.0, 0.1))
    sam = ours(lambda model: gradreg.sam(model, RHO))
    asam = ours(lambda model: gradreg.asam(model, RHO))
    without_eta = ours(lambda model: gradreg.asam(model, RHO, eta=0.0))
    theirs = {(name, adaptive): two_steps(peer, adaptive) for name, peer in peers.items() for adaptive in (False, True)}
    print(f"torch {torch.__version__}, {STEPS} steps in float32, ρ = {RHO}; largest difference of a weight")
    for name in peers:
        print(f"sam                against {name:30} {(sam - theirs[name, False]).abs().max():.1e}")
        difference = (without_eta - theirs[name, True]).abs().max()
        print(f"asam, η = 0        against {name + ', adaptive':30} {difference:.1e}")
        print(f"asam, η = 0.01     against {name + ', adaptive':30} {(asam - theirs[name, True]).abs().max():.1e}")
    if "pytorch_optimizer" in peers:
        gamma = 0.6 / (1 - 0.6) * RHO
        wsam = ours(lambda model: gradreg.GradientRegularizer(model, gamma, RHO, ascent="normalized"))
        print(f"γ = 1.5 ε          against {'WSAM, γ 0.6, not decoupled':30} {(wsam - by_wsam(0.6)).abs().max():.1e}")
    if importlib.util.find_spec("optax"):
        print(f"sam                against {'optax.contrib.sam, opaque':30} {(sam - by_optax()).abs().max():.1e}")
    print(f"sam                against {'plain training':30} {(sam - plain).abs().max():.1e}")
    print(f"asam, η = 0        against {'plain training':30} {(without_eta - plain).abs().max():.1e}")
    print(f"largest weight {plain.abs().max():.2f}")


if __name__ == "__main__":
    main()
