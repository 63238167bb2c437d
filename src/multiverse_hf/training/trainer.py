"""TRL's SFTTrainer with a curriculum, and with the loss by kind of token."""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from multiverse_hf.data.curriculum import CurriculumSampler
from multiverse_hf.data.rows import IGNORE, TokenKind
from multiverse_hf.training.merging import write_adapter_card


class Packs(Dataset):
    """A dataset that is read by tuples of indices, the rows packed into one."""

    def __init__(self, rows: Any, sampler: CurriculumSampler) -> None:
        self.rows, self.sampler = rows, sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __getitem__(self, indices: tuple[int, ...]) -> list[dict[str, Any]]:
        return [self.rows[index] for index in indices]

    def set_epoch(self, epoch: int) -> None:
        """Set the sampler's epoch: accelerate does not find the sampler when several processes skip batches."""
        self.sampler.set_epoch(epoch)


class TokenCount(TrainerCallback):
    """Continues the count of tokens in a resumed run; TRL would restart at 0."""

    def __init__(self, trainer: SFTTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the count to the last logged one."""
        self.trainer._total_train_tokens = max((entry.get("num_tokens", 0) for entry in state.log_history), default=0)


@contextmanager
def without_checkpoint_wrappers(model: torch.nn.Module) -> Iterator[None]:
    """Remove FSDP's activation-checkpointing wrappers in this context, so that modules have their own names."""
    wrappers = [(name, module) for name, module in model.named_modules() if isinstance(module, CheckpointWrapper)]
    for name, wrapper in wrappers:
        model.set_submodule(name, wrapper._checkpoint_wrapped_module)
    try:
        yield
    finally:
        for name, wrapper in wrappers:
            model.set_submodule(name, wrapper)


class MultiverseSFTTrainer(SFTTrainer):
    """SFTTrainer over rows of :func:`~multiverse_hf.data.building.build_rows`.

    The loss is TRL's own, computed in chunks from the last hidden states. For each kind of token, ``loss_<kind>`` in
    nats and ``accuracy_<kind>`` are logged too. In training, ``parallel_share`` is the share of the epoch's rows in
    parallel form.

    Args:
        args: the arguments. Rows stay whole and keep all columns in any case.
        sampler: yields the rows of an epoch.
        **kwargs: as for SFTTrainer; ``data_collator`` is a
            :class:`~multiverse_hf.data.collation.DocumentCollator`.
    """

    def __init__(self, *, args: SFTConfig, sampler: CurriculumSampler, **kwargs: Any) -> None:
        self.sampler = sampler
        args.remove_unused_columns = False  # the collator needs `plain` and `kinds`
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        args.max_length = None  # rows have their final length; truncation would cut blocks
        # by mode and kind: sums of losses and of right predictions, and number of tokens
        self._kind_sums: dict[str, dict[TokenKind, list[float]]] = {"train": {}, "eval": {}}
        super().__init__(args=args, **kwargs)
        self.add_callback(TokenCount(self))
        if isinstance(self.model, PeftModel):
            # PEFT would save the whole enlarged embeddings: gigabytes. The trained rows are part of the adapter, and
            # `multiverse merge` enlarges the base in the same way.
            self.model.save_pretrained = functools.partial(self.model.save_pretrained, save_embedding_layers=False)
            self.model.create_or_update_model_card = functools.partial(write_adapter_card, model=self.model)
        head = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        if not hasattr(head, "bias"):
            # PEFT's TrainableTokensWrapper around an output layer; TRL's fused loss reads every head's bias.
            head.bias = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``save_pretrained`` writes the model's card, and keeps an existing one."""

    def get_train_dataloader(self) -> DataLoader:
        return self._get_dataloader(
            dataset=Packs(self.train_dataset, self.sampler),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda _: self.sampler,
            is_training=True,
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        kinds = inputs.pop("kinds", None)
        outputs: list[Any] = []
        # TRL does not return the values of tokens
        handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            handle.remove()
        if kinds is not None and outputs:
            self._count_kinds(kinds, inputs["labels"], outputs[0])
        return result

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:
            # FSDP2 gathers a tied output layer as a separate tensor, which would be stored beside the embeddings.
            tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", None) or {}
            copies = {name for name, source in tied.items() if name != source and source in state_dict}
            state_dict = {name: weight for name, weight in state_dict.items() if name not in copies}
        with without_checkpoint_wrappers(self.model):  # PEFT finds its weights by the names of modules
            super()._save(output_dir, state_dict)

    @torch.no_grad()
    def _count_kinds(self, kinds: torch.Tensor, labels: torch.Tensor, output: Any) -> None:
        """Add losses and right predictions by kind of token, over all processes."""
        mode = "train" if self.model.training else "eval"
        learnt = labels[:, 1:] != IGNORE
        loader = self.accelerator.gradient_state
        if mode == "eval" and loader.end_of_dataloader and loader.remainder > 0:
            # Rows that fill up the last batches were counted already.
            learnt[max(0, loader.remainder - self.accelerator.process_index * len(labels)) :] = False
        kind = kinds[:, 1:][learnt].long()
        sums = output.log_probs.new_zeros(3, len(TokenKind), dtype=torch.float32)
        sums[0].index_add_(0, kind, -output.log_probs[learnt].float())
        sums[1].index_add_(0, kind, output.is_top1[learnt].float())
        sums[2].index_add_(0, kind, torch.ones_like(kind, dtype=torch.float32))
        losses, right, counts = self.accelerator.reduce(sums, "sum").tolist()
        for each in TokenKind:
            if count := counts[each]:
                self._kind_sums[mode].setdefault(each, [0.0, 0.0, 0.0])
                for place, value in enumerate((losses[each], right[each], count)):
                    self._kind_sums[mode][each][place] += value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        for kind, (loss, right, count) in sorted(self._kind_sums[mode].items()):
            self._metrics[mode][f"loss_{kind.name.lower()}"] = [loss / count]
            self._metrics[mode][f"accuracy_{kind.name.lower()}"] = [right / count]
        self._kind_sums[mode].clear()
        if mode == "train" and "loss" in logs:
            epoch = max(0, math.ceil(self.state.epoch or 0) - 1)
            logs["parallel_share"] = self.sampler.parallel_share(epoch)
        super().log(logs, start_time)
