"""The transformers Trainer that teaches a student.

Losses are means over all predicted tokens of a step. Windows are full and never padded, so every micro-batch of every
process has the same number of tokens, and the mean of their means is the mean over the step.
"""

import functools
import os
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PrinterCallback, Trainer, TrainingArguments

from rrtc.console import note
from rrtc.errors import RrtcError
from rrtc.io.source import load_model, with_all_tensors
from rrtc.io.weights import disk_error
from rrtc.machine import device, process_group
from rrtc.model.graft_rrt import Slot
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.stock.architecture import quiet_warnings
from rrtc.stock.linear import linear_maps, match_gains
from rrtc.uptrain.checkpoints import WHOLE, mark_whole, remove, whole_checkpoints
from rrtc.uptrain.curve import steps_of, summary
from rrtc.uptrain.data import Stream, given
from rrtc.uptrain.exits import TOKENS_PER_INPUT, add_exits, exits_of, fit_exits
from rrtc.uptrain.job import Job
from rrtc.uptrain.optimizer import make_optimizer
from rrtc.uptrain.rate import lost_by
from rrtc.uptrain.sharding import save_whole, shard, whole_state
from rrtc.uptrain.stability import PROFILED, Variances, add_gains, match, profile
from rrtc.uptrain.student import Student
from rrtc.uptrain.teacher import LiveTeacher
from rrtc.uptrain.teacher_cache import CachedTeacher

CRITIC = "critic.pt"  # in a checkpoint, what learns along with the model and is no part of it
KEPT = 2  # checkpoints, beside the one that is written
# What `accelerate launch` tells every Trainer by the environment, and the value that says nothing.
LAUNCHER_SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_USE_DEEPSPEED": "false",
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_MEGATRON_LM": "false",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "false",
}


