"""Which students there are: how each is made from the teacher, and what it learns from, as one entry each.

A new student is one entry of `PLANS`:

    "mine": Plan(
        "my student",
        "where it is from",
        build=lambda bench, seed: my_student(bench.teacher, seed=seed),
        phases=(Phase("distillation", lambda bench: recipes.mine()),),
        shape="mine",
    )

``python experiments/compress.py --student mine`` then trains it beside its controls and ends in the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from qbert import students
from qbert.distill import Recipe, recipes
from qbert.encoders.targets import attention_heads, base_model, main_layers
from qbert.students.shared import share_layers

if TYPE_CHECKING:
    from compress_bench import Bench, Rows


def task_rows(bench: Bench) -> Rows:
    """The task's training rows."""
    return bench.rows


def fine_tuned(bench: Bench) -> nn.Module:
    """The teacher that the table is about."""
    return bench.teacher


def itself(bench: Bench, student: nn.Module) -> nn.Module:
    """The student as it is."""
    return student


@dataclass(frozen=True)
class Phase:
    """One training on the way to a student.

    Attributes:
        name: for the folder of its checkpoints.
        recipe: what it learns from.
        rows: what it learns on.
        teacher: whom it learns from.
        inside: (bench, student) -> the model to train, which holds the student's own encoder: the student with
            another head, say. The student itself by default.
        share: part of all steps, relative to the other phases.
        rate: factor of the plan's learning rate.
        keep_outputs: compute the teacher's logits once for all steps; for recipes of logits alone.
    """

    name: str
    recipe: Callable[[Bench], Recipe]
    rows: Callable[[Bench], Rows] = task_rows
    teacher: Callable[[Bench], nn.Module] = fine_tuned
    inside: Callable[[Bench, Any], nn.Module] = itself
    share: float = 1.0
    rate: float = 1.0
    keep_outputs: bool = False


@dataclass(frozen=True)
class Plan:
    """One student.

    Attributes:
        title: what the table calls it.
        source: where it is from.
        build: (bench, seed) -> a fresh student; what is drawn at random is drawn by the seed.
        phases: what it goes through, in order. All together have the budget's steps.
        shape: what it looks like; plans of one shape also start alike, and share their hard-label control.
        rate: peak learning rate; that of the command line takes its place.
        patience: how many times the budget's steps it takes: a network whose step costs a fiftieth needs more of them.
        ablations: plans that leave something out, by name; trained with ``--ablations``.
        bert_only: the teacher has to be a BERT.
        sentences_only: the task has to be one of labels or numbers of whole rows.
    """

    title: str
    source: str
    build: Callable[[Bench, int], nn.Module]
    phases: tuple[Phase, ...]
    shape: str
    rate: float = 2e-4
    patience: int = 1
    ablations: Mapping[str, Plan] = field(default_factory=dict)
    bert_only: bool = False
    sentences_only: bool = False

    @property
    def needs_pretrained(self) -> bool:
        """Whether it also learns from the encoder that the teacher was tuned from."""
        return any(p.teacher in (not_fine_tuned, language_model) or p.rows is likely_rows for p in self.phases)

    @property
    def applies_a_layer_often(self) -> bool:
        """Whether it starts from a sandwich, which has a layer in the middle."""
        return self.build in (sandwich, subformer)


def hard_labels(plan: Plan) -> Plan:
    """The control: the same student, steps and rate, taught by the labels alone."""
    phase = Phase("labels", lambda bench: recipes.qat(learned_steps=False))
    return Plan(f"{plan.shape}, hard labels", "control", plan.build, (phase,), plan.shape, plan.rate, plan.patience)


# ---- what students start from ----


def shallow(bench: Bench, seed: int) -> nn.Module:
    """The teacher with some of its layers, which are chosen by measurement."""
    return students.depth(bench.teacher, bench.layers())


def sandwich(bench: Bench, seed: int) -> nn.Module:
    """As many stored layers, one in the middle applied several times: the nearest to the teacher untrained."""
    return share_layers(bench.teacher, bench.choices(bench.depth).best_sandwich.layers)


def shallow_distilbert(bench: Bench, seed: int) -> nn.Module:
    """The same as a DistilBERT, its head fitted to the teacher's outputs."""
    return students.distilbert(shallow(bench, seed), bench.unlabelled())  # type: ignore[no-any-return]


