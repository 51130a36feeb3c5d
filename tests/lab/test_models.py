from dataclasses import replace

import pytest
import torch
from torch import nn

from gradreg.lab import models, objective
from gradreg.lab.config import RunConfig
from gradreg.lab.data import load
from gradreg.lab.data.parts import Part, Split
from gradreg.lab.folder import BadInput
from gradreg.lab.models import MODELS, attention, build, vision

DATA = {
    "mnist1d": RunConfig(data="mnist1d"),
    "digits": RunConfig(data="digits"),
    "text": RunConfig(data="text", num_train=100, batch_size=20),
    "cifar10": RunConfig(data="cifar10"),
}
SMALL = {
    "mlp": {"width": 8},
    "cnn": {"width": 4},
    "resnet18": {"depth": 10, "width": 4},
    "wideresnet": {"depth": 10, "width": 1},
    "vit": {"depth": 1, "width": 8},
    "gpt": {"depth": 1, "width": 8},
}


def split_of(name, rows=4):
    if name != "cifar10":
        return load(DATA[name])
    generator = torch.Generator().manual_seed(0)
    part = Part(torch.randn(rows, 3, 32, 32, generator=generator), torch.arange(rows))
    return Split(part, part, part, 10)


def fits(model, name):
    return models._kind(split_of(name)) in MODELS[model].fits


PAIRS = [(model, name) for model in MODELS for name in DATA]
EACH_FIT = pytest.mark.parametrize(("model", "name"), [pair for pair in PAIRS if fits(*pair)])
EACH_MODEL = pytest.mark.parametrize("model", MODELS)


def size(model):
    return sum(param.numel() for param in model.parameters())


def of(model, **fields):
    """A small model on the first data set that it fits."""
    name = next(name for name in DATA if fits(model, name))
    config = replace(DATA[name], model=model, **{**SMALL[model], **fields})
    return config, split_of(name)


@EACH_FIT
def test_a_fitting_model_gives_a_logit_for_each_class(model, name):
    split = split_of(name)
    built = build(replace(DATA[name], model=model, **SMALL[model]), split)
    x = split.train.x[:3]
    shape = (3, 64, split.num_classes) if name == "text" else (3, 10)
    assert built(x).shape == shape
    assert objective.loss(built, split.train[:3]).isfinite()


@pytest.mark.parametrize(("model", "name"), [pair for pair in PAIRS if not fits(*pair)])
def test_a_model_that_does_not_fit_is_named_with_those_that_do(model, name):
    with pytest.raises(BadInput, match=f"^model must be one of .* with data {name} .*got '{model}'.$") as refusal:
        build(replace(DATA[name], model=model), split_of(name))
    named = str(refusal.value).removeprefix("model must be one of ").split(" with ")[0].split(", ")
    assert named == [other for other in MODELS if fits(other, name)]


