"""What keeps a run from losing what it has paid for: callbacks of the Trainer that look at every step.

- LossGuard stops a run whose loss is lost, and keeps the last checkpoint from before that.
- Termination finishes the step when SIGTERM, SIGHUP or Ctrl-C comes, and leaves with a checkpoint.
- Course writes metrics.jsonl and loss.png while the run goes on.
"""

import math
import os
import signal
import threading
import time
from collections import deque
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from rrtc.console import note
from rrtc.errors import RrtcError
from rrtc.io.source import load_tokenizer
from rrtc.machine import is_first_process, process_group
from rrtc.uptrain.checkpoints import remove, step_number, whole_checkpoints
from rrtc.uptrain.curve import draw, line, step_of, steps_of, write_metrics
from rrtc.uptrain.job import Job
from rrtc.uptrain.student import EXIT_LOSSES

# The loss has diverged where the mean objective of the last WINDOW steps is more than both of these. Twenty steps are
# more than an odd batch or the bump at the end of a warm-up. The first step is the model as it was given: who is far
# above it has lost more than training ever brought. Two nats are more than small batches differ by, and count where
# losses are small (a KL near 0 can grow tenfold and mean nothing); the factor counts where they are large.
WINDOW = 20
ABOVE_FIRST = 2.0  # nats per token above the first step, for each unit of the losses' weights
TIMES_BEST = 1.5  # times the lowest mean of any WINDOW steps
NAMED = 4  # windows of a batch that an error names
SHOWN = 40  # characters of the text that an error shows
DRAWN_EVERY = 10  # seconds between two pictures, at least


class Stopped(RrtcError):
    """The run stopped, and the sentence and the hint say what is kept of it."""

    of_all_processes = says_what_is_kept = True


