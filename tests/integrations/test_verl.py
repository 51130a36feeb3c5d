"""verl's FSDP engine on the host: mini-batches of PPO against a loop by hand, on one process and on two; refusals.

verl knows accelerators alone, and lets others describe theirs: here that is the host.
"""

import contextlib
import functools
import json
import os
import warnings

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn

import gradreg

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # engines that are not installed
    from hydra import compose, initialize_config_module
    from tensordict import TensorDict
    from transformers import AutoModelForCausalLM, Qwen2Config
    from verl.plugin.platform import PlatformBase, set_platform


class Host(PlatformBase):
    """The host as a platform of verl."""

    device_name, vendor_name, device_module = "cpu", "host", torch.cpu

    def current_device(self):
        return "cpu"

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "NO_DEVICES"

    def ray_resource_name(self):
        return "CPU"

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def get_device_capability(self, device_index=0):
        return None, None

    def nvtx_range(self, msg):
        return contextlib.nullcontext()

    def _nothing(self, *args):
        return None

    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = _nothing
    empty_cache = profiler_start = profiler_stop = cudart = _nothing


set_platform(Host())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import FSDPEngineConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp import FSDPEngineWithLMHead
    from verl.workers.utils.losses import ppo_loss

    from gradreg.integrations.verl import RegularizedEngineConfig, RegularizedFSDPEngine

pytestmark = pytest.mark.filterwarnings("ignore")
GAMMA, EPSILON, VOCABULARY = 0.3, 0.1, 31
TARGET = "gradreg.integrations.verl.RegularizedEngineConfig"


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save(str(tmp_path_factory.mktemp("policy")))