class DistillationTrainer(Trainer):
    """A Trainer for one job. It logs every step: objective (the weighted sum), loss (of the next token), kl and other
    losses in use, learning_rate, grad_norm, tokens (so far) and seconds (that the step took). What goes wrong on the
    way is for guards.py."""

    def __init__(self, job: Job, steps: int, output: Path, save: bool, callbacks: list):
        """steps: how many to take; where they are fewer than the job's, they still go through all phases of its
        objective. save: whether to write checkpoints into `output`."""
        self.job = job
        model = with_all_tensors(Student, job.folder, dtype=torch.float32, use_safetensors=True)
        if job.branches:
            add_gains(model, job.plan)
        if job.recipe.regularizers.get("bmi"):
            model.add_critic(job.recipe.seed)
        if job.recipe.fits_exits:
            add_exits(model, job.plan)
        if job.recipe.freezes:
            model.requires_grad_(False)
        for maps in linear_maps(model) if job.recipe.transfers else ():
            maps.requires_grad_(True)
        for exit_ in exits_of(model).values():  # which, where they are not trained, have no gradient
            exit_.requires_grad_(job.recipe.exits != "none")
        model.generation_config = GenerationConfig()  # a base model's own can be one that transformers will not save
        if job.recipe.activation_checkpointing:
            # The second is the name in older versions of transformers. Both are non-reentrant by default, which shared
            # layers need where several processes train.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        if job.recipe.compile:
            # Layer by layer: all visits of a kind share one compiled graph, whichever slot they belong to. A whole slot
            # would need one for each of its loops.
            for layer in (layer for module in model.modules() if isinstance(module, Slot) for layer in module.loops):
                layer.compile()
        super().__init__(
            model=model,
            args=arguments(job, steps, output, save),
            train_dataset=Stream(job.text, steps * job.recipe.batch_size),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # rrtc has a display of its own
        self.model_accepts_loss_kwargs = False  # compute_loss returns the mean of a micro-batch
        self.teacher = None if job.cache is None else CachedTeacher(job.cache)
        if job.teacher:
            dtype = torch.bfloat16 if job.bfloat16 else torch.float32
            matches = bool(job.recipe.losses.get("hidden"))
            self.teacher = LiveTeacher(job.teacher.folder, dtype, self.args.device, job.recipe.temperature, matches)
            job.teacher.files.check()
        self._means: dict[str, torch.Tensor] = {}  # of the losses since the last step, summed over micro-batches
        self._step_began: float | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective on inputs["input_ids"] (windows, context), a mean over their tokens but the first of each."""
        self._step_began = self._step_began or time.perf_counter()
        targets = inputs["input_ids"][:, 1:]
        others = given(inputs)  # without position_ids, they are counted from the start of the window
        ids = others.pop("input_ids")
        lesson = self.teacher(ids, **others) if self.teacher else None
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.job.bfloat16):
            progress = self.state.global_step / self.state.max_steps
            means = model(
                input_ids=ids, targets=targets, recipe=self.job.recipe, lesson=lesson, progress=progress, **others
            )
        objective = means.pop("objective")
        self._means = {name: self._means.get(name, 0) + mean.detach() for name, mean in means.items()}
        return objective

    def begin(self) -> tuple[list[list[Variances]], list[list[Tensor | None]]]:
        """Sets what is set before the first step: gains of `stability` and of linear attention, and the maps of exits.
        Returns the dense model's profile and the gains of `stability`, both empty without it. All processes do the
        same."""
        found = self._set_gains() if self.job.branches else ([], [])
        if self.job.recipe.transfers:
            self._match_gains()
        if self.job.fitted_exits:
            note("Fitting the maps of the exits")
            self._fit_exits()
        return found

    def _match_gains(self) -> None:
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.job.bfloat16):
            match_gains(self.model, self.profiled())

    def _set_gains(self) -> tuple[list[list[Variances]], list[list[Tensor | None]]]:
        dtype = torch.bfloat16 if self.job.bfloat16 else torch.float32
        if isinstance(self.teacher, LiveTeacher):
            dense = self.teacher.model
        else:
            dense = load_model(self.job.original.folder, dtype=dtype).to(self.args.device)
            self.job.original.files.check()
        ids, branches = self.profiled(), self.job.branches
        theirs = profile(dense, branches, ids)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.job.bfloat16):
            return theirs, match(self.model, self.job.plan, branches, theirs, ids)

    def _fit_exits(self) -> None:
        ids = self.profiled(TOKENS_PER_INPUT * self.job.plan.architecture.width)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.job.bfloat16):
            fit_exits(self.model, self.job.fitted_exits, ids)

    def profiled(self, tokens: int = PROFILED) -> Tensor:
        """The first windows of the run, (windows, context - 1), so many `tokens` or a little less."""
        windows = max(1, min(tokens // self.job.context, len(self.train_dataset)))
        return torch.stack([given(self.train_dataset[number])["input_ids"] for number in range(windows)])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a step; the Trainer's closing summary has none
            losses = self.accelerator.reduce(torch.stack(list(self._means.values())), "mean") / self.job.accumulation
            now = time.perf_counter()
            logs["objective"] = logs.pop("loss")
            logs |= dict(zip(self._means, losses.tolist(), strict=True))
            logs["tokens"] = self.state.global_step * self.job.tokens_per_step
            logs["seconds"] = now - self._step_began
            self._step_began = now
            self._means = {}
        super().log(logs, start_time)

    def _move_model_to_device(self, model, device: torch.device) -> None:
        if not self.job.recipe.fsdp:  # which moves it slot by slot
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The optimizer; with `fsdp`, the model is sharded first. A checkpoint's weights are in it by then."""
        if self.optimizer is not None:
            return self.optimizer
        if self.job.recipe.fsdp:
            where = self.args.device
            shard(self.model, where, self.job.bfloat16 and where.type != "cpu")  # autocast minds norms elsewhere
            # Accelerate is to take it as it is. On CPUs it quietly makes a model DDP instead; on accelerators it makes
            # the head a unit of its own, which loses its weights in the middle of the student's forward pass, where
            # the gradients of the head are worked out.
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        _, adamw = self.get_optimizer_cls_and_kwargs(self.args)
        trained = self.model if model is None else model
        self.optimizer = make_optimizer(trained, self.job.recipe, self.job.learning_rate, adamw)
        if self.job.recipe.fsdp:
            save_whole(self.optimizer)
        return self.optimizer

    def train(self, *args, **kwargs):
        try:
            with quiet_warnings():  # about a micro-batch changed on resume
                return super().train(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise RrtcError(
                "The accelerator has too little memory for this run.",
                "Lower micro_batch or context, or turn on activation_checkpointing.",
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        state_dict = whole_state(self.model) if self.job.recipe.fsdp else state_dict
        if self.model.critic_names and self.args.should_save:  # with `fsdp`, all processes are here
            state = self.model.state_dict() if state_dict is None else state_dict
            os.makedirs(output_dir, exist_ok=True)
            torch.save({name: state[name] for name in self.model.critic_names}, Path(output_dir) / CRITIC)
        super()._save(output_dir, state_dict)  # which takes the critic out of what it is given

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.model.critic_names:
            state = torch.load(Path(resume_from_checkpoint) / CRITIC, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state, strict=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.job.recipe.fsdp and not self.args.should_save:
            self.optimizer.state_dict()  # helps the first process, which writes it, to make it whole
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        """Whole weights and moments, whether they are sharded or not: any number of processes can go on from them, with
        `fsdp` or without."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (folder / WHOLE).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except torch.OutOfMemoryError:  # with `fsdp`, on making things whole
            raise
        except (SafetensorError, RuntimeError) as error:  # what safetensors and torch.save raise on a full disk
            raise disk_error(folder, error) from error
        process_group().wait_for_everyone()  # every process writes the state of its random numbers
        if self.args.should_save:
            self.job.complete(folder, self.measured())
            mark_whole(folder)
            for older in whole_checkpoints(folder.parent)[:-KEPT]:  # by their steps: the clock may have been set back
                remove(older)

    def measured(self) -> dict:
        """What this run has measured so far, for rrtc.yaml."""
        steps = steps_of(self.state.log_history)
        tokens, seconds = steps[-1]["tokens"], sum(step["seconds"] for step in steps)
        has_all = all(source.shard.complete for source in self.job.text.sources)
        return {
            "tokens": tokens,
            "steps": len(steps),
            "epochs": round(tokens / self.job.text.tokens, 3) if has_all else None,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1),
            "processes": process_group().num_processes,
            "learning_rate": self.job.learning_rate,
            "temperature": self.job.recipe.temperature,
            "exits": self.job.recipe.exits,
            "lost_before": lost_by(self.job.provenance),
            "text_sha256": {source.name: source.shard.text for source in self.job.text.sources if source.shard.text},
            "device": self.args.device.type,
            "arithmetic": self.job.arithmetic,
            "teacher": self.job.taught_by["uri"] if self.job.taught_by else None,
            **summary(steps),
        }


def arguments(job: Job, steps: int, output: Path, save: bool) -> TrainingArguments:
    recipe = job.recipe
    _forget_launcher_settings()
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.accumulation,
        train_sampling_strategy="sequential",  # the Stream is in order already
        remove_unused_columns=False,
        learning_rate=job.learning_rate,
        lr_scheduler_type=recipe.schedule,
        lr_scheduler_kwargs=_decay(recipe, steps),
        # Below 1 a share of the steps. The rate rises from 0, so that a run of one step would learn nothing.
        warmup_steps=recipe.warmup if steps > 1 else 0,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        save_strategy="steps" if save else "no",
        save_steps=recipe.save_every,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide that training has failed
        use_cpu=device().type == "cpu",  # or processes on CPUs would not see each other
        dataloader_pin_memory=device().type == "cuda",
        disable_tqdm=True,
        report_to="none",
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several accelerators are for torchrun, never for nn.DataParallel
    return arguments


def _forget_launcher_settings() -> None:
    """Keeps what `accelerate launch`, or its config file, says of arithmetic and sharding from this process: the recipe
    says that, and resuming and the teacher cache rely on it."""
    said = {name: os.environ.pop(name, nothing) for name, nothing in LAUNCHER_SETTINGS.items()}
    unheard = [name for name, value in said.items() if value.lower() != LAUNCHER_SETTINGS[name]]
    if unheard:
        note(f"Not used, because the recipe says it (precision, compile, micro_batch, fsdp): {', '.join(unheard)}")


def _decay(recipe: UptrainRecipe, steps: int) -> dict:
    """What a schedule wants to know beside its warmup. The fall is 1 - sqrt(progress), which Hägele et al.
    (arXiv 2405.18392) found better than a straight line."""
    if recipe.schedule == "cosine":
        return {}
    return {"num_decay_steps": int(recipe.decay * steps), "decay_type": "1-sqrt"}
