"""The training loop: what a state holds, precision, compilation, and how processes share a batch."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gradreg.lab.config import RunConfig
from gradreg.lab.data import Part, Split, load
from gradreg.lab.folder import BadInput
from gradreg.lab.processes import Processes
from gradreg.lab.randomness import random_state, seeded, set_random_state
from gradreg.lab.tasks import builtin
from gradreg.lab.train import trainer as trainer_module
from gradreg.lab.train.checkpoint import read, write
from gradreg.lab.train.trainer import Trainer

CONFIG = RunConfig(data="digits", num_train=100, batch_size=20, width=8, epochs=3)
GRADIENT = {"gamma": 0.1, "epsilon": 0.5, "warmup": 0.0}
VARIANTS = {
    "sgd": {},
    "f-gr": {"method": "F-GR", **GRADIENT},
    "f-gr that warms up": {"method": "F-GR", **GRADIENT, "warmup": 0.5},
    "central with adam": {"method": "Central", **GRADIENT, "optimizer": "adam", "learning_rate": 0.01},
    "sam with adamw": {"method": "SAM", "rho": 0.1, "optimizer": "adamw", "weight_decay": 0.1, "learning_rate": 0.01},
    "db": {"method": "DB", "gamma": 0.1},
    "flooding": {"method": "Flooding", "level": 0.5},
    "bf16": {"method": "F-GR", **GRADIENT, "precision": "bf16"},
    "fp16": {"method": "F-GR", **GRADIENT, "precision": "fp16"},
    "cnn with BatchNorm": {"model": "cnn", "method": "B-GR", **GRADIENT},
    "msam": {"method": "MSAM", "rho": 0.2, "probability": 0.7},
    "previous": {"method": "Previous", "rho": 0.2},
    "split along the previous gradient": {"method": "Split", "gamma": 0.1, "epsilon": 0.2, "ascent": "previous"},
    "large gradients": {"method": "F-GR", **GRADIENT, "threshold": 0.0},
    "a fraction, ahead, every third": {"method": "F-GR", **GRADIENT, "fraction": 0.2, "lookahead": 0.2, "period": 3},
}


class Noisy(nn.Module):
    """Draws from all generators, as dropout and an augmentation in the model would."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))

    def forward(self, x):
        return self.layers(x) * (1 + 0.1 * random.random() + 0.1 * np.random.random())


def tensors(trainer):
    return [t.clone() for t in trainer.model.state_dict().values()]