@EACH_MODEL
def test_a_model_is_made_by_its_seed_and_leaves_the_global_generator_as_it_was(model):
    config, split = of(model)
    before = torch.get_rng_state()
    one, same, other = (build(replace(config, seed=seed), split).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


@EACH_MODEL
def test_every_parameter_takes_part_and_can_be_differentiated_twice(model):
    config, split = of(model)
    built = build(config, split)
    params = list(built.parameters())
    grads = torch.autograd.grad(objective.loss(built, split.train[:3]), params, create_graph=True)
    assert all(g.abs().max() > 0 for g in grads), "each has a gradient"
    torch.autograd.grad(sum(g.square().sum() for g in grads), params, allow_unused=True)


@EACH_MODEL
@pytest.mark.parametrize("field", ["depth", "width"])
def test_depth_and_width_are_honored(model, field):
    larger = {"resnet18": {"depth": 18, "width": 8}, "wideresnet": {"depth": 16, "width": 2}}
    config, split = of(model)
    value = larger.get(model, {"depth": 3 if model == "cnn" else 4, "width": 16})[field]
    assert size(build(replace(config, **{field: value}), split)) > size(build(config, split))


@EACH_MODEL
def test_tensors_of_the_state_share_no_memory(model):
    """Checkpoints of safetensors refuse them."""
    state = build(*of(model)).state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


# Published: 11.17 M for ResNet-18 with the CIFAR stem; 36.5 M and 8.9 M in Zagoruyko & Komodakis, 2016.
@pytest.mark.parametrize(
    ("make", "millions", "exact"),
    [
        (lambda: vision.resnet(3, 10), 11.17, 11_173_962),
        (lambda: vision.resnet(3, 100), 11.22, 11_220_132),
        (lambda: vision.wide_resnet(3, 10), 36.5, 36_479_194),
        (lambda: vision.wide_resnet(3, 10, 40, 4), 8.9, 8_949_210),
    ],
    ids=["ResNet-18", "ResNet-18, 100 classes", "WRN-28-10", "WRN-40-4"],
)
def test_sizes_are_the_published_ones(make, millions, exact):
    with torch.device("meta"):
        count = size(make())
    assert count == exact
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_default_is_the_published_size():
    split = split_of("cifar10")
    assert size(build(RunConfig(data="cifar10", model="resnet18"), split)) == 11_173_962
    assert MODELS["wideresnet"].architecture is models.wideresnet
    with torch.device("meta"):
        assert size(models.wideresnet(RunConfig(data="cifar10", model="wideresnet"), split)) == 36_479_194


@pytest.mark.parametrize(
    ("model", "fields", "why"),
    [
        ("resnet18", {"depth": 20}, r"depth must be 8n \+ 2 with model resnet18 \(10, 18, 26, 34, …\), got 20"),
        ("wideresnet", {"depth": 4}, r"depth must be 6n \+ 4 .*got 4"),
        ("cnn", {"depth": 4}, "depth must be from 1 to 3 with model cnn on 8×8 images, got 4"),
        ("vit", {"activation": "silu"}, "activation must be left out with model vit, which has GELU, got 'silu'"),
        ("vit", {"width": 30}, "width must be a multiple of 4 with model vit, got 30"),
        ("vit", {"patch": 3}, r"patch must divide both sides, 1, 2, 4, 8 on 8×8 images, got '3'"),
        ("cnn", {"patch": 2}, "patch must be left out with model cnn: only vit has it, got '2'"),
        ("gpt", {"width": 30}, "width must be a multiple of 4 with model gpt, got 30"),
    ],
)
def test_a_size_that_there_is_not_is_refused(model, fields, why):
    with pytest.raises(BadInput, match=why):
        build(*of(model, **fields))


def test_strides_leave_maps_of_4_and_8_pixels_as_published():
    x = torch.randn(1, 3, 32, 32)
    assert vision.resnet(3, 10, 1, 4)[:-3](x).shape == (1, 32, 4, 4)
    assert vision.wide_resnet(3, 10, 10, 1)[:-3](x).shape == (1, 64, 8, 8)


def test_blocks_are_as_published():
    torch.manual_seed(0)
    x, relu = torch.randn(4, 2, 8, 8), nn.functional.relu
    basic = vision.BasicBlock(2, 3, 2)
    inner = basic.bn2(basic.conv2(relu(basic.bn1(basic.conv1(x)))))
    torch.testing.assert_close(basic(x), relu(inner + basic.shortcut(x)))
    wide = vision.PreactivationBlock(2, 3, 2)
    active = relu(wide.bn1(x))  # common to both branches where the shape changes
    inner = wide.conv2(relu(wide.bn2(wide.conv1(active))))
    torch.testing.assert_close(wide(x), inner + wide.shortcut(active))
    same = vision.PreactivationBlock(2, 2, 1)
    inner = same.conv2(relu(same.bn2(same.conv1(relu(same.bn1(x))))))
    torch.testing.assert_close(same(x), inner + x)


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet18", "wideresnet"])
def test_a_smooth_activation_is_everywhere_and_changes_no_weight(model):
    config, split = of(model)
    kinked, smooth = build(config, split), build(replace(config, activation="silu"), split)
    kinds = [type(m) for m in smooth.modules()]
    assert nn.SiLU in kinds
    assert nn.ReLU not in kinds
    assert all(torch.equal(a, b) for a, b in zip(kinked.state_dict().values(), smooth.state_dict().values()))
    x = split.train.x[:3]
    assert not torch.equal(kinked(x), smooth(x))


@pytest.mark.parametrize(
    ("height", "width", "patch"), [(32, 32, 4), (8, 8, 1), (28, 28, 4), (14, 14, 2), (64, 96, 8), (30, 30, 3)]
)
def test_patches_cut_the_image_without_a_rest(height, width, patch):
    part = Part(torch.randn(2, 3, height, width), torch.zeros(2, dtype=torch.long))
    built = build(RunConfig(model="vit", width=8, depth=1), Split(part, part, part))
    assert built.patches.kernel_size == (patch, patch)
    assert built(part.x).shape == (2, 10)


def test_the_vision_transformer_sees_where_a_patch_is():
    torch.manual_seed(0)
    built = attention.ViT(3, (8, 8), 10, 4, 8, 1)
    x = torch.randn(1, 3, 8, 8)
    assert not torch.allclose(built(x), built(x.roll(4, -1)), atol=1e-7)


@pytest.mark.parametrize("width", [16, 32, 128, 512])
def test_a_vision_transformer_of_any_width_starts_at_a_scale_at_which_it_learns(width):
    """At a deviation of 0.02, made for wide ones, that of width 32 had learned little after 800 steps."""
    torch.manual_seed(0)
    built = attention.ViT(1, (28, 28), 10, 4, width, 2)
    x = built.patches(torch.randn(64, 1, 28, 28)).flatten(2).transpose(1, 2)
    assert 0.8 < x.std() < 1.2
    block = built.blocks[0]
    added = block.mlp(block.norm2(x))
    assert 0.1 < added.std() / x.std() < 1.5
    assert 0.1 < built.head(built.norm(x)).std() < 1.5


def test_a_character_is_predicted_from_those_before_it_alone():
    torch.manual_seed(0)
    built = attention.GPT(vocab=11, width=8, depth=2, length=6)
    ids = torch.randint(11, (1, 6))
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] + 1) % 11
    one, other = built(ids), built(changed)
    torch.testing.assert_close(one[:, :3], other[:, :3], atol=0, rtol=0)
    assert not torch.allclose(one[:, 3:], other[:, 3:])


@pytest.mark.parametrize("causal", [False, True])
def test_attention_written_out_is_that_of_torch(causal):
    torch.manual_seed(0)
    block = attention.Block(8, heads=2, causal=causal).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    q, k, v = (t.reshape(3, 5, 2, 4).transpose(1, 2) for t in block.qkv(block.norm1(x)).split(8, dim=-1))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    middle = x + block.out(mixed.transpose(1, 2).reshape(3, 5, 8))
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)))


def test_the_patches_of_a_vit_are_those_that_were_asked_for():
    config, split = of("vit", width=8, depth=1)
    x = torch.randn(2, *split.train.x.shape[1:])
    for patch in (None, 2, 8):
        model = build(replace(config, patch=patch), split)
        found = next(m for m in model.modules() if isinstance(m, attention.ViT))
        side = patch or 1  # 8×8 pixels are 8×8 patches
        assert found.patches.kernel_size == found.patches.stride == (side, side)
        assert len(found.positions) == (8 // side) ** 2
        assert model(x).shape == (2, 10)