def save(folder, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config = Qwen2Config(**sizes, tie_word_embeddings=False, initializer_range=0.3, **options)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def settings(target=TARGET, strategy="fsdp2", **fields):
    """The actor's config as a command line makes it."""
    actor = "actor_rollout_ref.actor"
    lines = [
        f"{actor}.strategy={strategy}",
        f"{actor}.use_dynamic_bsz=False",
        f"{actor}.ppo_micro_batch_size_per_gpu=2",
    ]
    lines += [f"{actor}.optim.lr=0.1", f"{actor}.optim.optimizer=SGD", f"{actor}.optim.clip_grad=0.5"]
    lines += [f"{actor}.optim.total_training_steps=100", f"{actor}.entropy_coeff=0.01"]
    lines += [f"{actor}.checkpoint.load_contents=[model,optimizer]"]  # random state: verl asks accelerators alone
    config = f"{actor}.fsdp_config"
    lines += [f"{config}._target_={target}"] * (target is not None)
    precise = {"mixed_precision": "{param_dtype: fp32, reduce_dtype: fp32}", "use_torch_compile": False}
    if target is not None:
        fields = {"gamma": GAMMA, "epsilon": EPSILON, "exclude": "[]"} | fields
    lines += [f"++{config}.{name}={value}" for name, value in (precise | fields).items()]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return omega_conf_to_dataclass(compose("ppo_trainer", overrides=lines).actor_rollout_ref.actor)


def engine_of(path, config, cls=RegularizedFSDPEngine, **model):
    override = {"attn_implementation": "sdpa" if model.get("use_remove_padding") else "eager"}
    common = {"load_tokenizer": False, "use_remove_padding": False, "enable_gradient_checkpointing": False}
    engine = cls(
        HFModelConfig(path=path, override_config=override, **common | model),
        config.engine,
        config.optim,
        config.checkpoint,
    )
    engine.initialize()
    return engine


def mini_batches(num=3, rank=0, world=1):
    """Of four rollouts each, with old log-probabilities that are not those of the policy; a rank has its share."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(num):
        rollouts = []
        for prompt, response in [(3, 4), (2, 5), (4, 2), (3, 3)]:
            ids = torch.randint(0, VOCABULARY, (prompt + response,), generator=generator)
            old = -2 - torch.rand(response, generator=generator)
            advantages = torch.randn((), generator=generator).expand(response)
            rollouts.append((ids, prompt, old, advantages))
        made.append(rollouts[rank::world])
    return made


def batch_of(rollouts):
    """As verl's trainer hands it to an engine."""
    columns = {
        "input_ids": [ids for ids, *_ in rollouts],
        "position_ids": [torch.arange(len(ids)) for ids, *_ in rollouts],
        "prompts": [ids[:n] for ids, n, *_ in rollouts],
        "responses": [ids[n:] for ids, n, *_ in rollouts],
        "loss_mask": [torch.ones(len(ids) - n, dtype=torch.long) for ids, n, *_ in rollouts],
        "response_mask": [torch.ones(len(ids) - n, dtype=torch.long) for ids, n, *_ in rollouts],
        "old_log_probs": [old for _, _, old, _ in rollouts],
        "advantages": [advantages.clone() for *_, advantages in rollouts],
    }
    nested = {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in columns.items()}
    plain = {"temperature": 1.0, "use_remove_padding": False, "use_dynamic_bsz": False, "calculate_entropy": True}
    return tu.get_tensordict(nested, plain | {"micro_batch_size_per_gpu": 2, "global_batch_size": 4})


def train(engine, config, of_rollouts, loss_function=None, **data):
    outputs = []
    for k, rollouts in enumerate(of_rollouts):
        torch.manual_seed(k)
        batch = batch_of(rollouts)
        tu.assign_non_tensor(batch, **data)
        with engine.train_mode():
            outputs.append(engine.train_batch(batch, loss_function or functools.partial(ppo_loss, config)))
    return outputs


def loss_by_hand(model, rollouts):
    """PPO's clipped loss with an entropy bonus, the mean over the tokens of a mini-batch."""
    total, num_tokens = 0.0, sum(len(old) for _, _, old, _ in rollouts)
    for ids, prompt, old, advantages in rollouts:
        logits = model(input_ids=ids[None]).logits[0, prompt - 1 : -1]
        every = logits.log_softmax(-1)
        chosen = every.gather(-1, ids[prompt:, None])[:, 0]
        ratio = (chosen - old).exp()
        gain = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        gain = torch.where(advantages < 0, torch.max(gain, 3 * advantages), gain)
        entropy = -(every.exp() * every).sum(-1)
        total = total - (gain + 0.01 * entropy).sum()
    return total / num_tokens


def by_hand(path, of_rollouts, gamma=GAMMA, epsilon=EPSILON, spared=(), clip=0.5):
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    named = dict(model.named_parameters())
    parameters, moved = list(named.values()), [name not in spared for name in named]
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01)
    last = {}
    for rollouts in of_rollouts:
        first = torch.autograd.grad(loss_by_hand(model, rollouts), parameters)
        weights = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, g, m in zip(parameters, first, moved):
                p += epsilon * g * m
        second = torch.autograd.grad(loss_by_hand(model, rollouts), parameters)
        with torch.no_grad():
            for p, w, g1, g2, m in zip(parameters, weights, first, second, moved):
                p.copy_(w)
                p.grad = g1 + m * gamma / epsilon * (g2 - g1)
        length = torch.cat([g.flatten() for g, m in zip(first, moved) if m]).norm()
        penalty = torch.cat([(p.grad - g).flatten() for p, g in zip(parameters, first)]).norm()
        total = nn.utils.clip_grad_norm_(parameters, clip)
        last = {"gradreg/grad_norm": length, "gradreg/penalty_ratio": penalty / length, "grad_norm": total}
        optimizer.step()
    return {name: p.detach() for name, p in named.items()}, {name: x.item() for name, x in last.items()}


def weights_of(engine):
    return {name: p.detach().full_tensor().clone() for name, p in engine.module.named_parameters()}


def number(x):
    return x[0] if isinstance(x, list) else x


def assert_same(ours, theirs, rtol=1e-5, atol=1e-6):
    assert list(ours) == list(theirs)
    torch.testing.assert_close(list(ours.values()), list(theirs.values()), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("fields", "data", "model"),
    [
        ({}, {}, {}),
        ({"gamma": EPSILON}, {}, {}),
        ({"use_no_sync_for_gradient_accumulation": True}, {}, {}),
        ({"param_offload": True, "optimizer_offload": True}, {}, {}),
        ({}, {"use_dynamic_bsz": True, "max_token_len_per_gpu": 14}, {}),
        ({}, {}, {"enable_gradient_checkpointing": True}),
        ({}, {"use_remove_padding": True}, {"use_remove_padding": True}),  # packed: by sdpa, as the host can
    ],
    ids=["plain", "gamma is epsilon", "deferred sync", "offload", "dynamic batches", "checkpointing", "packed"],
)
def test_mini_batches_equal_a_loop_by_hand(path, fields, data, model):
    config = settings(**fields)
    engine = engine_of(path, config, **model)
    *_, output = train(engine, config, mini_batches(), **data)
    gamma = fields.get("gamma", GAMMA)
    expected, last = by_hand(path, mini_batches(), gamma=gamma)
    assert_same(weights_of(engine), expected)
    plain, _ = by_hand(path, mini_batches(), gamma=0.0)
    assert not torch.allclose(expected["lm_head.weight"], plain["lm_head.weight"], rtol=1e-2, atol=1e-3)
    for name, value in last.items():
        assert number(output["metrics"][name]) == pytest.approx(value, rel=1e-4)
    assert output["metrics"]["gradreg/skipped_steps"] == [0]
    assert (engine.regularizer.step, len(output["loss"])) == (3, 2)
    assert engine.regularizer._engine.displacement.memory == []  # for the rollout