def stops_after(num_steps):
    """Asked after every step, says yes the so manieth time."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) == num_steps


def whole(config):
    Trainer(config)  # imports happen here; some draw random numbers
    with seeded(config.seed):
        trainer = Trainer(config, follows_penalty=True)
        while trainer.place.epoch < config.epochs:
            trainer.epoch()
        return trainer, random_state(trainer.device)


def in_two_parts(config, num_steps, folder):
    """Through a checkpoint after so many steps, in fresh objects and after other random numbers were drawn."""
    with seeded(config.seed):
        first = Trainer(config, follows_penalty=True)
        should_stop = stops_after(num_steps)
        while first.step < num_steps:
            first.epoch(should_stop)
        write(folder / "state", first.state_dict())
    with seeded(config.seed + 1):
        torch.rand(3), random.random(), np.random.random()
        second = Trainer(config, follows_penalty=True)
        second.load_state_dict(read(folder / "state"))
        assert second.step == num_steps
        while second.place.epoch < config.epochs:
            second.epoch()
        return second, random_state(second.device)


def assert_resumes(config, num_steps, folder):
    trainer, after = whole(config)
    resumed, after_resumed = in_two_parts(config, num_steps, folder)
    assert all(torch.equal(a, b) for a, b in zip(tensors(trainer), tensors(resumed), strict=True))
    assert (trainer.place, trainer.penalty_ratio) == (resumed.place, resumed.penalty_ratio)
    assert torch.equal(after["torch"], after_resumed["torch"])
    assert (after["python"], after["numpy"]) == (after_resumed["python"], after_resumed["numpy"])


@pytest.mark.parametrize("num_steps", [5, 8], ids=["after an epoch", "within an epoch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_n_steps_save_load_m_steps_are_n_plus_m_steps_bit_for_bit(variant, num_steps, tmp_path):
    assert_resumes(replace(CONFIG, **VARIANTS[variant]), num_steps, tmp_path)


def test_all_random_generators_belong_to_the_state(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "trained", lambda config: replace(builtin(config), model=Noisy))
    assert_resumes(replace(CONFIG, **VARIANTS["f-gr"]), 8, tmp_path)


def test_the_augmentation_belongs_to_the_state(tmp_path, monkeypatch):
    split = images()
    monkeypatch.setattr(trainer_module, "trained", lambda config: builtin(config, split))
    config = replace(CONFIG, data="images", augment=True, model="cnn")
    assert_resumes(config, 3, tmp_path)
    plain, augmented = whole(replace(config, augment=False))[0], whole(config)[0]
    assert not torch.equal(tensors(plain)[0], tensors(augmented)[0])


def images(n=40):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 3, 16, 16, generator=generator), torch.arange(n) % 2
    return Split(Part(x, y), Part(x, y), Part(x, y), num_classes=2)


def test_an_epoch_sees_every_row_of_whole_batches_once(monkeypatch):
    seen = []
    config = replace(CONFIG, num_train=50)
    data = load(config)
    split = Split(Part(torch.arange(50.0).view(50, 1), data.train.y), data.validation, data.test)
    trainer = Trainer(config, builtin(config, split))
    monkeypatch.setattr(trainer, "_backward", lambda loss_fn, batches: None)
    monkeypatch.setattr(trainer, "_share", lambda batch: seen.append(batch[0].flatten().long()))
    trainer.epoch()
    assert trainer.step == 2
    assert len(set(torch.cat(seen).tolist())) == 40


def test_following_the_penalty_changes_nothing():
    config = replace(CONFIG, **VARIANTS["f-gr"])
    followed = whole(config)[0]
    plain = Trainer(config)
    for _ in range(config.epochs):
        plain.epoch()
    assert plain.penalty_ratio == 0 < followed.penalty_ratio
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain), tensors(followed)))


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 0.01)])
@pytest.mark.parametrize("variant", ["sgd", "f-gr", "db", "flooding"])
def test_low_precision_stays_near_full_precision(variant, precision, tolerance):
    full = replace(CONFIG, **VARIANTS[variant])
    reference, trainer = Trainer(full), Trainer(replace(full, precision=precision))
    assert next(trainer.model.parameters()).dtype == torch.float32
    reference.epoch(), trainer.epoch()
    start = Trainer(full)
    for a, b, c in zip(tensors(reference), tensors(trainer), tensors(start)):
        assert not torch.equal(a, b)
        assert (a - b).norm() < tolerance * (a - c).norm()


def test_fp16_skips_a_step_that_overflows_and_lowers_its_scale():
    trainer = Trainer(replace(CONFIG, **VARIANTS["fp16"]))
    trainer._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = tensors(trainer)
    trainer.epoch(lambda: True)  # one step
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(trainer)))
    assert trainer._scaler.get_scale() == 2.0**23
    for _ in range(CONFIG.epochs):
        trainer.epoch()
    assert not torch.equal(before[0], tensors(trainer)[0])


@pytest.mark.parametrize("variant", ["sgd", "f-gr"])
def test_a_compiled_model_trains_alike_and_its_state_fits_the_bare_one(variant, monkeypatch):
    compiled = []

    def compile_eagerly(model):
        compiled.append(torch_compile(model, backend="eager"))
        return compiled[-1]

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    config = replace(CONFIG, epochs=1, **VARIANTS[variant])
    bare, trainer = Trainer(config), Trainer(replace(config, compile=True))
    bare.epoch(), trainer.epoch()
    assert len(compiled) == 1
    for a, b in zip(tensors(bare), tensors(trainer)):
        torch.testing.assert_close(a, b)
    bare.load_state_dict(trainer.state_dict())


@pytest.mark.parametrize("variant", ["sgd", "cnn with BatchNorm", "central with adam", "db", "msam"])
def test_channels_that_lie_last_change_rounding_alone(variant):
    config = replace(CONFIG, **{**VARIANTS[variant], "model": "resnet18", "depth": 10, "width": 4, "epochs": 1})
    reference, trainer = Trainer(config), Trainer(replace(config, channels_last=True))
    images = [p for p in trainer.model.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in images)
    reference.epoch(), trainer.epoch()
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in images)
    for a, b in zip(tensors(reference), tensors(trainer)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 if "adam" in variant else 1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_processes_share_a_batch_and_their_mean_gradient_is_that_of_one(precision):
    """Without DistributedDataParallel: the mean of what both would add to `.grad` is the gradient of the batch."""
    config = replace(CONFIG, precision=precision)
    part = load(config).train[:20]
    batch = (part.x, part.y)
    gradients = []
    for group in (Processes(0, 1), Processes(0, 2), Processes(1, 2)):
        alone = Trainer(config)
        alone.processes = group
        alone._loss(alone._share(batch)).backward()
        gradients.append([p.grad for p in alone.model.parameters()])
    for one, first, second in zip(*gradients):
        torch.testing.assert_close((first + second) / 2, one, rtol=1e-4, atol=1e-3 if precision == "fp16" else 1e-6)


def test_what_is_augmented_does_not_depend_on_the_processes():
    config = replace(CONFIG, data="images", augment=True, model="cnn")
    shares = []
    for group in (Processes(0, 1), Processes(0, 2), Processes(1, 2)):
        split = images()
        alone = Trainer(config, builtin(config, split))
        alone.processes = group
        shares.append(alone._share((split.train.x[:20], split.train.y[:20]))[0])
    assert torch.equal(shares[0][0::2], shares[1])
    assert torch.equal(shares[0][1::2], shares[2])


REFUSED = [
    ({"method": "DB", "gamma": 0.1, "compile": True}, 1, "compile must be false with method DB"),
    ({"method": "DB", "gamma": 0.1}, 2, "method must not be DB with several processes"),
    ({"batch_size": 25}, 2, "batch_size must be a multiple of the 2 processes that share it, got '25'"),
]


@pytest.mark.parametrize(("changes", "size", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_cannot_be_trained_is_refused(changes, size, message):
    with pytest.raises(BadInput, match=message):
        Trainer(replace(CONFIG, **changes), processes=Processes(0, size))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(BadInput, match="device must be cpu where 1 CUDA devices are needed and 0 found, got 'cuda'"):
        Trainer(replace(CONFIG, device="cuda"))


def test_the_state_of_another_model_is_refused_and_changes_nothing():
    other = Trainer(replace(CONFIG, width=9, depth=2))
    other.epoch()
    trainer = Trainer(CONFIG)
    before, generators = tensors(trainer), random_state(trainer.device)
    with pytest.raises(BadInput, match=r"another model: .*5.weight is missing.*1.weight is \(9, 64\) float32 instead"):
        trainer.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(trainer)))
    assert trainer.step == 0
    assert torch.equal(generators["torch"], random_state(trainer.device)["torch"])


def test_seeding_a_run_leaves_the_generators_as_they_were():
    before = random_state(torch.device("cpu"))
    with seeded(3):
        first = (torch.rand(2).tolist(), random.random(), np.random.random())
    after = random_state(torch.device("cpu"))
    assert torch.equal(before["torch"], after["torch"])
    assert (before["python"], before["numpy"]) == (after["python"], after["numpy"])
    with seeded(3):
        assert (torch.rand(2).tolist(), random.random(), np.random.random()) == first
    set_random_state(before, torch.device("cpu"))