class Terminated(Stopped):
    """The run was asked to stop, by a signal. The exit code is what a shell and a scheduler see of a process that the
    signal ended."""

    def __init__(self, number: int, step: int, steps: int):
        """number: of the signal; step: the last one of `steps` that was taken."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"{name} stopped the run after step {step} of {steps}; --resume goes on from there.")
        self.exit_code = 128 + number


class LossGuard(TrainerCallback):
    """Stops a run whose loss becomes NaN or infinite, or diverges. What it trained since then is never resumed from.

    The objective of a step measures the weights that the steps before it made, so that a checkpoint is known to be
    sound when the step after it was. While a step is not, no checkpoint takes the place of an older one, and in the end
    those that are not known to be sound are removed.
    """

    def __init__(self, job: Job):
        self.job = job
        weights = EXIT_LOSSES if job.recipe.exits == "frozen" else job.recipe.losses
        self.margin = ABOVE_FIRST * sum(weights.values())
        self.last: deque[float] = deque(maxlen=WINDOW)
        self.first = self.best = math.inf  # of the first step, and the lowest mean of WINDOW steps
        self.sound = 0  # the last step whose objective was as it should be

    @property
    def limit(self) -> float:
        """The objective above which a step is not sound."""
        return max(self.first + self.margin, TIMES_BEST * self.best)

    def on_train_begin(self, args, state, control, **kwargs):
        for step in steps_of(state.log_history):  # of a run that goes on
            self._take(step["step"], step["objective"])

    def on_log(self, args, state, control, logs=None, train_dataloader=None, **kwargs):
        if "objective" not in logs:
            return
        step, objective = state.global_step, logs["objective"]
        for name, value in (("loss", objective), ("norm of the gradients", logs["grad_norm"])):
            if not math.isfinite(value):
                hint = "Lower the learning rate, or train in float32 (precision), under another name"
                raise self._failed(args, f"The {name} became {value} at step {step}", hint, step, train_dataloader)
        mean = self._take(step, objective)
        if mean > self.limit:
            first_bad = min(self.sound + 1, step)
            sentence = (
                f"The loss has diverged: the objective was {self.first:.3g} at step 1, its mean over the last {WINDOW} "
                f"steps is {mean:.3g} at step {step}, and it is above {self.limit:.3g} since step {first_bad}"
            )
            hint = "Lower the learning rate, under another name"
            raise self._failed(args, sentence, hint, first_bad, train_dataloader)
        if self.sound < step and not control.should_training_stop:
            control.should_save = False

    def _take(self, step: int, objective: float) -> float:
        """Takes note of a step, and returns the mean of the last WINDOW ones (-inf as long as there are fewer)."""
        self.last.append(objective)
        if step == 1:
            self.first = self.best = objective
        if objective <= self.limit:
            self.sound = step
        if len(self.last) < WINDOW:
            return -math.inf
        mean = sum(self.last) / WINDOW
        self.best = min(self.best, mean)
        return mean

    def _failed(self, args, sentence: str, hint: str, step: int, train_dataloader) -> Stopped:
        checkpoints = whole_checkpoints(Path(args.output_dir))
        kept = [c for c in checkpoints if step_number(c) < self.sound]
        if is_first_process:
            for checkpoint in checkpoints[len(kept) :]:
                remove(checkpoint)
        what = "there was no good checkpoint to keep yet"
        if kept:
            what = f"the last good checkpoint can be trained on: rrtc uptrain {kept[-1]} -o NEW"
        return Stopped(f"{sentence}, on {self._batch(step, train_dataloader.dataset)}.", f"{hint}; {what}.")

    def _batch(self, step: int, stream) -> str:
        """The batch of a step, in words: its windows, and how the first of them begins."""
        size = self.job.recipe.batch_size
        items = range((step - 1) * size, step * size)
        names = ", ".join(stream.name(i) for i in items[:NAMED])
        more = f" and {size - NAMED} more" if size > NAMED else ""
        ids = stream[items[0]]["input_ids"][:SHOWN]
        text = " ".join(load_tokenizer(self.job.folder).decode(ids, skip_special_tokens=True).split())[:SHOWN]
        return f"{names}{more}, the first of which begins '{text}'"


class Termination(TrainerCallback):
    """A context manager, in which SIGTERM, SIGHUP or the first Ctrl-C lets the running step be finished and a
    checkpoint be written, and then ends the training; `check` says so. A second Ctrl-C ends it at once. The previous
    handlers come back at the end, and a signal that is ignored stays so.

    A launcher sends a signal to all processes, but not at one moment: they agree after each step. Python drops a
    KeyboardInterrupt that comes up while it runs a destructor or a weak reference's callback: it comes again after the
    step.
    """

    def __init__(self):
        self.asked_by = 0  # the number of the signal
        self.interrupted = False
        self.stopped_after: int | None = None  # the step
        self.previous: dict[int, object] = {}  # the handlers by signal

    def __enter__(self) -> "Termination":
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _ask(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            if self.asked_by == signal.SIGINT:
                self.interrupted = True
                raise KeyboardInterrupt
            note("Ctrl-C: the step is finished and saved first. Press it again to stop at once.")
        self.asked_by = number

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            raise KeyboardInterrupt
        if process_group().num_processes > 1:
            anywhere = torch.tensor(self.asked_by, device=args.device)
            torch.distributed.all_reduce(anywhere, op=torch.distributed.ReduceOp.MAX)
            self.asked_by = int(anywhere)
        if self.asked_by:
            self.stopped_after = state.global_step
            control.should_save = control.should_training_stop = True

    def check(self, steps: int) -> None:
        """Raises Terminated, when all processes are there, where a signal ended the training of `steps` steps."""
        if self.stopped_after is not None:
            process_group().wait_for_everyone()  # the first process may still be marking the checkpoint as whole
            raise Terminated(self.asked_by, self.stopped_after, steps)


class Course(TrainerCallback):
    """Writes metrics.jsonl into `folder` while the run goes on, a line a step, and loss.png at the checkpoints, as long
    as that takes little of the time: a picture takes as long as many steps of a small model."""

    def __init__(self, folder: Path, title: str):
        self.folder, self.title, self.draw_again = folder, title, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if is_first_process:  # a continued run has the steps up to its checkpoint, and will take the others again
            write_metrics(steps_of(state.log_history), self.folder / "metrics.jsonl")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if is_first_process and "objective" in logs:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf8") as file:
                file.write(line(step_of(state.log_history[-1])))

    def on_save(self, args, state, control, **kwargs):
        if is_first_process and time.monotonic() >= self.draw_again:
            draw(steps_of(state.log_history), self.title, self.folder / "loss.png")
            self.draw_again = time.monotonic() + DRAWN_EVERY


def reporters(name: str, folder: Path) -> list[TrainerCallback]:
    """transformers' callback for the tracker `name`; none for "none". TensorBoard writes into `folder`, which unlike
    the Trainer's own folder stays, or where TENSORBOARD_LOGGING_DIR says. When training begins, RrtcError is raised for
    a tracker that does not start."""
    if name == "none":
        return []
    (kind,) = get_reporting_integration_callbacks([name])

    class Reporter(kind):
        def on_train_begin(self, *args, **kwargs):
            try:
                return super().on_train_begin(*args, **kwargs)
            except Exception as error:  # not logged in, no network: each tracker has its own kinds
                reason = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
                raise RrtcError(f"{name} did not start: {reason}.", "Mend that, or leave out report_to.") from error

    reporter = Reporter()
    if name == "tensorboard" and not os.environ.get("TENSORBOARD_LOGGING_DIR"):
        reporter.logging_dir = str(folder / "tensorboard")
    return [reporter]