def test_embeddings_and_head_are_spared_unless_told_otherwise(path):
    config = settings(exclude="null")
    engine = engine_of(path, config)
    train(engine, config, mini_batches())
    expected, _ = by_hand(path, mini_batches(), spared=["model.embed_tokens.weight", "lm_head.weight"])
    assert_same(weights_of(engine), expected)


@pytest.mark.parametrize("target", [TARGET, None])
def test_no_penalty_is_verl_bit_for_bit(path, target):
    """γ = 0, and a plain config in an engine that stands where verl's stood."""
    config = settings(**{"gamma": 0.0} if target else {}, target=target)
    engine = engine_of(path, config)
    ours = train(engine, config, mini_batches())
    plain = settings(target=None)
    host = engine_of(path, plain, FSDPEngineWithLMHead)
    theirs = train(host, plain, mini_batches())
    assert_same(weights_of(engine), weights_of(host), rtol=0, atol=0)
    assert [x["loss"] for x in ours] == [x["loss"] for x in theirs]
    assert set(ours[-1]["metrics"]) == set(theirs[-1]["metrics"])
    assert (engine.regularizer is None) is (target is None)


def by_hand_in_the_engine(engine, config, of_rollouts):
    """The same with the parts of a plain engine, whose masks of dropout are those of padded rows."""
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    loss = functools.partial(ppo_loss, config)

    def gradient(k, rollouts):
        torch.manual_seed(k)
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(batch_of(rollouts), loss)
        return [p.grad.full_tensor().clone() for p in parameters]

    def set_to(values):
        with torch.no_grad():
            for p, value in zip(parameters, values):
                p.to_local().copy_(value)

    with engine.train_mode():
        for k, rollouts in enumerate(of_rollouts):
            weights = [p.detach().full_tensor().clone() for p in parameters]
            first = gradient(k, rollouts)
            set_to([w + EPSILON * g for w, g in zip(weights, first)])
            second = gradient(k, rollouts)
            set_to(weights)
            for p, g1, g2 in zip(parameters, first, second):
                p.grad.to_local().copy_(g1 + GAMMA / EPSILON * (g2 - g1))
            engine.optimizer_step()
    return weights_of(engine)


@pytest.mark.parametrize(
    ("options", "fields", "model"),
    [
        ({"attention_dropout": 0.2}, {}, {}),
        ({}, {}, {"lora_rank": 2}),
        ({}, {"mixed_precision": "null"}, {}),
    ],
    ids=["dropout", "adapters", "bf16"],
)
def test_it_equals_displacing_verls_own_engine_by_hand(tmp_path, options, fields, model):
    folder, config, plain = save(str(tmp_path), **options), settings(**fields), settings(target=None, **fields)
    torch.manual_seed(5)  # adapters are drawn
    ours = engine_of(folder, config, **model)
    torch.manual_seed(5)
    theirs = engine_of(folder, plain, FSDPEngineWithLMHead, **model)
    before = weights_of(ours)
    train(ours, config, mini_batches())
    expected = by_hand_in_the_engine(theirs, plain, mini_batches())
    assert_same(weights_of(ours), expected)
    changed = {name for name, p in before.items() if not torch.equal(p, expected[name])}
    assert changed == set(ours.regularizer.selection.named)
    assert all("lora_" in name for name in changed) is bool(model)


def test_random_numbers_move_on_by_one_pass(tmp_path):
    folder, drawn = save(str(tmp_path), attention_dropout=0.2), []
    for gamma in (GAMMA, 0.0):
        config = settings(gamma=gamma)
        train(engine_of(folder, config), config, mini_batches(1))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_a_loss_scale_changes_nothing(path):
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    results = []
    for scale in (None, 1024.0):
        config = settings()
        engine = engine_of(path, config)
        engine.scaler = scale and ShardedGradScaler("cpu", init_scale=scale)  # as fp16 has it
        output = train(engine, config, mini_batches())[-1]
        results.append((weights_of(engine), output["metrics"]["gradreg/penalty_ratio"]))
    assert_same(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)


