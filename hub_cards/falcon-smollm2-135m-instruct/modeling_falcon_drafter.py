"""The Falcon drafter: a semi-autoregressive (SAR) head over the target's last hidden states (arXiv 2412.12639).

Letters. Tokens t_i, features f_i (the target's last hidden state at position i, after the final norm), block size k,
hidden size H. *Pair* i is (f_i, embedding of t_{i+1}), and the drafter's output at pair i is the estimate of f_{i+k}:

    x_i   = Fusion(f_i, e(t_{i+1}))                      two LSTM layers, or one matrix; 2H -> H
    y     = x + Attention(Norm(x))                       relaxed causal mask: i sees j iff block(j) <= block(i)
    f^_{i+k} = y_i + MLP(Norm(y_i))                      head(f^_{i+k}) is the draft law of token t_{i+k+1}

So one pass over the last k pairs gives k new features and k token laws. Every sequence starts with k - 1 *start
pairs* of zeros, so that even a one-token prompt fills a block; column c of a pair sequence is therefore pair
c - (k - 1), sits at rotary position c, and estimates f_{c+1}.

With one layer, the keys and values of a pair do not depend on the mask, so cached pairs stay valid whatever block
they were queried in. With more layers they are an approximation from the second layer on: quality, never correctness.

Embedding and LM head are the target's; they are arguments here, never modules, so they are never saved.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .block_mixing import BlockMixing
from .configuration_falcon_drafter import FalconDrafterConfig
from .correction import FalconCorrection
from .decoder_layer import FalconDecoderLayer
from .drafter_cache import DrafterCache
from .few_rows import few_row_linear
from .fusion import FalconFusion
from .repo_files import check_stamp, code_stamp, write_repo_files
from .repo_upload import UPLOAD_OPTIONS, upload_repo
from .rollout import RolloutKeys, own_pairs, relaxed_causal_mask, rollout_mask
from .routing import install
from .speculation_switch import SpeculationSwitch
from .statistics import GenerationStatistics
from .tree import DraftTree
from .validation import validate


class FalconDrafter(PreTrainedModel):
    """The drafter: fusion and relaxed causal decoder layers. Give it to ``target.generate(assistant_model=drafter)``.

    Attributes:
        draft_vocab_ids: buffer ``[draft_vocab_size]``, ascending ids of the reduced draft vocabulary, or None.
        last_generation: statistics of the last finished call of ``generate()`` with this drafter, None before it.
        on_round: called after each round with its tree and the visited nodes of each row, root first; None for nothing.
        switches: what ``auto_off`` has learned, by target, number of rows, and kind of tree and device.
    """

    config_class = FalconDrafterConfig
    config: FalconDrafterConfig
    base_model_prefix = "drafter"
    main_input_name = "features"
    _auto_class = "AutoModel"
    supports_gradient_checkpointing = False
    _no_split_modules = ["FalconDecoderLayer"]
    _supports_sdpa = True

    draft_vocab_ids: torch.Tensor | None
    last_generation: GenerationStatistics | None = None
    on_round: Callable[[DraftTree, list[list[int]]], None] | None = None

    def __init__(self, config: FalconDrafterConfig) -> None:
        super().__init__(config)
        layers = config.feature_layers
        self.feature_fusion = (
            None if layers is None else nn.Linear(len(layers) * config.hidden_size, config.hidden_size, bias=False)
        )
        if layers is not None:
            # Inner states have channels a hundred times the others' size: each is brought to mean 0 and deviation 1.
            earlier = (len(layers) - 1) * config.hidden_size
            self.register_buffer("feature_mean", torch.zeros(earlier))
            self.register_buffer("feature_scale", torch.ones(earlier))
        self.switches: dict[tuple[int, int, str], SpeculationSwitch] = {}
        self.fusion = FalconFusion(config)
        self.mixing = BlockMixing(config.block_size, config.hidden_size) if config.block_mixing else None
        self.correction = None if config.correction_rank is None else FalconCorrection(config)
        self.layers = nn.ModuleList(FalconDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.rotary = LlamaRotaryEmbedding(config)
        ids = None if config.draft_vocab_size is None else torch.arange(config.draft_vocab_size)
        self.register_buffer("draft_vocab_ids", ids)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but only from safetensors, and broken weights are an error, not a warning.

        Raises:
            ValueError: naming the weights that are missing, have another shape or are not finite.

        Warns:
            CodeStampWarning: if the code in the repo is not the code it was saved with.
        """
        kwargs["use_safetensors"] = True  # never a pickle
        drafter, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
        if wrong:
            raise ValueError(
                f"The drafter's weights are incomplete: {', '.join(sorted(wrong)[:3])} ({len(wrong)} in all)."
            )
        for name, weight in drafter.state_dict().items():
            whole = weight.device.type != "meta" and weight.dtype.itemsize > 1  # 8-bit formats have no isfinite
            if whole and not weight.isfinite().all():
                raise ValueError(f"The drafter's weights are damaged: {name} has values that are not finite.")
        check_stamp(drafter.config, str(args[0] if args else kwargs.get("pretrained_model_name_or_path")))
        return (drafter, info) if output_loading_info else drafter

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As in transformers, and with all that a repo needs to be used without ``falcon_hf`` (``repo_files.py``).

        Args:
            save_directory: the folder; a README.md in it is kept.
            is_main_process: whether this process writes code, config and card.
            push_to_hub: upload the folder afterwards, to ``repo_id`` (see [`push_to_hub`]), by default its name.
            **kwargs: for transformers' ``save_pretrained``; with ``push_to_hub`` also those of [`push_to_hub`].
        """
        upload = {name: kwargs.pop(name) for name in UPLOAD_OPTIONS if name in kwargs}
        self.config.code_stamp = code_stamp()
        # There is no older format to go back to, and going back would give a loaded drafter's shards another order.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_repo_files(self.config, Path(save_directory))
            if push_to_hub:
                upload_repo(Path(save_directory), upload.pop("repo_id", Path(save_directory).name), **upload)

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "50GB", **options: Any) -> str:
        """Save the drafter and upload it as the Hub repo ``repo_id``; a README.md there is kept.

        Args:
            repo_id: ``organisation/name``, made if absent.
            max_shard_size: as in ``save_pretrained``.
            **options: see ``repo_upload.upload_repo``.

        Returns:
            The commit's address.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return upload_repo(Path(folder), repo_id, keep_card=True, **options)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FalconCorrection):
            nn.init.zeros_(module.up)
        if isinstance(module, BlockMixing):
            module.reset(0.5 * self.config.hidden_size**-0.5)
        if isinstance(module, nn.LSTM):
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    nn.init.normal_(parameter, std=self.config.hidden_size**-0.5)
                else:
                    nn.init.zeros_(parameter)

    def start_pairs(self, pairs: torch.Tensor) -> torch.Tensor:
        """Put the k - 1 start pairs of zeros before ``[B, S, H]`` features or embeddings: ``[B, S + k - 1, H]``."""
        return F.pad(pairs, (0, 0, self.config.block_size - 1, 0))

    def decode(
        self,
        fused: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        queries: int | None = None,
        cache: DrafterCache | RolloutKeys | None = None,
        select: torch.Tensor | None = None,
        place: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the decoder layers over fused pairs.

        Args:
            fused: ``[B, S, H]``.
            positions: ``[B, S]``, rotary position (column) of each pair.
            mask: ``[B, 1, S, T]`` bool, True where visible; T counts the cached columns and these S.
            queries: how many of the last columns want an output; all by default.
            cache: written at its end; its length is left as it was, so advance it to keep the columns.
            select: ``[M]``, flat indices into ``[B * queries]``: the only outputs wanted (training: the others have
                no loss). All by default.
            place: ``[B, S]``, position of each column in its block; by default blocks end at the last column.

        Returns:
            ``[B, queries, H]``, the estimates f^; ``[M, H]`` with ``select``.
        """
        rotary = self.rotary(fused, positions)
        queries = fused.shape[1] if queries is None else queries
        last = len(self.layers) - 1
        # Blocks end at the last column unless ``place`` says otherwise, so k queries of one layer need no more columns.
        short = place is None and last == 0 and queries % self.config.block_size == 0
        start = None if self.mixing is None else self.mixing(fused[:, -queries:] if short else fused, place)
        for index, layer in enumerate(self.layers):
            # Only the last layer can leave columns out: the others' outputs are the next one's keys.
            wanted = queries if index == last else fused.shape[1]
            fused = layer(
                fused,
                start=start if index == 0 else None,
                queries=wanted,
                select=select if index == last else None,
                rotary=rotary,
                mask=mask[:, :, -wanted:],
                layer=index,
                cache=cache,
            )
        return fused

    def forward(
        self,
        features: torch.Tensor,
        embeddings: torch.Tensor,
        block_offset: torch.Tensor,
        pair_mask: torch.Tensor | None = None,
        select: torch.Tensor | None = None,
        rollout_embeddings: torch.Tensor | None = None,
        rollout_selects: list[torch.Tensor] | None = None,
        previous_embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """The training forward: a whole pair sequence at once, and further passes over the drafter's own features.

        Pass p > 1 does, for every block at once, what a draft's p-th pass does at inference: its pairs are the
        estimates that pass p - 1 made in the block before, with the text's own tokens (see ``rollout.py``).

        Args:
            features: ``[B, S, H]``, column c holds f_{c-k+1}; start pairs included (see [`start_pairs`]).
            embeddings: ``[B, S, H]``, column c holds the embedding of t_{c-k+2}.
            block_offset: ``[B]`` in [0, k), each row's block alignment (see [`relaxed_causal_mask`]).
            pair_mask: ``[B, S]`` bool, False for padding; all True by default.
            select: ``[M]`` flat indices into ``[B * S]``, the only outputs wanted of pass 1; all by default.
            rollout_embeddings: ``[R, S, H]``, R <= B: the first R rows go on to further passes, with these embeddings.
                ``select`` must hold all columns of those rows.
            rollout_selects: one ``[M_p]`` for each further pass, flat indices into ``[R * S]`` of its wanted outputs.
            previous_embeddings: of pass 1's shape, the embedding of t_{c+1}, the token chosen before column c's.

        Returns:
            ``[B, S, H]``, or ``[M, H]`` with ``select``; column c is the estimate of f_{c+1}. With
            ``rollout_embeddings`` or ``previous_embeddings`` a list: that, ``[M_p, H]`` of each further pass, and last
            pass 1's estimates corrected for ``previous_embeddings``.

        Raises:
            ValueError: for a rollout of a recurrent fusion, whose states it would have to carry from pass to pass.
        """
        columns = features.shape[1]
        fused, _ = self.fusion(self.combine(features), embeddings)
        mask = relaxed_causal_mask(columns, self.config.block_size, block_offset)
        if pair_mask is not None:
            # A padded column sees itself, so that no softmax row is empty.
            mask = mask & (pair_mask[:, None, None] | torch.eye(columns, dtype=torch.bool, device=mask.device))
        positions = torch.arange(columns, device=features.device)[None].expand(features.shape[0], -1)
        place = (positions + block_offset[:, None]) % self.config.block_size
        if rollout_embeddings is None:
            first = self.decode(fused, positions, mask, select=select, place=place)
            return first if previous_embeddings is None else [first, self.correct(first, previous_embeddings)]
        if self.fusion.is_recurrent:
            raise ValueError("A rollout needs a fusion without recurrence: 'linear' or 'lstm_stateless'.")
        rows = rollout_embeddings.shape[0]
        keys = RolloutKeys(len(self.layers))
        outputs = [self.decode(fused, positions, mask, select=select, cache=keys, place=place)]
        keys.keep_rows(rows)
        own = outputs[0]
        if select is not None:
            flat = own.new_zeros(fused.shape[0] * columns, own.shape[-1]).index_copy(0, select, own)
            own = flat.view(fused.shape[0], columns, -1)
        own, place = own[:rows], place[:rows]
        selects = rollout_selects or []
        for index, wanted in enumerate(selects):
            fused, _ = self.fusion(own_pairs(own, self.config.block_size).to(fused.dtype), rollout_embeddings)
            mask = rollout_mask(
                columns,
                self.config.block_size,
                block_offset[:rows],
                index + 2,
                None if pair_mask is None else pair_mask[:rows],
            )
            if index == len(selects) - 1:  # nobody reads the other columns
                outputs.append(self.decode(fused, positions[:rows], mask, select=wanted, cache=keys, place=place))
                break
            own = self.decode(fused, positions[:rows], mask, cache=keys, place=place)
            outputs.append(own.flatten(0, 1).index_select(0, wanted))
        if previous_embeddings is not None:
            outputs.append(self.correct(outputs[0], previous_embeddings))
        return outputs

    def correct(self, estimates: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Estimates ``[..., H]`` corrected for the token chosen before theirs, given by its embedding ``[..., H]``.

        Raises:
            ValueError: as [`required_correction`].
        """
        return self.required_correction()(estimates, embeddings)

    def required_correction(self) -> FalconCorrection:
        """The correction.

        Raises:
            ValueError: if the drafter has none (``config.correction_rank``).
        """
        if self.correction is None:
            raise ValueError("This drafter has no correction; make it with correction_rank.")
        return self.correction

    def combine(self, features: torch.Tensor) -> torch.Tensor:
        """``[B, S, W]`` features as the target gives them -> ``[B, S, H]`` as the fusion takes them.

        W is H, or H times the number of ``config.feature_layers``, whose states lie side by side.
        """
        if self.feature_fusion is None:
            return features
        earlier, last = features.split((self.feature_mean.shape[0], self.config.hidden_size), dim=-1)
        earlier = (earlier - self.feature_mean) * self.feature_scale
        return self.feature_fusion(torch.cat((earlier.to(last.dtype), last), dim=-1))

    @torch.no_grad()
    def standardise(self, sample: torch.Tensor) -> None:
        """Note mean and deviation of the channels of a sample ``[n, W]`` of features, the last layer's apart."""
        earlier = sample[:, : self.feature_mean.shape[0]].float()
        self.feature_mean.copy_(earlier.mean(0))
        self.feature_scale.copy_(1 / earlier.std(0).clamp_min(1e-6))

    def logits(self, features: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` features -> ``[..., draft vocabulary]`` through the target's head rows (see [`draft_head`])."""
        return self.scale_logits(few_row_linear(features, head))

    def scale_logits(self, products: torch.Tensor) -> torch.Tensor:
        """Products with the head's rows -> logits, scaled and capped as the target's."""
        scale = self.config.logit_scale
        logits = products if scale == 1 else products * scale  # by 1 it would be a copy for nothing
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def draft_head(self, head_weight: torch.Tensor) -> torch.Tensor:
        """Rows of the target's LM head ``[V, H]`` that the drafter drafts over: ``[draft vocabulary, H]``."""
        return head_weight if self.draft_vocab_ids is None else head_weight[self.draft_vocab_ids.to(head_weight.device)]

    def _falcon_validate(self, target: PreTrainedModel, *args: Any) -> Any:
        """What the routing calls first: refuse what cannot work (see [`validate`])."""
        return validate(target, self, *args)

    def _falcon_decode(self, target: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """What the routing calls instead of stock assisted decoding (see ``generation.decode``)."""
        from .generation import decode  # imports this module

        return decode(target, self, *args, **kwargs)


# Loading a drafter is all a user does, from a Hub repo too, so this is where the routing is installed.
install()
