"""Damage of all options, added up batch by batch.

It stands alone because it alone holds gradients: everything else of a plan is bytes and choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from qbert.allocation.whole_file.matrices import slopes
from qbert.allocation.whole_file.options import Change, Option, Rules
from qbert.allocation.whole_file.tables import table_options
from qbert.outputs import Call
from qbert.usage import UseCounter


class Damages:
    """Adds up the damage of the options of matrices, and keeps what those of tables need."""

    def __init__(self, rules: Sequence[Rules], changes: Mapping[nn.Module, list[Change | None]]) -> None:
        self.rule_of = {m: r for r in rules for m in r.modules}
        self.changes = changes
        self.sums = {m: [0.0] * len(c) for m, c in changes.items()}
        self.table_calls: dict[nn.Module, list[Call]] = {r.first.module: [] for r in rules if r.is_table}
        self.samples = 0

    @torch.no_grad()
    def add(self, samples: int, calls: Sequence[Call]) -> None:
        """Count one batch."""
        self.samples += samples
        linear: dict[nn.Module, list[Call]] = {}
        for call in calls:
            if call.module in self.table_calls:
                self.table_calls[call.module].append(call)
            else:
                linear.setdefault(self.rule_of[call.module].first.module, []).append(call)
        for module, own in linear.items():
            made = [(i, change) for i, change in enumerate(self.changes[module]) if change is not None]
            if not made:
                continue
            found = slopes(module, own, [change for _, change in made])
            if len({len(s) for s in found}) == 1:  # calls for the same samples, whose changes add up
                found = [torch.stack(found).sum(0)]
            for s in found:
                for (index, _), total in zip(made, s.square().sum(0).tolist(), strict=True):
                    self.sums[module][index] += total

    @torch.no_grad()
    def options(self, rules: Rules, uses: UseCounter) -> Iterator[Option]:
        """The measured options of a weight."""
        scale = 0.5 / max(self.samples, 1)
        if rules.is_table:
            use = uses.use(rules.first.module)
            calls = self.table_calls[rules.first.module]
            for rule, spec, harm in table_options(rules, use, calls):
                yield Option(rule, rules.size(spec), scale * harm)
            return
        harms = iter(self.sums[rules.first.module])
        for rule in rules.matrix_rules:
            yield Option(rule, rules.size(rules.spec(rule)), scale * next(harms))
        for other in rules.further:
            bits = next(iter(other.rules.values()))["bits"]
            yield Option({"bits": bits, **other.form}, other.size, scale * next(harms), other.rules, other.form)