def test_resume_is_exact(path, tmp_path):
    def start():
        config = settings(gamma="null", target_penalty_ratio=0.1, gamma_warmup_steps=2)
        return config, engine_of(path, config)

    config, straight = start()
    train(straight, config, mini_batches(4))
    config, first = start()
    train(first, config, mini_batches(4)[:2])
    first.save_checkpoint(str(tmp_path / "step"))
    state = json.loads((tmp_path / "step" / "gradreg_world_size_1_rank_0.json").read_text())
    assert state["step"] == 2
    config, resumed = start()
    resumed.load_checkpoint(str(tmp_path / "step"))
    train(resumed, config, mini_batches(4)[2:])
    assert_same(weights_of(resumed), weights_of(straight), rtol=0, atol=0)
    assert resumed.regularizer.state_dict() == straight.regularizer.state_dict()


def test_the_default_settings_of_sft():
    lines = [f"engine._target_={TARGET}", "+engine.gamma=0.1", "+engine.exclude=[]", "engine.strategy=fsdp2"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = omega_conf_to_dataclass(compose("sft_trainer_engine", overrides=lines).engine)
    assert (type(config), config.gamma, config.exclude) == (RegularizedEngineConfig, 0.1, [])


def test_a_loss_that_is_another_when_asked_again_is_refused(path):
    config, calls = settings(), []

    def loss_function(model_output, data, dp_group=None):
        calls.append(1)
        return model_output["log_probs"].values().sum() * len(calls), {}

    with pytest.raises(ValueError, match=r"the loss of a mini-batch was asked for twice"):
        train(engine_of(path, config), config, mini_batches(1), loss_function)


def test_an_exception_puts_the_weights_back(path):
    config, calls = settings(), []

    def loss_function(model_output, data, dp_group=None):
        calls.append(1)
        if len(calls) == 8:  # two micro-batches in the first pass, two each when asked twice, the last of the second
            raise RuntimeError("the machine is on fire")
        return model_output["log_probs"].values().sum(), {}

    engine = engine_of(path, config)
    before = weights_of(engine)
    with pytest.raises(RuntimeError, match="on fire"):
        train(engine, config, mini_batches(1), loss_function)
    assert_same(weights_of(engine), before, rtol=0, atol=0)


def test_losses_without_metrics_get_none(path):
    """The trainer of SFT would log lists."""
    config = settings()
    output = train(engine_of(path, config), config, mini_batches(1), lambda model_output, data, dp_group=None: (
        model_output["log_probs"].values().sum(), {}
    ))  # fmt: skip
    assert set(output[0]["metrics"]) == {"grad_norm"}


def test_a_step_outside_of_train_batch_is_refused(path):
    config = settings()
    engine = engine_of(path, config)
    with engine.train_mode():
        engine.forward_backward_batch(batch_of(mini_batches(1)[0]), functools.partial(ppo_loss, config))
        with pytest.raises(RuntimeError, match=r"outside of train_batch, and this step would have no penalty"):
            engine.optimizer_step()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "fsdp"}, r"strategy=fsdp is not supported .* set actor_rollout_ref\.actor\.strategy=fsdp2"),
        ({"ulysses_sequence_parallel_size": 2}, "ulysses_sequence_parallel_size=2 is not supported"),
        ({"offload_policy": True}, "offload_policy=True is not supported .* use param_offload"),
        ({"qat.enable": True}, "qat.enable=True is not supported"),
        ({"exclude": "[nothing]"}, "matches no parameter"),
    ],
)
def test_refusals(path, fields, message):
    config = settings(**fields)
    model = {"use_remove_padding": True} if "ulysses_sequence_parallel_size" in fields else {}
    with pytest.raises(ValueError, match=message):
        engine_of(path, config, **model)


