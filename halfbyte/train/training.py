"""What the loop does between its lines: the pieces of one run held together, and each thing that can happen to them.

The order within a step boundary is fixed: train, log, evaluate, save.  `Progress` says how far the run is; everything else is rebuilt
from the settings, so a resumed run and an uninterrupted one pass through the same states.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from halfbyte import devices, host
from halfbyte.config.run import RunConfig
from halfbyte.data.batches import Batch, Batches
from halfbyte.data.load import TrainData
from halfbyte.data.packing import Packed, pack
from halfbyte.data.tokenize import Example
from halfbyte.errors import CheckpointError, HalfbyteError, Interrupted, NumericError
from halfbyte.evaluate.classification import evaluate_classes
from halfbyte.evaluate.loss import EvalLoss, evaluate_loss
from halfbyte.models.assemble import Assembled
from halfbyte.models.heads import head_of
from halfbyte.models.recompute import use_policy
from halfbyte.models.token_loss import token_loss_sum
from halfbyte.optim import param_groups
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.schedules import share_at, warmup_steps
from halfbyte.plan.decide import Decision
from halfbyte.train import delivery, faults, header, numeric_check, resolve, samples
from halfbyte.train.bad_steps import BadSteps
from halfbyte.train.identity import identity_of, text_digest
from halfbyte.train.memory_recovery import MicroBatchSize
from halfbyte.train.metrics import MetricsFile, Observers
from halfbyte.train.run_folder import RunFolder
from halfbyte.train.saver import Saver
from halfbyte.train.signals import Stop, StopRequested, exit_code
from halfbyte.train.state import Progress, capture, capture_rng, restore, restore_rng
from halfbyte.train.step import StepResult, train_step
from halfbyte.units import seconds_text

T = TypeVar("T")
Items = Sequence[Example] | Sequence[Packed]


def items_of(config: RunConfig, data: TrainData) -> Items:
    """What the training batches are made of: the examples, or packed rows of them.  Held-out rows are never packed."""
    return pack(data.train, data.report.max_tokens) if config.data.packing else data.train


def resolved(config: RunConfig, assembled: Assembled, data: TrainData, items: Items) -> RunConfig:
    """`config` with every "auto" of training replaced; `items` are what the batches are made of."""
    return resolve.resolve(
        config, total_params=assembled.total_params, items=len(items), eval_items=len(data.eval),
        longest=max(len(item.input_ids) for item in [*items, *data.eval]), device=device_of(assembled),
    )


def device_of(assembled: Assembled) -> torch.device:
    """Where the trainable parameters are."""
    return next(parameter.device for parameter in assembled.model.parameters() if parameter.requires_grad)


class Training:
    """One run in progress; `config` must be resolved."""

    def __init__(
        self, config: RunConfig, assembled: Assembled, data: TrainData, items: Items, folder: RunFolder,
        saver: Saver, stop: Stop, audience: Observers, plan: Decision | None = None,
    ) -> None:
        self.config, self.assembled, self.data, self.folder, self.saver = config, assembled, data, folder, saver
        self.stop, self.audience, self.model, self.plan = stop, audience, assembled.model, plan
        self.began, self.seconds_before = time.monotonic(), 0.0
        devices.set_threads(int(config.train.threads))
        # rows of one length take the same blocks again; with rows of many lengths keeping them cost a third more memory and won no time;
        # the gradients of a whole model cost a third more as well
        keeps = assembled.model.device.type == "cpu" and config.data.packing and config.method != "full"
        self.freed = devices.FreedMemory() if keeps else None
        self.device = device_of(assembled)
        self.items = items
        self.batches = self._batches(
            items, int(config.train.micro_batch_size), config.train.global_batch_size, config.train.seed, config.data.workers
        )
        self.total_steps = resolve.total_steps(config, len(items))
        warmup_steps(config.optim, self.total_steps)  # refuses a warm-up longer than the run
        self.groups = param_groups.groups(self.model, config.optim, float(config.optim.learning_rate))
        self.optimizer = AdamW(
            self.groups, betas=config.optim.betas, eps=config.optim.eps, state=config.optim.state, paged=config.optim.paged
        )
        self.optimizer.allocate()
        self.head = head_of(self.model)
        self.progress = Progress(cursor=self.batches.state_dict())
        self.micro, self.eval_micro = MicroBatchSize(), MicroBatchSize()
        self.bad_steps = BadSteps(folder, config.train.on_nan)
        self.history: list[dict[str, Any]] = []
        self.gradients_checked = self.announced = False
        self.windows = self._windows()
        tokenizer = assembled.tokenizer
        self.identity = identity_of(
            config, base=assembled.source.digest, tokenizer=text_digest(tokenizer.backend_tokenizer.to_str()),
            template=text_digest(tokenizer.chat_template), data=data.digest,
        )
        self.metrics = MetricsFile(folder.metrics)

    def _batches(self, items: Items, micro: int, per_window: int, seed: int, workers: int) -> Batches:
        pad = self.assembled.tokenizer.pad_token_id or 0
        return Batches(items, micro_batch_size=micro, global_batch_size=per_window, seed=seed, pad_id=pad, workers=workers)

    # -- start ------------------------------------------------------------------------------------------------------------------

    def begin(self, resume: bool) -> None:
        """Restore the checkpoint when resuming, write the folder's first files, and say what is going to happen.

        A resume that is refused has written nothing.
        """
        torch.manual_seed(self.config.train.seed)
        use_policy(self.model, self.config.train.activations)
        self.model.train()
        if resume:
            self._go_on_from_checkpoint()
        else:
            self.folder.bad_batches.unlink(missing_ok=True)  # of an attempt that took no step
        self.folder.write_start(self.config, self.data.now)
        if self.plan is not None and not resume:
            self.folder.write_json(self.folder.plan, self.plan.as_dict())
        self.metrics.cut(self.progress.metrics_offset)
        self.history = self.metrics.records()
        self.seconds_before = sum(record.get("seconds", 0.0) for record in self.history)
        numeric_check.scan(self.model, {}, step=self.progress.step)
        self.announced = True
        self.audience.started(header.header_of(self))
        if self.progress.step == 0:
            samples.write_before(self)
        if resume:
            restore_rng(self.random_state)
        self.began = time.monotonic()

    def _go_on_from_checkpoint(self) -> None:
        loaded = self.saver.load_newest(self.identity)
        self.progress = restore(loaded.state, self.model, self.optimizer)
        self.random_state = capture_rng()
        self._rewind()

    def _rewind(self) -> None:
        """Make batches and micro-batch size agree with `progress`."""
        self.batches.load_state_dict(self.progress.cursor)
        self.windows = self._windows()
        self.micro.size = self.progress.micro_batch_size

    def _windows(self) -> Any:
        """Windows from the cursor on, epoch after epoch."""
        epoch = self.batches.state_dict()["epoch"]
        while True:
            yield from self.batches.epoch(epoch)
            epoch += 1

    # -- one step ---------------------------------------------------------------------------------------------------------------

    def goes_on(self) -> bool:
        """More steps to do, and early stopping has not struck."""
        return self.progress.step < self.total_steps and not self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """The held-out loss has not improved for as many evaluations as the settings allow."""
        patience = self.config.train.early_stop_patience
        return patience is not None and self.progress.evals_without_gain >= patience

    def one_step(self) -> None:
        """Train on the next window, or leave it out when a return to a checkpoint told so, and log it."""
        began = time.monotonic()
        window = [batch.to(self.device) for batch in next(self.windows)]
        step = self.progress.step + 1
        if step in self.progress.bad_steps:
            self._advance(step)
            self.progress.skipped_steps += 1
            self.note(f"step {step} is left out: its loss was not finite before")
            return
        rate = share_at(self.config.optim, step - self.progress.skipped_steps, self.total_steps)
        param_groups.set_rate(self.optimizer.param_groups, rate)
        random_state = capture_rng()
        try:
            result = self.micro.run(self._train_on, window, step=step, on_change=self.note)
        except StopRequested:
            restore_rng(random_state)
            raise
        if self.freed is not None:
            self.freed.bound()
        self.progress.micro_batch_size = self.micro.size
        faults.point("train.step_done")
        self._advance(step)
        self.progress.tokens_seen += result.trained_tokens if result.updated else 0
        self._log_step(result, rate, time.monotonic() - began)
        if result.trained_tokens == 0:
            self.note(f"step {step} has no trained token and changes nothing")
        elif not result.finite:
            self.bad_steps.handle(self, result, window, random_state)
        else:
            self.progress.bad_in_a_row = 0
            if step % numeric_check.SCAN_EVERY_STEPS == 0:
                self.bad_steps.scan(self)

    def _train_on(self, parts: list[Batch]) -> StepResult:
        return train_step(
            self.model, self.head, parts, self.optimizer, clip_norm=self.config.optim.clip_norm, poll=self.stop.poll,
            before_update=self._check_gradients,
        )

    def _check_gradients(self) -> None:
        """Once a process: every adapter is reached by the backward pass."""
        if not self.gradients_checked:
            numeric_check.require_gradients(self.model)
            self.gradients_checked = True

    def _advance(self, step: int) -> None:
        self.progress.step = step
        self.progress.cursor = self.batches.state_dict()
        if self.progress.cursor["step"] == 0:
            faults.point("train.epoch_end")

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Sum of the token losses of a batch."""
        return token_loss_sum(self.model, self.head, batch)[0]

    # -- telling ----------------------------------------------------------------------------------------------------------------

    def _log_step(self, result: StepResult, share: float, seconds: float) -> None:
        step = self.progress.step
        loss = None if result.trained_tokens == 0 else result.loss
        if step % self.config.train.log_every_steps and step != self.total_steps and result.finite:
            return
        record = {
            "step": step, "epoch": step / self.batches.steps_per_epoch, "loss": loss, "lr": float(self.config.optim.learning_rate) * share,
            "grad_norm": result.grad_norm, "clipped_norm": result.clipped_norm, "trained_tokens": result.trained_tokens,
            "tokens": result.tokens, "rows": result.rows, "seconds": seconds, "tokens_per_second": result.tokens / max(seconds, 1e-9),
            "memory_bytes": self.memory_bytes(),
        }
        self._write(record)
        self.audience.stepped(record)

    def memory_bytes(self) -> int:
        """Memory in use: the accelerator's where the model is on one, the process's otherwise."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else host.rss_bytes()

    def peak_memory_bytes(self) -> int:
        """The most of it so far."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else host.peak_rss_bytes()

    def seconds(self) -> float:
        """Time of the run: of this process since its first step, and of the steps and evaluations before a resume."""
        return self.seconds_before + time.monotonic() - self.began

    def _write(self, record: dict[str, Any]) -> None:
        self.metrics.write(record)
        self.history.append(record)
        self.progress.metrics_offset = self.metrics.offset

    def note(self, text: str) -> None:
        """Write a line of note into the metrics and show it."""
        self._write({"step": self.progress.step, "event": text})
        self.audience.noted(text)

    # -- between steps ----------------------------------------------------------------------------------------------------------

    def between_steps(self) -> None:
        """Evaluate and save where they are due; done again without harm when a run goes on from here."""
        improved = self._evaluate() if self._evaluation_is_due() else False
        if self._save_is_due(improved):
            self._save()

    def _evaluation_is_due(self) -> bool:
        every, step = self.config.train.eval_every_steps, self.progress.step
        if every is None or self.progress.evaluated_step == step or self._amid_bad_steps():
            return False  # what would be the best could not be saved
        return step % int(every) == 0 or step == self.total_steps

    def _amid_bad_steps(self) -> bool:
        """Nothing was learnt since the last sound step, and what there is may be why; the end of the run counts as the end of the row."""
        return self.progress.bad_in_a_row > 0 and self.progress.step < self.total_steps

    def _save_is_due(self, improved: bool) -> bool:
        every, step = self.config.train.save_every_steps, self.progress.step
        if self.saver.last_saved == step or self._amid_bad_steps():
            return False  # a return to a checkpoint must lead out of a row of bad steps, not into it
        if step == 0:
            return self.config.train.on_nan == "rollback"
        if improved and self.config.train.keep_best:
            return True
        return every is not None and (step % int(every) == 0 or step == self.total_steps or self.stopped_early)

    def evaluate(self) -> EvalLoss:
        """Held-out loss of the model as it is; looks for signals between batches."""
        return self._over_held_out(lambda parts: evaluate_loss(self.model, self.stop.watched(parts), head=self.head))

    def _over_held_out(self, judge: Callable[[list[Batch]], T]) -> T:
        """`judge` of the held-out batches, with smaller ones where memory runs out."""
        size = int(self.config.train.micro_batch_size)
        batches = self._batches(self.data.eval, size, size, seed=0, workers=0)
        window = [batch.to(self.device) for part in batches.epoch(0) for batch in part]
        return self.eval_micro.run(judge, window, step=self.progress.step, on_change=self.note)

    def _evaluate(self) -> bool:
        """Evaluate, log, and keep score; True when this is the best so far."""
        faults.point("train.before_eval")
        began = time.monotonic()
        found = self.evaluate()
        if found.loss - found.loss != 0.0:
            raise NumericError(
                "the held-out loss must be finite", code="E-NUM-303", place=f"step {self.progress.step}", found=str(found.loss),
                expected="a finite number", remedy="lower optim.learning_rate and resume from the last checkpoint",
            )
        state = self.progress
        # the untouched model is the mark to beat in the report, not something to deliver
        best = state.step > 0 and (state.best_metric is None or found.loss < state.best_metric)
        if best:
            state.best_metric, state.best_step, state.evals_without_gain = found.loss, state.step, 0
        elif state.step > 0:
            state.evals_without_gain += 1
        state.evaluated_step = state.step
        record = {
            "step": state.step, "eval_loss": found.loss, "eval_tokens": found.tokens, "best": best, "seconds": time.monotonic() - began,
        }
        if self.config.model.task != "sequence-classification":
            record |= {"perplexity": found.perplexity}
        else:
            record |= self._over_held_out(lambda parts: evaluate_classes(self.model, self.stop.watched(parts)))
        self._write(record)
        self.audience.evaluated(record)
        faults.point("train.after_eval")
        return best

    def _save(self) -> bool:
        faults.point("train.before_save")
        path = self.saver.save(capture(self.model, self.optimizer, self.progress, self.identity))
        faults.point("train.after_save")
        return path is not None

    # -- ends -------------------------------------------------------------------------------------------------------------------

    def roll_back(self, bad: list[int]) -> None:
        """Return to the newest checkpoint and remember which windows to leave out from there.  Raises CheckpointError without one."""
        counted = self.progress.rollbacks + 1
        left_out = sorted({*self.progress.bad_steps, *bad})
        self._go_on_from_checkpoint()
        self.progress.rollbacks, self.progress.bad_steps, self.progress.bad_in_a_row = counted, left_out, 0
        self.metrics.cut(self.progress.metrics_offset)
        self.history = self.metrics.records()
        self.note(f"back at step {self.progress.step}; steps {left_out} are left out (return {counted})")

    def leave(self, request: StopRequested) -> Interrupted:
        """Save at the last step boundary and say how to go on."""
        self.audience.noted(f"stopped by {request} at step {self.progress.step}")
        saved = self._save()
        self.say_end(delivery.write_summary(self, status="stopped"))
        kept = f"saved at step {self.progress.step}" if saved else f"not saved: the last checkpoint is of step {self.saver.last_saved}"
        took = f" in {seconds_text(self.saver.save_seconds)}" if saved and self.saver.save_seconds is not None else ""
        return Interrupted(
            f"the run was stopped by {request} and is {kept}{took}", code="E-STOP-301", exit_code=exit_code(request.number),
            place=str(self.folder.path), remedy=f"go on with: halfbyte train --resume --out {self.folder.path}",
        )

    def report_failure(self, error: HalfbyteError) -> None:
        """Leave a trace of an error in the folder; the error itself goes on to the caller.  A refused resume leaves all as it was."""
        if not isinstance(error, CheckpointError):
            self.say_end(delivery.write_summary(self, status="failed", error=str(error)))

    def say_end(self, summary: dict[str, Any]) -> None:
        """Tell the observers, once, how the run ended."""
        if self.announced:
            self.announced = False
            self.audience.finished(summary)

    def close(self) -> None:
        """On every way out: files closed, and observers told when nothing else told them."""
        self.metrics.close()
        if self.announced:
            self.say_end(delivery.summary_of(self, status="broken off"))

    def finish(self) -> dict[str, Any]:
        """Deliver the best or the last weights and the summary; the fields of `TrainResult`."""
        return delivery.deliver(self)