def narrow(bench: Bench, seed: int) -> nn.Module:
    """TinyBERT's shape, fewer and narrower layers, projected from the teacher."""
    layers = bench.layers(bench.most_layers)
    return students.narrow(students.depth(bench.teacher, layers), bench.width, bench.unlabelled())


def narrow_at_random(bench: Bench, seed: int) -> nn.Module:
    """TinyBERT's shape with random weights, as the authors start."""
    shape: Any = base_model(narrow(bench, seed))[1].config
    return students.small(
        bench.teacher,
        layers=shape.num_hidden_layers,
        width=shape.hidden_size,
        intermediate=shape.intermediate_size,
        seed=seed,
    )


def from_scratch(bench: Bench, seed: int) -> nn.Module:
    """The shape of the shallow students with random weights."""
    return students.small(bench.teacher, layers=bench.depth, seed=seed)


def pruned(**what: Any) -> Callable[[Bench, int], nn.Module]:
    """The teacher without some of its parts, what stays making good for them."""
    return lambda bench, seed: students.prune(bench.teacher, data=bench.unlabelled(), **what)


def low_rank(bench: Bench, seed: int) -> nn.Module:
    """The teacher with half of its matrices' values, in factors that suit inputs and loss."""
    return students.factorize(bench.teacher, 0.5, data=bench.unlabelled())


def one_layer(bench: Bench, seed: int) -> nn.Module:
    """ALBERT's shape: the layer that does best at every depth, and a word table of a quarter of the width."""
    return students.narrow_table(
        students.share_layers(bench.teacher, "all", data=bench.unlabelled()), bench.table_width
    )


def subformer(bench: Bench, seed: int) -> nn.Module:
    """The sandwich with a word table of a quarter of the width that attends to itself."""
    return students.narrow_table(sandwich(bench, seed), bench.table_width, heads=4)


def searched_cell(bench: Bench, seed: int) -> nn.Module:
    """AdaBERT's shape: layers of the cell that a search for the task comes to."""
    cell, depth = bench.searched(seed)
    return students.adabert(bench.teacher, cell, depth, width=bench.table_width, seed=seed, **bench.word_table)


def plain_cell(bench: Bench, seed: int) -> nn.Module:
    """As many layers of a cell that nobody searched for: three convolutions of three words, each beside a skip."""
    _, depth = bench.searched(seed)
    return students.adabert(bench.teacher, depth=depth, width=bench.table_width, seed=seed, **bench.word_table)


def random_cells(draw: int) -> Callable[[Bench, int], nn.Module]:
    """As many layers of a cell that is drawn, as large as the one that is searched for."""

    def build(bench: Bench, seed: int) -> nn.Module:
        like, depth = bench.searched(seed)
        cell = students.random_cell(seed=draw, like=like)
        print(f"  drawn: {depth} layers of {cell}", flush=True)
        return students.adabert(bench.teacher, cell, depth, width=bench.table_width, seed=seed, **bench.word_table)

    return build


# ---- what they learn from ----


def probes(bench: Bench) -> Recipe:
    """Labels, and what the teacher and the probes of its layers say."""
    return recipes.adabert(bench.probed.losses, depth=len(bench.student.mixture))


def probed(bench: Bench) -> nn.Module:
    """The teacher with a probe on every layer."""
    return bench.probed  # type: ignore[no-any-return]


def all_depths(bench: Bench) -> Recipe:
    """Hidden states and scores of every layer, and logits, at once: students as deep as their teacher."""
    return recipes.qbert_kd()


def states_and_logits(bench: Bench) -> Recipe:
    """The same without scores, which fewer heads do not have in common."""
    return recipes.tinybert(projection=False, without=("scores",))


def relations(bench: Bench) -> Recipe:
    """MiniLMv2 with as many relation heads as the teacher has heads, then the outputs."""
    heads = attention_heads(base_model(bench.teacher)[1])
    return recipes.minilm(relation_heads=heads or 1, prediction=0.4)


def general_rows(bench: Bench) -> Rows:
    """Unlabelled text."""
    return bench.text_rows


def masked_rows(bench: Bench) -> Rows:
    """Unlabelled text with masked words."""
    return bench.masked_rows


def not_fine_tuned(bench: Bench) -> nn.Module:
    """The encoder that the teacher was tuned from."""
    return bench.pretrained


def language_model(bench: Bench) -> nn.Module:
    """The same with a head over the vocabulary."""
    return bench.language_model


