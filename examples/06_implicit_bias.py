"""The implicit bias of gradient regularization, solved: where the flow ends, by two independent codes."""

# %% A diagonal network, β = w₊² − w₋², with more unknowns than data: many β fit, and the training picks one.
import torch

import gradreg
from gradreg.theory import DiagonalNetwork, flow, flows, minimize_potential, sparse_regression

data = sparse_regression(n=20, d=40, num_active=3, shift=5.0, scale=5**0.5)
torch.set_num_threads(1)  # the matrices are small: more threads would only wait for each other
alpha, gamma, epsilon = 0.1, 0.02, 0.02

# %% The theory: w₊∘w₋ = α_GR², and β minimizes a potential φ, whose scale is α_GR, among all β that fit.
end = flow(data.X, data.y, alpha=alpha, gamma=gamma, epsilon=epsilon)
assert end.converged, end.reason
best = minimize_potential(data.X, data.y, end.alpha_gr)  # a convex problem: no flow, no network
torch.testing.assert_close(end.w_plus * end.w_minus, end.alpha_gr**2, rtol=0, atol=1e-8)
torch.testing.assert_close(end.beta, best, rtol=0, atol=1e-6)

# %% The engine: gradient descent with the regularizer comes near the flow after the same time, to first order.
time = 0.1
there = flow(data.X, data.y, alpha=alpha, gamma=gamma, epsilon=epsilon, max_time=time).beta
errors = []
for rate in (0.001, 0.0005):
    network = DiagonalNetwork(40, alpha)
    regularizer = gradreg.GradientRegularizer(network, gamma, epsilon)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    for _ in range(round(time / rate)):
        optimizer.zero_grad()
        regularizer.backward(lambda network=network: network.loss(data.X, data.y))
        optimizer.step()
    errors.append((network.beta.detach() - there).norm().item())
assert 1.7 < errors[0] / errors[1] < 2.4, "half the step, half the distance"

# %% On such shifted data a finite ascent step helps: F-GR below DB below plain descent below B-GR.
ends = flows(
    data.X,
    data.y,
    alpha=alpha,
    gamma=[gamma, gamma, 0.0, gamma],
    epsilon=[epsilon, None, None, epsilon],
    scheme=["forward", "exact", "exact", "backward"],
)
assert ends.converged.all()
test_errors = data.test_error(ends.beta).tolist()
for name, error, scale in zip(("F-GR", "DB", "plain", "B-GR"), test_errors, ends.alpha_gr.mean(1).tolist()):
    print(f"{name:<6} test error {error:.4f}   mean α_GR {scale:.4f}")
assert test_errors == sorted(test_errors)
