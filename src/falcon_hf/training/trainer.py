"""``FalconTrainer``: a ``transformers.Trainer`` whose step is CSGD, and whose evaluation is what a drafter is worth."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput

from ..runtime.candidate_generator import config_tree
from ..runtime.modeling_falcon_drafter import FalconDrafter
from ..runtime.target import input_embeddings
from .acceptance import simulated_shape
from .arguments import FalconTrainingArguments, check_rollout
from .batches import DialogueDataset, LengthGroupedOrder, PairBatch, collate, make_pairs
from .csgd import (
    choose_glanced,
    draw_block_offsets,
    feature_noise,
    glance_count,
    glance_lambda,
    hamming_distance,
    replace_coupled,
)
from .evaluation import EvaluationPlan, Tally, evaluate_batch
from .features import compute_features
from .fewer_shapes import filled, makes_code_by_shape, widened
from .resuming import AsIfWhole, EndedError
from .row_draws import RowDraws
from .step_losses import StepLosses
from .training_head import training_dtype, training_head
from .training_notes import TrainingNotes

logger = logging.getLogger(__name__)


class FalconTrainer(Trainer):
    """Trains a drafter for a target by CSGD (paper, section 3.3), with whatever ``Trainer`` brings.

    Features come with the batches (see [`DialogueDataset`]) or, where they do not, from the target. The target is never
    changed and never saved.

    Args:
        model: the drafter, or a peft model around it.
        args: a [`FalconTrainingArguments`].
        target: gives embeddings, head and, on the fly, features.
        train_dataset, eval_dataset: [`DialogueDataset`] or anything with the same items.
        **kwargs: as for ``Trainer``.
    """

    args: FalconTrainingArguments
    control: Any

    def __init__(
        self,
        model: FalconDrafter | nn.Module,
        args: FalconTrainingArguments,
        target: PreTrainedModel,
        train_dataset: Dataset[Any] | None = None,
        eval_dataset: Dataset[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        drafter: Any = model  # a peft model hands its drafter's attributes on
        check_rollout(args, drafter.config)
        if args.n_gpu > 1:  # DataParallel splits batches by rows, which flat indices of positions do not survive
            logger.warning("Training on one of %d GPUs; torchrun --nproc-per-node N uses more.", args.n_gpu)
            args._n_gpu = 1
        kwargs.setdefault("data_collator", collate)
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.loss_is_scaled_for_ga = False  # a mean over the batch: Trainer divides by the accumulation steps
        self._config: Any = drafter.config
        if hasattr(self._config, "use_cache"):
            del self._config.use_cache  # Trainer's; our config has no such field, and would not load with it
        self._block_size: int = drafter.config.block_size
        self._target = target.requires_grad_(False).eval()
        device = args.device
        self._target_is_placed = getattr(target, "hf_device_map", None) is not None  # accelerate's, where it has put it
        if not self._target_is_placed:
            target.get_input_embeddings().to(device)
        self._dtype = training_dtype(drafter, args)
        self._fewer_shapes = makes_code_by_shape(device, self._dtype)
        self._head = training_head(drafter, target, args)
        places = torch.arange(drafter.config.vocab_size)
        if drafter.draft_vocab_ids is not None:
            places = torch.full((drafter.config.vocab_size,), -1)
            places[drafter.draft_vocab_ids.cpu()] = torch.arange(len(drafter.draft_vocab_ids))
        self._draft_places = places.to(device)
        self._micro = (-1, -1)  # optimizer step and micro-batch of the last batch
        self._notes = TrainingNotes(device)
        self._losses = StepLosses(args, self._head, self._notes, self._over_processes)
        self._as_if_whole = AsIfWhole(self._notes)
        self.add_callback(self._as_if_whole)

    # Data

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        data = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(data, DialogueDataset):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        order = LengthGroupedOrder(data.data.lengths, args.rows_a_step, seed)
        self._as_if_whole.order = order
        return order

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return input_embeddings(self._target, tokens).to(self.args.device, self._dtype)

    def _pairs(self, inputs: dict[str, torch.Tensor]) -> PairBatch:
        if self._fewer_shapes:
            inputs = widened(inputs)
        if "features" not in inputs:
            if not self._target_is_placed:  # its embeddings are there, so that target.device does not tell
                target: Any = self._target
                target.to(self.args.device)
                self._target_is_placed = True
            mask = torch.arange(inputs["input_ids"].shape[1], device=self.args.device) < inputs["lengths"][:, None]
            features = compute_features(self._target, inputs["input_ids"], mask.long(), self._config.feature_layers)
            inputs = {**inputs, "features": features}
        return make_pairs(inputs, self._block_size, self._config.hidden_size)

    def _computed(self, wanted: torch.Tensor) -> torch.Tensor:
        """Flat indices of the columns to compute estimates of, where those of ``[R, S]`` bool are ``wanted``."""
        return (filled(wanted) if self._fewer_shapes else wanted).flatten().nonzero()[:, 0]

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; a training that had ended is as its checkpoint, without another step."""
        try:
            return super().train(*args, **kwargs)
        except EndedError:
            self.is_in_train = False
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            return TrainOutput(self.state.global_step, 0.0, {})

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """One CSGD step's loss: first pass, glancing, second pass, and passes over own features where asked for."""
        args, k = self.args, self._block_size
        pairs = self._pairs(inputs)
        progress = self.state.global_step / max(1, self.state.max_steps)
        places = self._places(pairs.tokens.shape[0])
        order, rolled = self._rolled_first(places, progress)
        if rolled:
            pairs, places = pairs.rows(order), [places[row] for row in order]
        draws = RowDraws(args.seed, self.state.global_step, places, args.device)
        offsets = draw_block_offsets(draws.uniform("offset"), k)
        features = pairs.features.to(self._dtype)
        noise = None
        if args.noise > 0:
            noise = feature_noise(draws.uniform("noise", *features.shape[1:]), args.noise).to(self._dtype)
            noise = noise * pairs.paired[..., None]
        embeddings = self._embed(pairs.tokens) * pairs.paired[..., None]
        replaced = self._glance(model, pairs, features, noise, embeddings, offsets, draws, places, progress)
        seen, tokens = features, embeddings
        if replaced is not None:
            seen = replace_coupled(features, replaced, k)
            tokens = replace_coupled(embeddings, replaced, k)
        if noise is not None:
            seen = seen + noise
        kept = pairs.learned if replaced is None or args.glance_loss == "all" else pairs.learned & ~replaced
        outputs, wanted, corrected = self._forward(
            model, pairs, seen, tokens, embeddings, offsets, kept, replaced, rolled
        )
        later = (torch.arange(pairs.tokens.shape[1], device=offsets.device)[None] + offsets[:, None]) % k > 0
        loss = self._losses.of(outputs, wanted, pairs, corrected, later)
        return (loss, outputs) if return_outputs else loss

    def _places(self, rows: int) -> list[int]:
        """Each row's place in the global batch, of all processes and accumulated batches: what its draws hang on."""
        step, micro = self._micro
        micro = micro + 1 if step == self.state.global_step else 0
        self._micro = self.state.global_step, micro
        args = self.args
        first = (micro * max(1, args.world_size) + args.process_index) * args.train_batch_size
        return list(range(first, first + rows))

    def _rows_together(self, rows: int) -> int:
        """Rows of all processes in a batch of which this process has ``rows``."""
        processes = max(1, self.args.world_size)
        return rows if processes == 1 else self.args.train_batch_size * processes  # where all batches are full

    def _rolled_first(self, places: list[int], progress: float) -> tuple[list[int], int]:
        """The rows in an order that begins with those that go on to further passes, and how many those are.

        They are spread evenly over the global batch, whatever process they are on; one of it at least.
        """
        args, together = self.args, self._rows_together(len(places))
        if args.rollout_passes < 2 or progress < args.rollout_start or args.rollout_share <= 0:
            return list(range(len(places))), 0
        share = max(args.rollout_share, 1 / together)
        chosen = [int((place % together + 1) * share + 1e-9) > int(place % together * share + 1e-9) for place in places]
        return sorted(range(len(places)), key=lambda row: not chosen[row]), sum(chosen)

    def _glance(
        self,
        model: nn.Module,
        pairs: PairBatch,
        features: torch.Tensor,
        noise: torch.Tensor | None,
        embeddings: torch.Tensor,
        offsets: torch.Tensor,
        draws: RowDraws,
        places: list[int],
        progress: float,
    ) -> torch.Tensor | None:
        """``[B, S]`` bool, the columns to replace, by the Hamming distance of a first pass; None without glancing."""
        args, k = self.args, self._block_size
        weight = glance_lambda(progress, args.glance_lambda)
        if weight <= 0:
            return None
        rows, columns = pairs.tokens.shape
        share = max(1, round(1 / args.first_pass_share))
        # At least one row of the global batch in every step: without, there is no error rate.
        stride = min(share, self._rows_together(rows))
        asked = [row for row, place in enumerate(places) if (place + self.state.global_step) % stride == 0]
        counts = bool(asked)
        asked = asked or [0]  # not counted; DDP wants a forward of every process
        learned = pairs.learned
        row = torch.tensor(asked, device=learned.device)
        index = self._computed(learned[row])
        seen = features[row] if noise is None else features[row] + noise[row]
        with torch.no_grad():
            estimates = model(
                features=seen,
                embeddings=embeddings[row],
                block_offset=offsets[row],
                pair_mask=pairs.real[row],
                select=index,
            )
            drafted = torch.full((len(asked) * columns,), -2, dtype=torch.long, device=learned.device)
            drafted.index_copy_(0, index, self._head.likeliest(estimates, args.vocabulary_chunk))
        said = self._draft_places[pairs.answers[row]]
        distance = torch.zeros(rows, device=learned.device)
        distance[row] = hamming_distance(drafted.view(len(asked), -1), said, learned[row]).float()
        if share > 1:  # by the share, as processes must agree on whether they add up
            sums = torch.stack([distance.sum(), learned[row].sum().float()])
            sums = self._over_processes(sums if counts else torch.zeros_like(sums))
            estimated = learned.sum(-1) * (sums[0] / sums[1].clamp_min(1))
            measured = torch.zeros(rows, dtype=torch.bool, device=learned.device)
            measured[row] = counts
            distance = torch.where(measured, distance, estimated)
        longest = args.glance_longest_run or max(1, k - 1)
        uniform = draws.uniform("glance", columns // k + 2, 3)
        replaced = choose_glanced(glance_count(distance, weight), learned, offsets, k, uniform, longest)
        positions = learned.sum().clamp_min(1)
        self._notes.add(glanced=replaced.sum() / positions, first_pass_error=distance.sum() / positions)
        return replaced

    def _forward(
        self,
        model: nn.Module,
        pairs: PairBatch,
        features: torch.Tensor,
        embeddings: torch.Tensor,
        true_embeddings: torch.Tensor,
        offsets: torch.Tensor,
        kept: torch.Tensor,
        replaced: torch.Tensor | None,
        rolled: int,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]:
        """Run all passes.

        Returns:
            For each pass, the estimates ``[M_p, H]`` that have a loss; for each pass, their flat columns; and pass 1's
            estimates corrected for the token before them, if the drafter has a correction.
        """
        k = self._block_size
        inputs: dict[str, Any] = {"features": features, "embeddings": embeddings}
        inputs |= {"block_offset": offsets, "pair_mask": pairs.real}
        # Further passes read the estimates of all columns, but learn only where those came from true pairs.
        computed = kept.clone()
        computed[:rolled] = True
        masks, selects = [kept], [self._computed(computed)]
        valid = pairs.learned[:rolled] if replaced is None else (pairs.learned & ~replaced)[:rolled]
        for _ in range(self.args.rollout_passes - 1 if rolled else 0):
            read = torch.zeros_like(valid)
            read[:, k:] = valid[:, :-k]
            valid = pairs.learned[:rolled] & read
            masks.append(valid)
            selects.append(self._computed(valid))
        corrects = self._config.correction_rank is not None
        if corrects:
            before = pairs.before.flatten().index_select(0, selects[0])
            inputs["previous_embeddings"] = self._embed(before[None])[0]
        if rolled:
            inputs |= {"rollout_embeddings": true_embeddings[:rolled], "rollout_selects": selects[1:]}
        outputs = model(**inputs, select=selects[0])
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        # Where among the computed columns those with a loss are, as indices: a mask would be searched at each use.
        asked = [
            mask.flatten().index_select(0, select).nonzero()[:, 0] for mask, select in zip(masks, selects, strict=True)
        ]
        corrected = outputs.pop().index_select(0, asked[0]) if corrects else None
        estimates = [output.index_select(0, own) for output, own in zip(outputs, asked, strict=True)]
        wanted = [select.index_select(0, own) for select, own in zip(selects, asked, strict=True)]
        return estimates, wanted, corrected

    def _over_processes(self, sums: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(sums, "sum") if self.args.world_size > 1 else sums

    # Reports

    @property
    def positions_seen(self) -> int:
        """Positions with a loss that this process has seen, those before a resume included."""
        return self._notes.positions_seen

    @property
    def seconds(self) -> float:
        """That the training has taken, before a resume included, up to the checkpoint it went on from."""
        return self._notes.seconds

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As ``Trainer``; the checkpoint also has what a resume adds to."""
        self.state.log_history.append({"step": self.state.global_step, **self._notes.so_far()})
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``Trainer.log``; training logs also have the means of what the steps since the last one noted."""
        if "loss" in logs:
            logs = {**logs, **self._notes.take()}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Losses, top-1/3/10 of every block position and pass, and the simulated acceptance length (``tau``).

        The text's own tokens are the answers. ``tau`` counts accepted drafts a round, ``tau_with_bonus`` all tokens.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, one in dataset.items():
                metrics |= self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        args, plan = self.args, self._plan()
        started = time.perf_counter()
        whole = self.is_fsdp_enabled or self.is_deepspeed_enabled
        model = self.model_wrapped if whole else self.model
        if not whole:
            model = model.to(args.device)  # evaluate() may be the first call
        model.eval()
        tally = Tally(plan, args.device)
        for inputs in self._eval_batches(dataset, whole):
            pairs = self._pairs(self._prepare_inputs(inputs))
            paired = pairs.paired[..., None]

            def embed(tokens: torch.Tensor, paired: torch.Tensor = paired) -> torch.Tensor:
                return self._embed(tokens) * paired

            with self.accelerator.autocast():
                evaluate_batch(model, pairs, pairs.features.to(self._dtype), embed, plan, tally, args.smooth_l1_beta)
        tally.values = self._over_processes(tally.values)
        self._notes.leave_out(time.perf_counter() - started)
        weight = args.vocabulary_weight
        metrics = tally.metrics(
            metric_key_prefix, (args.feature_weight, weight * args.kl_weight, weight * args.ce_weight)
        )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def _eval_batches(self, dataset: Any, padded: bool) -> Any:
        """Batches of each dialogue once, shared out among the processes.

        accelerate fills the last batches up with dialogues that were counted already: ``padded`` keeps to that, where a
        forward waits for the other processes'.
        """
        data = self.eval_dataset if dataset is None else dataset
        if padded or self.args.world_size == 1:
            return self.get_eval_dataloader(dataset)
        mine = Subset(data, range(self.args.process_index, len(data), self.args.world_size))
        return DataLoader(mine, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)

    def _plan(self) -> EvaluationPlan:
        drafter: Any = self.accelerator.unwrap_model(self.model)
        shape, k = simulated_shape(config_tree(drafter.config), self._block_size), self._block_size
        passes = -(-shape.depth // k)
        if self._config.fusion == "lstm":
            passes = 1  # a rollout would have to carry states; the tree is cut at depth k
        correct = None if drafter.correction is None else drafter.correct
        return EvaluationPlan(shape, k, passes, self._head, self._draft_places, correct)