def test_the_registry_finds_what_refuses_too(path):
    config = settings(strategy="fsdp_turbo")
    for model_type, backend, message in [
        ("language_model", "fsdp_turbo", "strategy=fsdp_turbo"),
        ("language_model", "fsdp", None),
        ("value_model", "fsdp2", "strategy=fsdp_turbo"),
    ]:
        found = EngineRegistry.get_engine_cls(model_type, backend)
        assert issubclass(found, RegularizedFSDPEngine.__bases__[0])
        if message is not None:
            with pytest.raises(ValueError, match=message):
                engine_of(path, config, found)
    with pytest.raises(ValueError, match="model_type=value_model is not supported"):
        engine_of(path, settings(), found, model_type="value_model")


def test_an_engine_that_stands_there_already_is_not_passed_over():
    with pytest.raises(RuntimeError, match=r"another package has registered .*VERL_USE_EXTERNAL_PLUGINS"):
        gradreg.integrations.verl._register()


def test_another_version_is_told_of(path, monkeypatch):
    monkeypatch.setattr(gradreg.integrations.verl, "version", "0.10.0")
    with pytest.warns(UserWarning, match=r"tested with verl 0\.9, and not with 0\.10\.0"):
        engine_of(path, settings())


def test_bad_numbers_are_refused_where_the_config_is_made():
    with pytest.raises(Exception, match=r'scheme must be "forward" or "backward", got'):
        settings(scheme="central")
    with pytest.raises(Exception, match="unexpected keyword argument"):
        settings(gama=0.1)
    assert issubclass(RegularizedEngineConfig, FSDPEngineConfig)


def test_without_a_number_gamma_follows_a_ratio(path):
    config = settings(gamma="null", epsilon="null")
    engine = engine_of(path, config)
    output = train(engine, config, mini_batches(1) * 12)[-1]
    assert isinstance(engine.regularizer.gamma, gradreg.TargetRatio)
    assert output["metrics"]["gradreg/gamma"][0] > 0
    assert 0 < output["metrics"]["gradreg/penalty_ratio"][0] < 2 * engine.regularizer.gamma.target


def on_one_rank(rank, path, folder):
    results = []
    for size in (-1, 1):  # sharded over both, and one copy each (HSDP)
        config = settings(fsdp_size=size)
        engine = engine_of(path, config)
        outputs = train(engine, config, mini_batches(rank=rank, world=2))
        found = weights_of(engine), {name: number(x) for name, x in outputs[-1]["metrics"].items() if "grad" in name}
        results.append(found)
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    results.append(sorted(name for name in os.listdir(folder) if name.startswith("gradreg")))
    engine = engine_of(path, settings(gamma=0.1 + rank))
    with pytest.raises(ValueError, match=r"ranks must agree on gamma, got 0\.1 on rank 0 and 1\.1 on rank 1"):
        train(engine, config, mini_batches(1, rank=rank, world=2))
    return results


def test_two_ranks_equal_one_process(path, tmp_path):
    expected, last = by_hand(path, mini_batches())
    for *results, files in ranks.on_two_ranks(ranks.of_file, __file__, "on_one_rank", path, str(tmp_path / "step")):
        for weights, metrics in results:
            assert_same(weights, expected)
            assert {name: metrics[name] for name in last} == pytest.approx(last, rel=1e-4)
        assert files == [f"gradreg_world_size_2_rank_{rank}.json" for rank in (0, 1)]


def test_a_worker_of_verl_trains_with_it(path, monkeypatch):
    """What Ray runs on each device, without Ray: from one batch to mini-batches, and from their metrics to a log."""
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cpu, name, lambda: 0, raising=False)
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    config = settings()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    model = HFModelConfig(
        path=path,
        load_tokenizer=False,
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "eager"},
    )
    config.engine.use_dynamic_bsz, config.engine.micro_batch_size_per_gpu = False, 2
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=config.engine,
            optimizer_config=config.optim,
            checkpoint_config=config.checkpoint,
        )
    )
    worker.reset()
    worker.set_loss_fn(functools.partial(ppo_loss, config))
    assert type(worker.engine) is RegularizedFSDPEngine
    batch = batch_of([rollout for rollouts in mini_batches() for rollout in rollouts])
    tu.assign_non_tensor(batch, mini_batch_size=4, epochs=1, dataloader_kwargs={"shuffle": False})
    assert isinstance(batch, TensorDict)
    output = worker.train_mini_batch(batch)
    metrics = tu.get(output, "metrics")
    expected, last = by_hand(path, mini_batches())
    assert_same(weights_of(worker.engine), expected)
    assert metrics["gradreg/penalty_ratio"][-1] == pytest.approx(last["gradreg/penalty_ratio"], rel=1e-4)
    assert len(metrics["gradreg/penalty_ratio"]) == 3
