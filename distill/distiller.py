"""`Distiller`: a `transformers.Trainer` whose loss is a recipe.

    >>> Distiller(
    ...     teacher=model,
    ...     student=qbert.quantize_model(model, 3),
    ...     recipe=recipes.qbert_kd(),
    ...     args=TrainingArguments("out", num_train_epochs=1),
    ...     train_dataset=rows,
    ...     processing_class=tokenizer,
    ... ).train()

Callbacks, ``resume_from_checkpoint``, ``report_to``, ``accelerate launch`` and gradient accumulation are the Trainer's.
The student is trained in place, with float32 weights whatever it came with (``bf16=True`` computes in bfloat16 all the
same); `save_student` and the student's own methods never see projections or the teacher.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils.generic import find_labels

from qbert.distill.aside import left_as_it_is, problem_type_kept, random_state_kept
from qbert.distill.checkpoint import (
    ORIGIN,
    TEACHER,
    WEIGHTS,
    check_origin,
    damage,
    finish_checkpoint,
    last_good_checkpoint,
    load_weights,
    origin,
    save_weights,
)
from qbert.distill.checks import (
    check_arguments,
    check_checkpointing,
    check_labels,
    check_pair,
    check_teacher_is_trained,
    check_tokenizers,
    first_rows,
    sample_batches,
    schedule_of,
)
from qbert.distill.losses import ITEMS
from qbert.distill.objective import EXPECTED_ITEMS, Distillation
from qbert.distill.outputs import TEACHER_LOGITS, CollateWithOutputs, TeacherOutputs
from qbert.distill.progress import (
    InterruptCallback,
    StageCallback,
    TermMeans,
    TermsProgress,
    save_curves,
    time_steps,
)
from qbert.distill.rates import factors_of, has_rates, scale_schedule, schedules, split_groups
from qbert.distill.recipe import Recipe, Timetable
from qbert.distill.step_sizes import (
    StepSizeCallback,
    begin_training,
    change_bits,
    end_training,
    hold_steps,
    quantized_matrices,
    renew_groups,
    stage_bits,
    step_groups,
)
from qbert.distill.zeros import KeepZeros, Movement
from qbert.encoders.inputs import forward_arguments
from qbert.encoders.modes import modes_kept
from qbert.encoders.precision import single_precision
from qbert.extras import require
from qbert.files import write_json


class Distiller(Trainer):
    """Trains a student to act like its teacher.

    Args:
        teacher: a fine-tuned model; run in evaluation mode, whatever mode it is in, and never changed.
        student: the model to train: quantized (`qbert.quantize_model`), smaller, or both. Weights in half precision,
            where most steps would be lost, become float32, and are saved so.
        recipe: what the loss is made of (`qbert.distill.recipes`).
        args: `TrainingArguments`; the recipe's own where None, in the folder ``distilled``.
        train_dataset: rows that the collator understands; labels are only needed by recipes that use them.
        processing_class: the tokenizer.
        teacher_processing_class: the teacher's tokenizer, to compare vocabularies; optional.
        teacher_outputs: the teacher's logits for the rows, computed before (`TeacherOutputs.of`), which stand for it in
            all stages that match nothing else; in others it runs.
        check_teacher: warn before the training if the teacher is at chance on the training labels.
        **kwargs: further arguments of `Trainer` (eval_dataset, data_collator, compute_metrics, callbacks, ...).

    Raises:
        ValueError: models that do not fit each other or share what is trained, a match that does not fit the models, a
            packed student, reentrant checkpointing, an argument of Trainer's that a distillation cannot heed,
            outputs of another teacher or of other rows.
        TypeError: a recipe of another type.
        MissingPackageError: accelerate is not installed.
    """

    # Each term is weighed so that its plain mean over the accumulated batches (and processes) is the mean over all
    # their items, so the sum must still be divided by their number. Trainer guesses the opposite from the **kwargs of
    # BERT's forward, and multiplies the loss instead.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        recipe: Recipe,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        *,
        processing_class: Any = None,
        teacher_processing_class: Any = None,
        teacher_outputs: TeacherOutputs | None = None,
        check_teacher: bool = True,
        **kwargs: Any,
    ) -> None:
        require("accelerate", "Distiller")
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipe: expected a Recipe such as recipes.qbert_kd(), got {type(recipe).__name__}")
        if train_dataset is None:
            raise ValueError("train_dataset is missing; give the rows to distill on")
        check_pair(teacher, student)
        if processing_class is not None and teacher_processing_class is not None:
            check_tokenizers(teacher_processing_class, processing_class)
        args = args if args is not None else TrainingArguments("distilled", **recipe.arguments)
        check_checkpointing(student, args)
        check_arguments(args, recipe, student, kwargs)
        if args.n_gpu > 1:
            warnings.warn(f"one of {args.n_gpu} GPUs is used; start with `accelerate launch` to use all", stacklevel=2)
            args._n_gpu = 1
        if isinstance(train_dataset, IterableDataset) and args.world_size > 1:
            args = _each_reads_its_share(args)
        if teacher_outputs is not None:
            teacher_outputs.check(teacher)
            if not any(stage.takes_kept_outputs and stage.uses_teacher for stage in recipe.stages):
                raise ValueError(
                    f"teacher_outputs: no stage of recipe {recipe.name!r} matches logits alone, so the teacher "
                    "must run; leave them out"
                )
            train_dataset = teacher_outputs.beside(train_dataset)
        self.recipe = recipe
        self.folder = Path(args.output_dir or "distilled")
        self.rows: Any = train_dataset
        self.teacher = teacher
        self.student = student
        self._columns = {*forward_arguments(student), *forward_arguments(teacher), "label", "label_ids", "labels"}
        collator: Any = kwargs.pop("data_collator", None)
        if collator is None:
            padding = processing_class is not None
            collator = DataCollatorWithPadding(processing_class) if padding else default_data_collator
        if teacher_outputs is not None:
            collator = CollateWithOutputs(collator)
            self._columns.add(TEACHER_LOGITS)
        with random_state_kept():
            set_seed(args.seed)  # projections are drawn at random
            example = collator(first_rows(train_dataset, 2, self._columns if args.remove_unused_columns else None))
            if any(stage.uses_labels for stage in recipe.stages):
                check_labels(student, [example], some=False)
            single_precision(student).to(args.device)
            self.distillation = Distillation(student, teacher, recipe, dict(example))
            super().__init__(
                model=self.distillation,
                args=args,
                data_collator=collator,
                train_dataset=train_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        self.label_names = find_labels(type(student)) if args.label_names is None else args.label_names
        self._signature_columns = sorted({*self._columns, *self.label_names})  # type: ignore[assignment]
        self._term_means = TermMeans()
        self._known_origin: dict[str, str] | None = None  # found once a training: it reads all of the teacher
        self._expected_items: Tensor | None = None
        self._ahead: list[Any] | None = None
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # sum of the losses of all labels, their number
        self._check_teacher = check_teacher
        self._own_optimizer = self.optimizer is None
        self._first_bits = {id(m.weight_quantizer): m.weight_quantizer.bits for m in quantized_matrices(student)}
        self._entered = -1
        self._interrupt = InterruptCallback()
        stages = StageCallback(recipe, self.enter_stage)
        self._movement = None if recipe.zeros is None else Movement(student, recipe.zeros)
        zeros = [] if self._movement is None else [self._movement]
        self._step_sizes = StepSizeCallback(student, recipe)
        for callback in (stages, self._step_sizes, *zeros, KeepZeros(student), self._interrupt):
            self.add_callback(callback)
        if not args.disable_tqdm:
            several = len(recipe.stages) > 1
            self.remove_callback(ProgressCallback)
            self.add_callback(TermsProgress(lambda: self.distillation.stage.name if several else ""))
        begin_training(student, recipe)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, from the start or from a checkpoint (True: the latest whole one in the output folder).

        A further call trains what the first one did, from the first stage on, with a new optimizer. Random numbers come
        from ``args.seed``; the state of the generators is afterwards as it was.

        Raises:
            FloatingPointError: a loss term or the gradient is not finite; names it, the step and the last checkpoint.
            KeyboardInterrupt: after Ctrl-C, when the checkpoint is written; names it.
            ValueError: nothing to resume from, or a checkpoint of another student, teacher or recipe.
        """
        if resume_from_checkpoint is True:
            found = last_good_checkpoint(self.folder)
            if found is None:
                raise ValueError(f"there is no whole checkpoint in {str(self.folder)!r} to resume from")
            resume_from_checkpoint = str(found)
        check_checkpointing(self.student, self.args)
        self._known_origin = None
        with random_state_kept(), modes_kept(self.teacher):
            collate = self._get_collator_with_removed_columns(self.data_collator)
            if any(stage.uses_labels for stage in self.recipe.stages):
                check_labels(self.student, sample_batches(self.rows, collate))
            if self._check_teacher and self.recipe.stages[0].uses_teacher:
                check_teacher_is_trained(self.teacher, sample_batches(self.rows, collate))
            if self._entered >= 0:
                self._begin_again()
            set_seed(self.args.seed)
            try:
                result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            finally:
                self._interrupt.restore()
                self._step_sizes.close()
                self.distillation.eval()
                end_training(self.student)
        if self.args.should_save:
            save_curves(self.state.log_history, self.folder)
        if self._interrupt.interrupted:
            raise KeyboardInterrupt(f"stopped at step {self.state.global_step}; {self._last_checkpoint()}")
        return result

    def enter_stage(self, index: int) -> None:
        """Go over to stage `index` of the recipe; nothing happens if it is the present one."""
        if index == self._entered:
            return
        stage = self.recipe.stages[index]
        if stage.teacher == "previous" and index > 0:
            self.distillation.set_teacher(copy.deepcopy(self.student))
        elif stage.teacher == "given":
            self.distillation.set_teacher(self.teacher)
        renewed = self._set_bits(index)
        hold_steps(self.student, self.recipe)
        if self.optimizer is not None:
            renew_groups(self.optimizer, self.lr_scheduler, renewed, self.recipe)
        self.distillation.stage_index = index
        self._entered = index

    def estimate(self, steps: int = 3) -> dict[str, float]:
        """Seconds a step on this machine, measured on the first batches; everything stays as it is.

        Returns:
            ``seconds_per_step``, ``steps`` of the whole training, ``seconds`` of the whole training.
        """
        args = self.args
        collate: Any = self._get_collator_with_removed_columns(self.data_collator)
        with (
            random_state_kept(),
            left_as_it_is(self.distillation),
            problem_type_kept(self.student),
            modes_kept(self.teacher),
        ):
            loader: Any = DataLoader(self.rows, args.train_batch_size, collate_fn=collate)
            batches = [self._prepare_inputs(batch) for batch in itertools.islice(loader, steps)]
            times = time_steps(self.distillation, batches, args.device)
        warm = times[1:] or times
        per_step = sum(warm) / len(warm) * args.gradient_accumulation_steps
        rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        total = args.max_steps if args.max_steps > 0 else args.num_train_epochs * -(-len(self.rows) // rows_a_step)
        return {"seconds_per_step": per_step, "steps": float(total), "seconds": per_step * total}

    def save_student(self, folder: str | os.PathLike[str]) -> None:
        """Write the student alone, as the student's own ``save_pretrained`` does, and the tokenizer."""
        cast(PreTrainedModel, self.student).save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    # ---- what Trainer calls ----

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The recipe's loss in training; the student's own loss in evaluation."""
        training = model.training
        if training and self._ahead is not None:  # the first micro-batch of a step, in its stage
            self._look_ahead(self._ahead)
            self._ahead = None
        if training and self._expected_items is not None:
            inputs = {**inputs, EXPECTED_ITEMS: self._expected_items}
        outputs = model(**inputs)
        loss = outputs["loss"]
        if training:
            self._note_terms(outputs["terms"], loss)
        else:
            self._note_evaluation(inputs, loss)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of a step; what their losses are means over is counted, in all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._expected_items = None
        if batches and all(isinstance(batch, Mapping) for batch in batches):
            counts = torch.stack([self.distillation.count_items(batch).to(device) for batch in batches]).sum(0)
            processes = self.args.world_size
            whole = self.accelerator.reduce(counts, "sum") if processes > 1 else counts
            self._expected_items = whole / (len(batches) * processes)
        self._ahead = batches if len(batches) * self.args.world_size > 1 else []
        return batches, items

    def _look_ahead(self, batches: list[Any]) -> None:
        def mean(value: Tensor) -> Tensor:
            return self.accelerator.reduce(value, "mean") if self.args.world_size > 1 else value  # type: ignore[no-any-return]

        with random_state_kept(), self.compute_loss_context_manager():
            prepared = [self._prepare_inputs(batch) for batch in batches]
            self.distillation.look_ahead(prepared, self._expected_items, mean)  # type: ignore[arg-type]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, with the loss as the mean over all labels: batches may hold unequal numbers of them."""
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, **kwargs)
        total = self._evaluated
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total.float().to(self.args.device), "sum").cpu()
        metrics = output.metrics or {}
        name = next((name for name in metrics if name.endswith("_loss")), None)
        if name is not None and total[1] > 0:
            metrics[name] = float(total[0] / total[1])
        return output

    def _note_evaluation(self, inputs: dict[str, Any], loss: Tensor) -> None:
        labels = float(self.distillation.count_items(inputs)[ITEMS.index("labels")])
        if labels:
            self._evaluated += torch.tensor([float(loss) * labels, labels], dtype=torch.float64)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a group of its own for each matrix's step sizes: their rate is relative to their size."""
        if self.optimizer is not None:
            return self.optimizer
        # What is held now may be trained later, and what is trainable when the model is wrapped is what can be trained.
        begin_training(self.student, self.recipe)
        groups = step_groups(self.student, self.recipe)
        for group in groups:
            group["params"][0].requires_grad_(False)  # so that the Trainer's own groups leave them out
        optimizer = super().create_optimizer(model)
        if has_rates(self.recipe):
            split_groups(optimizer, factors_of(self.student, self.recipe))
        for group in groups:
            group["params"][0].requires_grad_(True)
            optimizer.add_param_group(group)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The recipe's schedule; another ``lr_scheduler_type`` than linear holds for recipes of one stage only.

        Raises:
            ValueError: a schedule that is no function of the step, with a stage that has rates of its own.
        """
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        optimizer = optimizer or self.optimizer
        assert optimizer is not None  # the Trainer makes it first
        table = Timetable(self.recipe, num_training_steps, self.args.get_warmup_steps(num_training_steps))
        for stage in table.missing:
            warnings.warn(
                f"stage {stage.name!r} of recipe {self.recipe.name!r} has no step among {num_training_steps} and is "
                "left out; train for longer",
                stacklevel=2,
            )
        factors = factors_of(self.student, self.recipe) if has_rates(self.recipe) else {}
        if schedule_of(self.args) != "linear":
            scheduler = super().create_scheduler(num_training_steps, optimizer)
            scale_schedule(scheduler, optimizer, self.recipe.stages[0], factors)
            return scheduler
        self.lr_scheduler = LambdaLR(optimizer, schedules(optimizer, table, factors))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss term since the last log."""
        if "loss" in logs:
            means = self._term_means.pop()
            if self.args.world_size > 1:
                whole = torch.tensor(list(means.values()), device=self.args.device)
                means = dict(zip(means, self.accelerator.reduce(whole, "mean").tolist(), strict=True))
            logs = logs | {f"loss_{name}": mean for name, mean in means.items()}
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        # With a gradient scaler (fp16) overflow is part of the method, and the step is skipped.
        if norm is not None and getattr(self.accelerator, "scaler", None) is None and not bool(torch.isfinite(norm)):
            raise FloatingPointError(self._diverged("the gradient", float(norm)))
        return norm

    def _note_terms(self, terms: Tensor, loss: Tensor) -> None:
        names = [match.term for match in self.distillation.stage.matches]
        broken = self._term_means.add(names, terms, loss)
        if broken is not None:
            raise FloatingPointError(self._diverged(*broken))

    def _diverged(self, what: str, value: float) -> str:
        rate = f"lower learning_rate ({self.args.learning_rate:g}) or check the data"
        return f"{what} became {value} at step {self.state.global_step + 1}; {rate}; {self._last_checkpoint()}"

    def _last_checkpoint(self) -> str:
        found = last_good_checkpoint(self.folder)
        return f"the last good checkpoint is {found}" if found else "there is no checkpoint yet"

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.folder)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.distillation, folder / WEIGHTS)
        if self.distillation.teacher is not self.teacher:
            save_weights(self.distillation.teacher, folder / TEACHER)
        if isinstance(self.student, PreTrainedModel):  # so that the folder also loads as the student alone
            self.save_student(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
                write_json(folder / ORIGIN, self._origin())
                if self._movement is not None:
                    self._movement.save(folder)
                finish_checkpoint(folder, alone=self.args.world_size == 1)
        except (OSError, RuntimeError, SafetensorError) as error:
            broken = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            shutil.rmtree(broken, ignore_errors=True)
            raise OSError(
                f"checkpoint {broken} could not be written ({error}); make room and resume; {self._last_checkpoint()}"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        broken = damage(folder)
        if broken is not None:
            raise ValueError(f"checkpoint file {broken} cannot be read or is damaged; resume from an earlier one")
        check_origin(folder, self._origin())
        table, last = self._stage_of(folder)
        for index in range(last + 1):
            if self.recipe.stages[index] not in table.missing:
                self.enter_stage(index)
        if (folder / TEACHER).is_file():
            load_weights(self.distillation.teacher, folder / TEACHER)
        load_weights(self.distillation, folder / WEIGHTS)
        if self._movement is not None:
            self._movement.take_up(folder)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            folder = Path(self.state.best_model_checkpoint)
            _, stage = self._stage_of(folder)
            self._set_bits(stage)
            load_weights(self.distillation, folder / WEIGHTS)

    # ---- helpers ----

    def _origin(self) -> dict[str, str]:
        if self._known_origin is None:
            self._known_origin = origin(self.teacher, self.recipe)
        return self._known_origin

    def _stage_of(self, checkpoint: Path) -> tuple[Timetable, int]:
        """(when each stage begins, the stage that a checkpoint was saved in)."""
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{checkpoint} is no checkpoint of a training ({error}); name another one") from error
        table = Timetable(self.recipe, state["max_steps"])
        # The weights were saved at the end of the step before, in that step's stage.
        return table, table.stage_at(max(state["global_step"] - 1, 0))

    def _set_bits(self, stage: int) -> list[nn.Parameter]:
        """Give the student's matrices the bits of a stage; the scales of the grids that are new."""
        bits = stage_bits(self.recipe, stage)
        return change_bits(self.student, {key: bits or first for key, first in self._first_bits.items()})

    def _begin_again(self) -> None:
        self._entered = -1
        self.distillation.stage_index = 0
        self.distillation.heads.forget()
        self.distillation.set_teacher(self.teacher)
        change_bits(self.student, self._first_bits)
        begin_training(self.student, self.recipe)
        if self._own_optimizer:
            self.optimizer = None
        self.model_wrapped = self.distillation  # the wrapper of the first training knows other parameters


def _each_reads_its_share(args: TrainingArguments) -> TrainingArguments:
    """The same arguments for rows that are only read in turn, by several processes."""
    args = copy.copy(args)
    args.accelerator_config = copy.copy(args.accelerator_config)
    # The default has one process read for all and cut each batch up, for which all would have to be of one length.
    args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
    return args
