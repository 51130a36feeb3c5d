"""A Trainer that somebody else's code makes: one line attaches the penalty, and the weights are those of the class."""

# %% A small classifier, in the shape that the Trainer expects: it returns its loss.
import copy
import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments

from gradreg.integrations.transformers import RegularizedTrainer, RegularizedTrainingArguments, attach


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.layers(x), labels)}


torch.manual_seed(0)
x = torch.randn(112, 10)
labels = (x @ torch.randn(10, 3)).argmax(1)
rows = [{"x": x[i], "labels": labels[i]} for i in range(len(x))]
model = Classifier()
model_of_the_class = copy.deepcopy(model)
OPTIONS = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 3,
    "num_train_epochs": 4,
    "learning_rate": 0.5,
    "optim": "sgd",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


# %% Theirs: the class of the trainer, its arguments and its making are out of reach; a hook is handed the result.
class SomebodysTrainer(Trainer):
    pass


def train_as_somebody_does(hook) -> Trainer:
    trainer = SomebodysTrainer(model, TrainingArguments(tempfile.mkdtemp(), **OPTIONS), train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    hook(trainer)  # post_trainer_create of Axolotl, on_init_end of an ms-swift callback
    trainer.train()
    return trainer


# %% Ours: the hook.
trainer = train_as_somebody_does(lambda trainer: attach(trainer, gamma=0.5, epsilon=0.5))

# %% The same by the class, where one may choose it.
arguments = RegularizedTrainingArguments(tempfile.mkdtemp(), gamma=0.5, epsilon=0.5, **OPTIONS)
as_class = RegularizedTrainer(model_of_the_class, arguments, train_dataset=rows)
as_class.remove_callback(PrinterCallback)
as_class.train()

assert isinstance(trainer, SomebodysTrainer)
assert all(torch.equal(p, q) for p, q in zip(model.parameters(), model_of_the_class.parameters()))
print(f"{type(trainer).__name__}: {trainer.regularizer.step} steps, bit for bit those of RegularizedTrainer")
print("step   loss  penalty ratio")
for entry in trainer.state.log_history:
    if "penalty_ratio" in entry:
        print(f"{entry['step']:4d}  {entry['loss']:.3f}          {entry['penalty_ratio']:.3f}")
