"""The selection: which parameters are displaced and penalized.

Names are those of `model.named_parameters()`, with and without what wrappers put in front (`module.` of DDP,
`_orig_mod.` of torch.compile, FSDP, Fabric and checkpoint wrappers), so a pattern written for the bare model matches
the wrapped one. A tied parameter has several names; any of them selects or excludes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from gradreg.training.anatomy import is_lazy

Predicate = Callable[[str, nn.Parameter], bool]
Rule = str | type[nn.Module] | Predicate
Rules = Rule | Iterable[Rule]

_WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED += ("_forward_module", "_original_module")  # Lightning Fabric's
_WRAPPERS = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(_WRAPPED)})\.")


def bare_name(name: str) -> str:
    """The name without wrapper prefixes.

    Example:
        >>> bare_name("module._orig_mod.blocks.0.weight")
        'blocks.0.weight'
    """
    return _WRAPPERS.sub("", name)


def bare_class(model: nn.Module) -> str:
    """The class of a model without its wrappers, which hold nothing but the model.

    Example:
        >>> bare_class(nn.DataParallel(nn.Linear(1, 1)))
        'Linear'
    """
    children = dict(model.named_children())
    is_wrapper = len(children) == 1 and next(iter(children)) in _WRAPPED
    return bare_class(*children.values()) if is_wrapper else type(model).__name__


def _as_rules(argument: str, rules: Rules) -> tuple[Rule, ...]:
    if isinstance(rules, str) or callable(rules):
        rules = (rules,)
    rules = tuple(rules)
    for rule in rules:
        if not isinstance(rule, str) and not callable(rule):
            raise TypeError(
                f"{argument} takes shell-style patterns, module types or predicates (name, parameter) -> bool, "
                f"got {rule!r}."
            )
    return rules


class Selection:
    """The parameters of a model that the rules pick, by name; printing it shows what matched.

    With few of them, such as norm layers only (SAM-ON), a step costs less than two passes, since the second makes no
    other weight gradients; their radius is larger, near 1 (Müller et al., [Normalization Layers Are All That
    Sharpness-Aware Minimization Needs](https://arxiv.org/abs/2306.04226), NeurIPS 2023).

    Args:
        model: the model, wrapped or not.
        include: patterns, module types or predicates; None takes every parameter.
        exclude: the same; what it matches is taken away from what `include` matched.

    Raises:
        ValueError: a rule that matches nothing, or rules that leave nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        >>> print(Selection(model, include=None, exclude=nn.LayerNorm))
        2 of 4 parameters selected (9 of 15 numbers)
          0.weight  (3, 2)
          0.bias    (3,)
    """

    def __init__(self, model: nn.Module, include: Rules | None = None, exclude: Rules = ()) -> None:
        self._include = None if include is None else _as_rules("include", include)
        self._exclude = _as_rules("exclude", exclude)
        self.read(model)

    def read(self, model: nn.Module) -> None:
        """Match the rules against the model as it is now."""
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        everything = set(names)
        chosen = everything if self._include is None else self._match("include", self._include, model, names)
        chosen = chosen - self._match("exclude", self._exclude, model, names)
        self.all = list(names)
        self.named = {bare_name(names[p][0]): p for p in names if p in chosen and p.requires_grad}
        self.others = [p for p in names if p not in chosen or not p.requires_grad]
        if not self.named:
            raise ValueError(
                "include and exclude leave no trainable parameter to penalize, out of "
                f"{len(names)} in {bare_class(model)}; loosen them, or unfreeze a parameter."
            )

    @staticmethod
    def _match(
        argument: str, rules: tuple[Rule, ...], model: nn.Module, names: dict[nn.Parameter, list[str]]
    ) -> set[nn.Parameter]:
        chosen: set[nn.Parameter] = set()
        for rule in rules:
            if isinstance(rule, str):
                found = {
                    p
                    for p, aliases in names.items()
                    if any(fnmatchcase(n, rule) or fnmatchcase(bare_name(n), rule) for n in aliases)
                }
            elif isinstance(rule, type):
                found = {p for m in model.modules() if isinstance(m, rule) for p in m.parameters()}
            else:
                found = {p for p, aliases in names.items() if any(rule(bare_name(n), p) for n in aliases)}
            if not found:
                example = ", ".join(bare_name(aliases[0]) for aliases in list(names.values())[:3])
                raise ValueError(
                    f"{argument}: {rule!r} matches no parameter of {bare_class(model)}; its names look like {example}."
                )
            chosen |= found
        return chosen

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The selected parameters, in the model's order."""
        return list(self.named.values())

    @property
    def summary(self) -> str:
        """How much is selected, in one line."""
        numbers, total = (sum(p.numel() for p in ps if not is_lazy(p)) for ps in (self.parameters, self.all))
        return f"{len(self.named)} of {len(self.all)} parameters selected ({numbers} of {total} numbers)"

    def __str__(self) -> str:
        width = max(map(len, self.named))
        return "\n".join([self.summary, *(f"  {n:<{width}}  {tuple(p.shape)}" for n, p in self.named.items())])
