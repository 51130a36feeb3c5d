"""Line 6 of the contract: which parameters the rules pick, under whatever wrapper."""

import pytest
import torch
from modes import RHO, Problem, norm
from problems import Trial, assert_close
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gradreg
from gradreg import GradientRegularizer
from gradreg.training.selection import Selection


class Wrapped(nn.Module):
    """What DistributedDataParallel does to names."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def compiled(model):
    """What torch.compile does to names."""
    wrapper = nn.Module()
    wrapper._orig_mod = model
    wrapper.forward = model.forward
    return wrapper


WRAPPERS = {
    "bare": lambda m: m,
    "module.": Wrapped,
    "_orig_mod.": compiled,
    "module._orig_mod.": lambda m: Wrapped(compiled(m)),
    "_orig_mod.module.": lambda m: compiled(Wrapped(m)),
    "0.module.": lambda m: nn.ModuleDict({"inner": Wrapped(m)}),
}
RULES = [
    ("0.*", None, {"0.weight", "0.bias"}),
    ("*.bias", None, {"0.bias", "1.bias", "5.bias"}),
    (["0.*", "5.weight"], "*.bias", {"0.weight", "5.weight"}),
    (nn.BatchNorm2d, None, {"1.weight", "1.bias"}),
    ((nn.Conv2d, nn.Linear), None, {"0.weight", "0.bias", "5.weight", "5.bias"}),
    (lambda name, p: p.ndim > 1, None, {"0.weight", "5.weight"}),
    (lambda name, p: name.startswith("5"), None, {"5.weight", "5.bias"}),
    (None, nn.BatchNorm2d, {"0.weight", "0.bias", "5.weight", "5.bias"}),
    (None, ["[01].*"], {"5.weight", "5.bias"}),
    (None, (), {"0.weight", "0.bias", "1.weight", "1.bias", "5.weight", "5.bias"}),
]


@pytest.mark.parametrize("wrapper", [w for w in WRAPPERS if w != "0.module."])
@pytest.mark.parametrize(("include", "exclude", "expected"), RULES)
def test_rules_match_the_names_of_the_bare_model(include, exclude, expected, wrapper):
    model = WRAPPERS[wrapper](Trial("cnn").model)
    selection = Selection(model, include, () if exclude is None else exclude)
    assert set(selection.named) == expected


def test_rules_match_inside_a_wrapped_submodule():
    selection = Selection(WRAPPERS["0.module."](Trial("cnn").model), include="inner.0.*")
    assert set(selection.named) == {"inner.0.weight", "inner.0.bias"}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_rules_match_through_torch_compile():
    selection = Selection(torch.compile(Trial("cnn").model), include="0.weight")
    assert list(selection.named) == ["0.weight"]


@pytest.mark.parametrize("wrapper", ["bare", "module.", "_orig_mod."])
def test_a_wrapped_model_is_regularized(wrapper):
    """Never a silent no-op at twice the cost."""
    trial = Trial("mlp")
    trial.model = WRAPPERS[wrapper](trial.model)
    regularizer = GradientRegularizer(trial.model, 0.1, 0.1, include="0.*")
    regularizer.backward(trial.loss)
    assert regularizer.diagnostics()["penalty_ratio"] > 0


@pytest.mark.parametrize("rule", ["embedding.weight", "head.weight"])
def test_any_name_of_a_tied_parameter_selects_or_excludes_it(rule):
    model = Trial("transformer").model
    assert list(Selection(model, include=rule).named) == ["embedding.weight"]
    assert "embedding.weight" not in Selection(model, exclude=rule).named


def test_printing_shows_what_matched():
    text = str(Selection(Trial("cnn").model, include="*.weight", exclude=nn.BatchNorm2d))
    # 6 parameters; conv 4·2·9 + linear 3·36 = 180 of 72 + 4 + 4 + 4 + 108 + 3 = 195 numbers
    assert text.splitlines()[0] == "2 of 6 parameters selected (180 of 195 numbers)"
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["0.weight", "5.weight"]
    model = Trial("cnn").model
    assert "2 of 6 parameters" in repr(GradientRegularizer(model, 0.1, 0.1, include=nn.Conv2d))


def test_frozen_parameters_are_not_selected():
    model = Trial("mlp").model
    model[0].requires_grad_(False)
    assert set(Selection(model).named) == {"2.weight", "2.bias"}


def test_thawing_and_freezing_is_followed():
    trial = Trial("mlp")
    trial.model[0].requires_grad_(False)
    regularizer = GradientRegularizer(trial.model, 0.1, 0.1, replay_check=False)
    regularizer.backward(trial.loss)
    trial.model[0].requires_grad_(True)
    regularizer.backward(trial.loss)
    assert set(regularizer.selection.named) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert not torch.equal(trial.weights[3][0], trial.weights[2][0])  # displaced now


def test_a_replaced_layer_is_followed():
    trial = Trial("mlp")
    regularizer = GradientRegularizer(trial.model, 0.1, 0.1, replay_check=False)
    regularizer.backward(trial.loss)
    trial.model[2] = nn.Linear(8, 3).double()
    regularizer.backward(trial.loss)
    assert regularizer.selection.named["2.weight"] is trial.model[2].weight
    assert not torch.equal(trial.weights[3][2], trial.weights[2][2])


@pytest.mark.parametrize("wrap", [WRAPPERS[name] for name in ("bare", "module.", "module._orig_mod.")])
def test_a_message_names_the_model_and_not_its_wrapper(wrap):
    with pytest.raises(
        ValueError, match=r"'nowhere' matches no parameter of Sequential; its names look like 0\.weight"
    ):
        Selection(wrap(nn.Sequential(nn.Linear(2, 2))), exclude="nowhere")


class Product(nn.Module):
    """A linear layer of torch's own product: DeepSpeed, once imported, puts a function of its own behind nn.Linear."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        return x @ self.weight


def test_the_second_pass_skips_weight_gradients_outside_the_selection():
    problem = Problem(Product(), nn.LayerNorm(8), nn.Tanh(), Product())
    problem.batch = torch.randn(10, 8).double(), problem.batch[1]
    regularizer = gradreg.sam(problem.model, RHO, include=nn.LayerNorm, replay_check=False)
    with FlopCounterMode(display=False) as counter:
        regularizer.backward(problem.loss)
    # Products of equal size: forward, two; backward, two for weights and one for the inputs of the last layer.
    assert counter.get_total_flops() == (5 + 3) * 2 * 10 * 8 * 8
    first = problem.gradient()
    along = [RHO / norm(first[1:3]) * g if k in (1, 2) else 0 * g for k, g in enumerate(first)]
    second = problem.gradient(displaced_by=along)
    expected = [second[k] if k in (1, 2) else first[k] for k in range(4)]
    assert_close(problem.gradients, expected, rtol=1e-12, atol=1e-14)