def as_language_model(bench: Bench, student: Any) -> nn.Module:
    """A DistilBERT with a head over the vocabulary around the encoder of `student`."""
    masked = students.distilbert(students.depth(bench.language_model, bench.layers()))
    masked.distilbert = student.distilbert
    masked.tie_weights()
    return masked  # type: ignore[no-any-return]


def altered_rows(bench: Bench) -> Rows:
    """The task's rows and copies with some words masked."""
    return bench.altered(likely=False)


def likely_rows(bench: Bench) -> Rows:
    """The task's rows and copies with words that a masked language model finds likely."""
    return bench.altered(likely=True)


def tiny(
    title: str,
    *,
    build: Callable[[Bench, int], nn.Module] = narrow,
    general: bool = True,
    rows: Callable[[Bench], Rows] = task_rows,
    shape: str = "narrow",
    **settings: Any,
) -> Plan:
    """TinyBERT, or an ablation of it: `settings` are those of the recipe."""
    task = Phase("task", lambda bench: recipes.tinybert(**settings), rows)
    text = Phase(
        "general", lambda bench: recipes.tinybert(general=True), general_rows, not_fine_tuned, share=0.25, rate=1.0
    )
    phases = (text, Phase(task.name, task.recipe, rows, share=0.75)) if general else (task,)
    return Plan(title, "Jiao et al. 2020", build, phases, shape, rate=3e-4, bert_only=True)


def sentence_student(
    title: str,
    make: Callable[..., nn.Module],
    source: str = "ablation",
    rows: Callable[[Bench], Rows] = altered_rows,
    **settings: Any,
) -> Plan:
    """A BiLSTM or CNN that learns the teacher's logits; `settings` are those of the student."""

    def build(bench: Bench, seed: int) -> nn.Module:
        return make(bench.teacher, **bench.word_table, seed=seed, **settings)

    phase = Phase("distillation", lambda bench: recipes.bilstm(), rows, keep_outputs=True)
    shape = " ".join([title.split(maxsplit=1)[0].rstrip(","), *map(str, settings.values())])
    return Plan(title, source, build, (phase,), shape, rate=2e-3, patience=10, sentences_only=True)


def cells(title: str, build: Callable[[Bench, int], nn.Module], shape: str, source: str = "ablation") -> Plan:
    """Layers of one cell that learn from the teacher's probes."""
    phase = Phase("distillation", probes, teacher=probed)
    return Plan(title, source, build, (phase,), shape, rate=2e-3, patience=5, sentences_only=True)


