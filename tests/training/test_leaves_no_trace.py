"""Nothing of ours stays on the model: it is saved, copied, scripted, exported and compiled as if none lived."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from by_hand import DOORS, batch, each_door, everything, loss_of, net, regularizer_of, smooth
from problems import assert_same
from torch import nn

import gradreg
from gradreg.training.watch import compiled_call

STAGES = {"made": lambda regularizer: None}
STAGES |= {f"after steps by {door}": (lambda regularizer, door=door: two_steps(regularizer, door)) for door in DOORS}


def two_steps(regularizer, door):
    for _ in range(2):
        DOORS[door](regularizer, lambda: loss_of(regularizer.model))
    regularizer.model.zero_grad()


@pytest.fixture(params=STAGES)
def model(request):
    """A model that has a regularizer, before and after its steps."""
    model = net()
    regularizer = regularizer_of(model)
    STAGES[request.param](regularizer)
    yield model.eval()
    assert regularizer.model is model  # it lives till here


LOAD = """
import sys, torch
sys.modules["gradreg"] = None
for path in sys.argv[1:]:
    model = torch.load(path, weights_only=False)
    torch.save(model(torch.ones(2, 4, dtype=torch.float64)), path + ".out")
"""


def test_a_saved_model_loads_where_gradreg_is_not_installed(tmp_path):
    regularizers = [regularizer_of(net()) for _ in STAGES]
    paths = [str(tmp_path / f"{k}.pt") for k, _ in enumerate(STAGES)]
    for take, regularizer, path in zip(STAGES.values(), regularizers, paths):
        take(regularizer)
        torch.save(regularizer.model.eval(), path)
    subprocess.run([sys.executable, "-c", LOAD, *paths], check=True, capture_output=True)
    for regularizer, path in zip(regularizers, paths):
        assert_same(torch.load(f"{path}.out"), regularizer.model(torch.ones(2, 4, dtype=torch.float64)))


def test_a_pickle_of_the_model_does_not_name_us(model):
    assert b"gradreg" not in pickle.dumps(model)
    room = io.BytesIO()
    torch.save(model, room)
    assert b"gradreg" not in room.getvalue()


def plain_attributes(module):
    """Everything that a module carries but its tensors: names, and the hooks.

    Door 2 sees the model's calls from where torch puts a compiled call, which no pickle or copy takes along.
    """
    return {
        name: sorted(map(str, value)) if isinstance(value, (dict, set)) else type(value)
        for name, value in vars(module).items()
        if name != "_compiled_call_impl" or compiled_call(module) is not None
    }


def test_no_module_carries_anything_of_ours(model):
    for ours, other in zip(model.modules(), net().modules()):
        assert plain_attributes(ours) == plain_attributes(other)
        assert type(ours) is type(other)


def test_no_parameter_carries_anything_of_ours(model):
    for p, other in zip(model.parameters(), net().parameters()):
        assert type(p) is type(other) is nn.Parameter
        assert vars(p) == vars(other)
        assert not p._backward_hooks
        assert not p._post_accumulate_grad_hooks


def test_a_model_is_copied_without_us(model):
    twin = copy.deepcopy(model)
    assert_same(twin(batch()[0]), model(batch()[0]))
    for module in (*twin.modules(), *copy.copy(model).modules()):
        assert not any(hooks for name, hooks in vars(module).items() if "hooks" in name)


deprecated = pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")


@deprecated
def test_a_model_is_scripted(model):
    assert_same(torch.jit.script(model)(batch()[0]), model(batch()[0]))


@deprecated
def test_a_model_is_traced(model):
    assert_same(torch.jit.trace(model, batch()[0])(batch()[0]), model(batch()[0]))


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_is_exported(model, strict):
    exported = torch.export.export(model, (batch()[0],), strict=strict)
    torch.testing.assert_close(exported.module()(batch()[0]), model(batch()[0]))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_model_is_compiled_in_one_graph(model, mode):
    torch._dynamo.reset()
    model.train(mode == "train")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    out = compiled(batch()[0])
    torch.manual_seed(0)
    assert_same(out, copy.deepcopy(model)(batch()[0]) if mode == "eval" else out)


def test_a_model_runs_under_torch_func(model):
    weights = dict(model.named_parameters())
    out = torch.func.functional_call(model, weights, (batch()[0],))
    rows = torch.func.vmap(lambda x: torch.func.functional_call(model, weights, (x[None],))[0])(batch()[0])
    torch.testing.assert_close(rows, out)


def test_a_symbolic_trace_sees_the_model_alone(model):
    graph = torch.fx.symbolic_trace(model)
    assert "gradreg" not in graph.code
    assert_same(graph(batch()[0]), model(batch()[0]))


def test_a_state_dict_is_loaded_and_given(model):
    assert list(model.state_dict()) == list(net().state_dict())
    model.load_state_dict(net().state_dict())
    model.load_state_dict({name: t.clone() for name, t in net().state_dict().items()}, assign=True)


plain_linear = pytest.mark.skipif(
    "not torch.nn.functional.linear.__module__ == 'torch._C._nn'", reason="DeepSpeed has put its own linear there"
)


@plain_linear
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("door", ["backward", "closure"])
def test_nested_tensors_pass_as_inputs(door, layout):
    model = nn.Linear(4, 3).double()
    rows = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], dtype=torch.float64, layout=layout)
    regularizer = regularizer_of(model)
    for _ in range(2):
        DOORS[door](regularizer, lambda: sum(part.square().sum() for part in model(rows).unbind()))
    assert model.weight.grad.isfinite().all()


@plain_linear
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_pass_through_a_block():
    model = nn.Linear(4, 3).double()
    rows = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], dtype=torch.float64, layout=torch.jagged)
    DOORS["perturbed"](regularizer_of(model), lambda: sum(part.square().sum() for part in model(rows).unbind()))
    assert model.weight.grad.isfinite().all()


class Table:
    """An input that is no tensor and no container that anyone knows."""

    def __init__(self):
        self.rows = batch()[0]


class ReadsTable(nn.Linear):
    def forward(self, table, scale=1.0):
        return super().forward(table.rows) * scale


@each_door
def test_an_input_of_any_type_passes(door):
    model = ReadsTable(4, 3).double()
    DOORS[door](regularizer_of(model), lambda: model(Table(), scale=2.0).square().mean())


# Batches are not kept alive.


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_no_batch_of_a_validation_is_kept(stage, mode):
    """Without no_grad, as one forgets."""
    model = net()
    regularizer = regularizer_of(model)
    STAGES[stage](regularizer)
    model.train(mode == "train")
    alive = []
    for _ in range(20):
        x = torch.ones(64, 4, dtype=torch.float64)
        alive.append(weakref.ref(x))
        model(x).sum().item()
        del x
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 0


@each_door
def test_no_batch_of_the_training_is_kept(door):
    model, alive = net(), []
    regularizer = regularizer_of(model)
    for _ in range(4):
        x = batch()[0].clone()
        alive.append(weakref.ref(x))
        DOORS[door](regularizer, lambda x=x: model(x).square().mean())
        del x
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_many_forwards_without_a_backward_take_no_more_memory_each():
    """A metric in training mode, thousands of times: what a door may need of it is the last of them."""
    model = smooth()
    regularizer_of(model)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(300):
        model(batch()[0]).sum().item()
    gc.collect()
    assert len(gc.get_objects()) - before < 300


@each_door
def test_a_loss_and_its_graph_die_with_the_step(door):
    model, alive = net(), []
    regularizer = regularizer_of(model)

    def loss():
        value = loss_of(model)
        alive.append(weakref.ref(value))
        return value

    DOORS[door](regularizer, loss)
    gc.collect()
    assert all(ref() is None for ref in alive)


# Regularizers come and go.


@each_door
def test_a_regularizer_dies_with_its_last_name_and_leaves_the_model(door):
    model = net()
    regularizer = regularizer_of(model)
    two_steps(regularizer, door)
    ghost = weakref.ref(regularizer)
    del regularizer
    gc.collect()
    assert ghost() is None
    for ours, other in zip(model.modules(), net().modules()):
        assert plain_attributes(ours) == plain_attributes(other)


@each_door
def test_a_regularizer_does_not_keep_a_dead_model(door):
    model = net()
    regularizer = regularizer_of(model)
    two_steps(regularizer, door)
    ghost = weakref.ref(model)
    del model, regularizer
    gc.collect()
    assert ghost() is None


def test_a_failing_step_leaves_nothing():
    model = net()
    for door in DOORS:
        regularizer = regularizer_of(model)

        def failing(calls=[]):  # noqa: B006  (one list for all calls is what is meant)
            calls.append(None)
            return loss_of(model) if len(calls) % 2 else 1 / 0

        with pytest.raises(ZeroDivisionError):
            DOORS[door](regularizer, failing)
        for ours, other in zip(model.modules(), net().modules()):
            assert plain_attributes(ours) == plain_attributes(other)


@each_door
def test_a_copy_made_within_a_pass_carries_no_guard(door):
    """An EMA that is made at its first use, inside the loss."""
    model, copies = net(), []

    def loss():
        copies.append(copy.deepcopy(model))
        return loss_of(model)

    DOORS[door](regularizer_of(model), loss)
    for twin in copies:
        assert list(twin.state_dict()) == list(net().state_dict())
        assert b"gradreg" not in pickle.dumps(twin)


@pytest.mark.parametrize("how", ["hooks of its own", "a compiled part"])
@each_door
def test_what_the_user_put_on_the_model_stays(door, how):
    model, seen = net(), []
    if how == "hooks of its own":
        model.register_forward_pre_hook(lambda module, args: seen.append("pre"))
        model[0].register_forward_hook(lambda module, args, out: seen.append("post"))
    else:
        model[0] = torch.compile(model[0], backend="eager")
    before = [plain_attributes(module) for module in model.modules()]
    two_steps(regularizer_of(model), door)
    assert [plain_attributes(module) for module in model.modules()] == before
    model(batch()[0])
    assert seen[-2:] == (["pre", "post"] if seen else [])


def test_two_regularizers_on_one_model_leave_nothing_together():
    model = net()
    first, second = regularizer_of(model), regularizer_of(model, scheme="backward")
    for door in DOORS:
        two_steps(first, door)
        two_steps(second, door)
    before = everything(model)
    del first, second
    gc.collect()
    assert_same(everything(model), before)
    assert b"gradreg" not in pickle.dumps(model)


def test_a_wrapper_and_its_regularizer_are_pickled_apart_from_the_model():
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = gradreg.RegularizedOptimizer(base, regularizer_of(model))
    assert b"gradreg" not in pickle.dumps(model)
    assert b"gradreg" not in pickle.dumps(base)
    again = pickle.loads(pickle.dumps(optimizer))
    assert b"gradreg" not in pickle.dumps(again.regularizer.model)