SHALLOW = "fewer layers"
PLANS: dict[str, Plan] = {
    "distilbert": Plan(
        "DistilBERT",
        "Sanh et al. 2019",
        shallow_distilbert,
        (Phase("task", lambda bench: recipes.distilbert()),),
        "DistilBERT",
        bert_only=True,
        ablations={
            "pretraining": Plan(
                "DistilBERT, pre-training stage first",
                "Sanh et al. 2019",
                shallow_distilbert,
                (
                    Phase(
                        "pretraining",
                        lambda bench: recipes.distilbert(),
                        masked_rows,
                        language_model,
                        as_language_model,
                        share=0.25,
                    ),
                    Phase("task", lambda bench: recipes.distilbert(), share=0.75),
                ),
                "DistilBERT",
            )
        },
    ),
    "tinybert": replace(
        tiny("TinyBERT"),
        ablations={
            "general": tiny("TinyBERT without general stage", general=False),
            "random": tiny("TinyBERT from random weights", build=narrow_at_random, shape="narrow, random"),
            "augmented": tiny("TinyBERT with altered copies", rows=likely_rows),
            "prediction": tiny("TinyBERT without prediction", without=("prediction",)),
            "hidden": tiny("TinyBERT without hidden states", without=("hidden",)),
            "scores": tiny("TinyBERT without scores", without=("scores",)),
            "embeddings": tiny("TinyBERT without embeddings", without=("embeddings",)),
            "top": tiny("TinyBERT, top layers", layers="top"),
            "bottom": tiny("TinyBERT, bottom layers", layers="bottom"),
            "logits": Plan(
                "TinyBERT's shape by logits alone",
                "Hinton et al. 2015",
                narrow,
                (Phase("distillation", lambda bench: recipes.logits(), keep_outputs=True),),
                "narrow",
                rate=3e-4,
            ),
        },
    ),
    "minilm": Plan("MiniLM", "Wang et al. 2021", shallow, (Phase("distillation", relations),), SHALLOW),
    "pkd": Plan("PKD", "Sun et al. 2019", shallow, (Phase("distillation", lambda bench: recipes.pkd()),), SHALLOW),
    "sandwich": Plan(
        "sandwich",
        "Reid et al. 2021",
        sandwich,
        (Phase("distillation", all_depths),),
        "sandwich",
        rate=1e-4,  # gradients of a layer that is applied several times add up
    ),
    "pruned": Plan(
        "half of the FFN pruned",
        "Kurtic et al. 2023",
        pruned(ffn=0.5),
        (Phase("distillation", all_depths),),
        "pruned",
        rate=1e-4,
        ablations={
            "heads": Plan(
                "a quarter of the heads and half of the FFN pruned",
                "Kurtic et al. 2023",
                pruned(heads=0.25, ffn=0.5),
                (Phase("distillation", states_and_logits),),
                "pruned, fewer heads",
                rate=1e-4,
            ),
            "2:4": Plan(
                "2:4",
                "Frantar and Alistarh 2023",
                pruned(pattern="2:4"),
                (Phase("distillation", all_depths),),
                "2:4",
                rate=1e-4,
            ),
            "movement": Plan(
                "half of the weights by movement",
                "Sanh et al. 2020",
                lambda bench, seed: copy.deepcopy(bench.teacher),
                (Phase("distillation", lambda bench: recipes.movement()),),
                "movement",
                rate=1e-4,
            ),
            "untrained": Plan("half of the FFN pruned, no training", "this project", pruned(ffn=0.5), (), "pruned"),
        },
    ),
    "lowrank": Plan(
        "low rank", "Chen et al. 2021", low_rank, (Phase("distillation", all_depths),), "low rank", rate=1e-4
    ),
    "albert": Plan("ALBERT", "Lan et al. 2019", one_layer, (Phase("distillation", all_depths),), "ALBERT"),
    "subformer": Plan("Subformer", "Reid et al. 2021", subformer, (Phase("distillation", all_depths),), "Subformer"),
    "mobilebert": Plan(
        "MobileBERT",
        "Sun et al. 2020",
        lambda bench, seed: students.mobilebert(bench.teacher, inner=bench.table_width, seed=seed),
        (Phase("transfer", lambda bench: recipes.mobilebert(len(main_layers(bench.teacher)[1]))),),
        "MobileBERT",
        rate=1e-3,
        bert_only=True,
        ablations={
            "at once": Plan(
                "MobileBERT, all layers at once",
                "Sun et al. 2020",
                lambda bench, seed: students.mobilebert(bench.teacher, inner=bench.table_width, seed=seed),
                (
                    Phase(
                        "transfer",
                        lambda bench: recipes.mobilebert(len(main_layers(bench.teacher)[1]), at_once=True),
                    ),
                ),
                "MobileBERT",
                rate=1e-3,
            )
        },
    ),
    "layers": Plan("layers dropped, no training", "this project", shallow, (), SHALLOW),
    "small": Plan(
        "from scratch",
        "Turc et al. 2019",
        from_scratch,
        (Phase("distillation", lambda bench: recipes.logits(), keep_outputs=True),),
        "from scratch",
    ),
    "adabert": replace(
        cells("AdaBERT", searched_cell, "AdaBERT", "Chen et al. 2020"),
        ablations={
            "plain": cells("AdaBERT, three convolutions", plain_cell, "three convolutions"),
            **{
                f"random {draw}": cells(f"AdaBERT, random cell {draw}", random_cells(draw), f"random cell {draw}")
                for draw in range(1, 6)
            },
            "logits": Plan(
                "AdaBERT without probes",
                "ablation",
                searched_cell,
                (Phase("distillation", lambda bench: recipes.bilstm(), keep_outputs=True),),
                "AdaBERT",
                rate=2e-3,
                patience=5,
            ),
        },
    ),
    "bilstm": replace(
        sentence_student("BiLSTM", students.bilstm, "Tang et al. 2019"),
        ablations={
            "rows": sentence_student("BiLSTM without copies", students.bilstm, rows=task_rows),
            "likely": sentence_student("BiLSTM, copies of likely words", students.bilstm, rows=likely_rows),
            "trained": sentence_student("BiLSTM, word table trained", students.bilstm, table="trained"),
        },
    ),
    "cnn": replace(
        sentence_student("CNN", students.cnn, "Wasserblat et al. 2020"),
        ablations={"rows": sentence_student("CNN without copies", students.cnn, rows=task_rows)},
    ),
}
