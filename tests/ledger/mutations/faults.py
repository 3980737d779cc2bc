"""The faults: edits of installed frameworks on the path that runs, and of users' own loops."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.ledger.mutations.edits import Edit

FAMILIES = (
    "dropped",
    "doubled",
    "stale",
    "mis-scaled",
    "mis-reduced",
    "mis-clipped",
    "mis-weighted",
    "mis-masked",
    "mis-shifted",
)


@dataclass(frozen=True)
class Fault:
    """name: what goes wrong. run: the healthy run that it is an edit of. frozen: written after the ledger's thresholds
    were settled. why_not: where the ledger does not find it, the reason."""

    name: str
    family: str
    run: str
    edits: tuple[Edit, ...]
    frozen: bool = False
    why_not: str = ""

    @property
    def in_framework(self) -> bool:
        return not self.edits[0].module.startswith("tests.")


TRAINER = "transformers.trainer"
LOSS = "transformers.loss.loss_utils"
SMOOTHER = "transformers.trainer_pt_utils"
LLAMA = "transformers.models.llama.modeling_llama"
COLLATOR = "transformers.data.data_collator"
ACCELERATOR = "accelerate.accelerator"
ACCELERATED = "accelerate.optimizer"
LOADER = "accelerate.data_loader"
CLIP = "torch.nn.utils.clip_grad"
OPTIMIZER = "torch.optim.optimizer"
CHECKPOINT = "torch.utils.checkpoint"
MODULE = "torch.nn.modules.module"
SCALER = "torch.amp.grad_scaler"
DDP = "torch.nn.parallel.distributed"
HOOKS = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks"
COLLECTIVES = "torch.distributed.fsdp._fully_shard._fsdp_collectives"
SHARDED = "torch.distributed.fsdp._fully_shard._fsdp_param"
SHARDED_GROUP = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
ENGINE = "deepspeed.runtime.engine"
ZERO_2 = "deepspeed.runtime.zero.stage_1_and_2"
ZERO_3 = "deepspeed.runtime.zero.stage3"
_LOOPS = "tests.ledger.mutations.loops."
PLAIN, BUFFERS, SEVERAL, RANKS, DATA = (_LOOPS + name for name in ("plain", "buffers", "several", "ranks", "data"))


def _one(name: str, family: str, run: str, module: str, old: str, new: str, *, why_not: str = "") -> Fault:
    """A fault of one edit."""
    return Fault(name, family, run, (Edit(module, old, new),), why_not=why_not)


DROPPED = (
    _one(
        "the Trainer zeroes gradients before every micro-batch",
        "dropped",
        "Trainer",
        TRAINER,
        "                with sync_context():\n                    tr_loss_step =",
        "                model.zero_grad()\n                with sync_context():\n                    tr_loss_step =",
    ),
    _one(
        "accelerate's optimizer zeroes gradients in the middle of a window",
        "dropped",
        "accelerate",
        ACCELERATED,
        "        if self.gradient_state.sync_gradients:\n            accept_arg",
        "        if True:\n            accept_arg",
    ),
    _one(
        "DeepSpeed's offload adds up at the window's end only",
        "dropped",
        "DeepSpeed stage 2, offload",
        ZERO_2,
        "        if self.micro_step_id > 0:\n            accumulate_gradients()",
        "        if self.is_gradient_accumulation_boundary():\n            accumulate_gradients()",
    ),
    _one(
        "DeepSpeed's stage 3 overwrites its partition",
        "dropped",
        "DeepSpeed stage 3",
        ZERO_3,
        "grad_buffer.add_(grad_partition.to(self.gradient_accumulation_dtype).view(grad_buffer.shape))",
        "grad_buffer.copy_(grad_partition.to(self.gradient_accumulation_dtype).view(grad_buffer.shape))",
    ),
    _one(
        "FSDP2 overwrites the sharded gradient",
        "dropped",
        "FSDP2, every micro-batch",
        COLLECTIVES,
        "fsdp_param.sharded_param.grad._local_tensor += new_sharded_grad",
        "fsdp_param.sharded_param.grad._local_tensor.copy_(new_sharded_grad)",
    ),
    _one(
        "FSDP2 replaces what it has added up by the last gradient",
        "dropped",
        "FSDP2, bf16, last micro-batch",
        SHARDED,
        "            self.unsharded_accumulated_grad += self.unsharded_param.grad\n"
        "            self.unsharded_param.grad = None\n",
        "            self.unsharded_accumulated_grad += self.unsharded_param.grad\n",
    ),
    _one(
        "zero_grad before every backward",
        "dropped",
        "plain loop",
        PLAIN,
        "            scaler.scale(loss).backward()",
        "            stepper.zero_grad()\n            scaler.scale(loss).backward()",
    ),
    _one(
        "a rank throws away what it has, in the middle of a window",
        "dropped",
        "DDP, no_sync",
        RANKS,
        "                (losses.sum() * ranks / tokens).backward()\n",
        "                (losses.sum() * ranks / tokens).backward()\n"
        "            if rank == 1 and number == 1 and not last:\n"
        "                optimizer.zero_grad()\n",
    ),
    _one(
        "a micro-batch that does not fit is skipped, and counted",
        "dropped",
        "plain loop",
        PLAIN,
        "            scaler.scale(loss).backward()",
        '            if batch["input_ids"].numel() > 60:  # as after an out-of-memory error\n'
        "                continue\n"
        "            scaler.scale(loss).backward()",
    ),
)
DOUBLED = (
    _one(
        "accelerate goes back twice",
        "doubled",
        "Trainer",
        ACCELERATOR,
        "            loss.backward(**kwargs)\n",
        "            loss.backward(retain_graph=True)\n            loss.backward(**kwargs)\n",
    ),
    _one(
        "FSDP2 reduces a gradient and keeps it",
        "doubled",
        "FSDP2, every micro-batch",
        SHARDED_GROUP,
        "                    unsharded_grads.append(fsdp_param.unsharded_grad_data)\n"
        "                    fsdp_param.unsharded_param.grad = None\n",
        "                    unsharded_grads.append(fsdp_param.unsharded_grad_data.clone())\n",
    ),
    _one(
        "the sum of losses goes back after every micro-batch",
        "doubled",
        "plain loop",
        PLAIN,
        "            scaler.scale(loss).backward()",
        "            running = loss if batch is window[0] else running + loss\n"
        "            scaler.scale(running).backward(retain_graph=True)",
    ),
    _one(
        "a buffer is fed from gradients that pile up",
        "doubled",
        "accumulation in buffers of one's own",
        BUFFERS,
        "                own += parameter.grad\n            optimizer.zero_grad()\n",
        "                own += parameter.grad\n",
    ),
    _one(
        "what is added up by hand is summed over the ranks again and again",
        "doubled",
        "ranks averaged by hand",
        RANKS,
        "                (losses.sum() * ranks / tokens).backward()\n",
        "                (losses.sum() * ranks / tokens).backward()\n"
        "            if not last:\n"
        "                for one in model.parameters():\n"
        "                    all_reduce(one.grad)\n",
    ),
    _one(
        "FSDP2 keeps the gradient that it has taken up in another dtype",
        "doubled",
        "FSDP2, bf16, last micro-batch",
        SHARDED,
        "        self._unsharded_param.grad = None\n        self.unsharded_accumulated_grad = unsharded_grad.to",
        "        self.unsharded_accumulated_grad = unsharded_grad.to",
    ),
)
STALE = (
    _one(
        "the Trainer never zeroes gradients",
        "stale",
        "Trainer",
        TRAINER,
        "                    model.zero_grad()\n",
        "",
    ),
    _one(
        "zero_grad forgets all groups but the first",
        "stale",
        "weight decay for matrices alone",
        OPTIMIZER,
        "            for group in self.param_groups:\n"
        '                for p in group["params"]:\n'
        "                    if p.grad is not None:\n"
        "                        if set_to_none:",
        "            for group in self.param_groups[:1]:\n"
        '                for p in group["params"]:\n'
        "                    if p.grad is not None:\n"
        "                        if set_to_none:",
    ),
    Fault(
        "DeepSpeed's stage 1 keeps what it has stepped",
        "stale",
        "DeepSpeed's engine, stage 1, clipping",
        (
            Edit(
                ZERO_2,
                "                    self.all_grad_tensors[i] = None\n\n        self._release_ipg_buffers()",
                "\n        self._release_ipg_buffers()",
            ),
            Edit(
                ZERO_2,
                "                self.averaged_gradients[i] = None\n                self.all_grad_tensors[i] = None\n",
                "                self.averaged_gradients[i] = None\n",
            ),
        ),
    ),
    _one(
        "accelerate leaves the end of an epoch to the next one",
        "stale",
        "accelerate, two epochs",
        ACCELERATOR,
        "        if self.gradient_state.sync_with_dataloader and self.gradient_state.end_of_dataloader:\n",
        "        if False:\n",
    ),
    _one(
        "a buffer is not emptied after the step",
        "stale",
        "accumulation in buffers of one's own",
        BUFFERS,
        "        for own in sums:\n            own.zero_()\n",
        "",
    ),
    _one(
        "torch's zero_grad leaves vectors alone",
        "stale",
        "Trainer",
        MODULE,
        "        for p in self.parameters():\n            if p.grad is not None:\n                if set_to_none:",
        "        for p in self.parameters():\n            if p.grad is not None and p.dim() > 1:\n"
        "                if set_to_none:",
    ),
    _one(
        "the critic keeps the generator's gradients",
        "stale",
        "two models against each other",
        SEVERAL,
        "        tells.zero_grad()\n",
        "",
    ),
    _one(
        "FSDP2 keeps what it has added up after it is reduced",
        "stale",
        "FSDP2, bf16, last micro-batch",
        SHARDED_GROUP,
        "                    unsharded_grads.append(fsdp_param.unsharded_accumulated_grad_data)\n"
        "                    fsdp_param.unsharded_accumulated_grad = None\n",
        "                    unsharded_grads.append(fsdp_param.unsharded_accumulated_grad_data)\n",
    ),
)
MIS_SCALED = (
    _one(
        "the Trainer divides by its steps what is divided by tokens",
        "mis-scaled",
        "Trainer",
        TRAINER,
        "            if not loss_is_scaled_for_ga:",
        "            if True:",
    ),
    _one(
        "the Trainer counts prompts and padding as trained tokens",
        "mis-scaled",
        "Trainer",
        TRAINER,
        '                    else batch["labels"][..., 1:]\n                    if self._loss_shifts_labels',
        '                    else batch["input_ids"][..., 1:]\n                    if self._loss_shifts_labels',
    ),
    _one(
        "accelerate does not divide by its steps",
        "mis-scaled",
        "accelerate",
        ACCELERATOR,
        "            loss = loss / self.gradient_accumulation_steps\n",
        "            pass\n",
    ),
    _one(
        "the loss scale is taken back as it was at the start",
        "mis-scaled",
        "loss scale",
        SCALER,
        "            self._scale.double().reciprocal().float()\n"
        '            if self._scale.device != torch.device("mps:0")\n'
        "            else self._scale.reciprocal()\n        )\n        found_inf",
        "            torch.full((), self._init_scale).reciprocal()\n        )\n        found_inf",
    ),
    _one(
        "a partial window is divided like a whole one",
        "mis-scaled",
        "plain loop",
        PLAIN,
        "        tokens = sum(data.count(batch) for batch in window)\n",
        "        tokens = sum(data.count(batch) for batch in window) / len(window) * micro_batches[0]\n",
    ),
    _one(
        "the Trainer counts labels that the shift drops",
        "mis-scaled",
        "Trainer, language modeling collator",
        TRAINER,
        '                    else batch["labels"][..., 1:]\n                    if self._loss_shifts_labels',
        '                    else batch["labels"]\n                    if self._loss_shifts_labels',
    ),
    _one(
        "DeepSpeed's engine divides by its steps though it is told not to",
        "mis-scaled",
        "DeepSpeed stage 1",
        ENGINE,
        "            loss = loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss\n",
        "            loss = loss / self.gradient_accumulation_steps()\n",
    ),
    _one(
        "the loss scale is taken back before the clipping and again in the step",
        "mis-scaled",
        "loss scale and clipping",
        SCALER,
        '        optimizer_state["stage"] = OptState.UNSCALED\n',
        "",
        why_not="one factor for all, below 1: it looks like clipping, whose limit the ledger does not know",
    ),
)
MIS_REDUCED = (
    _one(
        "the Trainer does not make up for the average over ranks",
        "mis-reduced",
        "Trainer, two ranks",
        TRAINER,
        "            loss *= loss_scale if self.args.n_gpu <= 1 else self.args.n_gpu\n",
        "            pass\n",
    ),
    _one(
        "FSDP2 sums over ranks",
        "mis-reduced",
        "FSDP2, every micro-batch",
        COLLECTIVES,
        "            return None, None, ReduceOp.AVG, ReduceOp.AVG",
        "            return None, None, ReduceOp.SUM, ReduceOp.SUM",
    ),
    _one(
        "DDP's hook sums over ranks",
        "mis-reduced",
        "DDP, communication hook",
        HOOKS,
        "    tensor.div_(group_to_use.size())\n\n    return (\n        dist.all_reduce(tensor, group=group_to_use",
        "    return (\n        dist.all_reduce(tensor, group=group_to_use",
    ),
    _one(
        "DDP stays unsynchronized after its first no_sync",
        "mis-reduced",
        "DDP, no_sync",
        DDP,
        "            self.require_backward_grad_sync = old_require_backward_grad_sync\n\n    @classmethod",
        "            pass\n\n    @classmethod",
    ),
    _one(
        "DeepSpeed's stage 2 does not divide by the ranks",
        "mis-reduced",
        "DeepSpeed stage 2",
        ZERO_2,
        "            if self.gradient_average:\n"
        "                tensor.div_(dist.get_world_size(group=self.dp_process_group) / "
        "float(self.sequence_parallel_size))\n",
        "",
    ),
    _one(
        "DeepSpeed's stage 2 divides by the ranks twice",
        "mis-reduced",
        "DeepSpeed stage 2",
        ZERO_2,
        "                                               divide=False,\n"
        "                                               process_group=bucket_key[1])",
        "                                               divide=True,\n"
        "                                               process_group=bucket_key[1])",
        why_not="one factor for all, below 1: it looks like clipping, whose limit the ledger does not know",
    ),
    _one(
        "only matrices are averaged by hand",
        "mis-reduced",
        "ranks averaged by hand",
        RANKS,
        "                all_reduce(one.grad)\n                one.grad /= ranks\n",
        "                if one.dim() > 1:\n"
        "                    all_reduce(one.grad)\n"
        "                    one.grad /= ranks\n",
    ),
    _one(
        "both ranks read the same rows",
        "mis-reduced",
        "Trainer, two ranks",
        LOADER,
        "            if idx % self.num_processes == self.process_index:\n                batch_to_yield = batch",
        "            if idx % self.num_processes == 0:\n                batch_to_yield = batch",
    ),
    _one(
        "DeepSpeed's stage 0 does not divide by the ranks",
        "mis-reduced",
        "DeepSpeed stage 0",
        ENGINE,
        "                tensor_to_allreduce.mul_(self.gradient_predivide_factor() / dp_world_size)\n",
        "                pass\n",
    ),
    _one(
        "FSDP2 scatters to the ranks in another order than it shards",
        "mis-reduced",
        "FSDP2, every micro-batch",
        COLLECTIVES,
        "    foreach_reduce_scatter_copy_in(unsharded_grads, reduce_scatter_input, world_size)\n",
        "    foreach_reduce_scatter_copy_in(unsharded_grads, reduce_scatter_input, world_size)\n"
        "    reduce_scatter_input.copy_(reduce_scatter_input.view(world_size, -1).flip(0).reshape(-1))\n",
    ),
)
MIS_CLIPPED = (
    _one(
        "the Trainer clips after every micro-batch",
        "mis-clipped",
        "Trainer, clipping",
        TRAINER,
        "                    tr_loss_step = self.training_step(model, inputs, num_items_in_batch)\n",
        "                    tr_loss_step = self.training_step(model, inputs, num_items_in_batch)\n"
        "                self._clip_grad_norm(model)\n",
    ),
    _one(
        "the Trainer clips parameter by parameter",
        "mis-clipped",
        "Trainer, clipping",
        TRAINER,
        "        return self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)",
        "        return max(\n"
        "            self.accelerator.clip_grad_norm_([one], self.args.max_grad_norm) for one in model.parameters()\n"
        "        )",
    ),
    _one(
        "torch's clipping leaves out the last gradients",
        "mis-clipped",
        "clipping",
        CLIP,
        "            torch._foreach_mul_(device_grads, clip_coef_clamped.to(device))",
        "            torch._foreach_mul_(device_grads[:-2], clip_coef_clamped.to(device))",
    ),
    _one(
        "DeepSpeed's ranks clip by their own norms",
        "mis-clipped",
        "DeepSpeed's engine, stage 1, clipping",
        ZERO_2,
        "            # Sum across all model parallel Device.\n"
        "            dist.all_reduce(total_norm, op=dist.ReduceOp.SUM, group=self.dp_process_group)\n",
        "",
    ),
    _one(
        "only matrices are clipped",
        "mis-clipped",
        "clipping",
        PLAIN,
        "torch.nn.utils.clip_grad_norm_(parameters, clip)",
        "torch.nn.utils.clip_grad_norm_(matrices, clip)",
    ),
    _one(
        "clipped before the loss scale is taken back",
        "mis-clipped",
        "loss scale and clipping",
        PLAIN,
        "            scaler.unscale_(stepper)\n",
        "",
        why_not="one factor for all, below 1: it looks like clipping, whose limit the ledger does not know",
    ),
    Fault(
        "FSDP2's ranks clip by the norms of their own shards",
        "mis-clipped",
        "FSDP2, clipping",
        (
            Edit(
                CLIP,
                "            norms.extend(torch._foreach_norm(device_tensors, norm_type))",
                "            norms.extend(\n"
                "                torch._foreach_norm(\n"
                '                    [getattr(g, "_local_tensor", g) for g in device_tensors], norm_type\n'
                "                )\n"
                "            )",
            ),
            Edit(
                CLIP,
                "            torch._foreach_mul_(device_grads, clip_coef_clamped.to(device))",
                "            torch._foreach_mul_(\n"
                '                [getattr(g, "_local_tensor", g) for g in device_grads],\n'
                "                clip_coef_clamped.to(device),\n"
                "            )",
            ),
        ),
    ),
    _one(
        "torch's clipping by value leaves negative values alone",
        "mis-clipped",
        "clipping by value",
        CLIP,
        "            torch._foreach_clamp_min_(cast(list[Tensor], grads), -clip_value)\n",
        "",
    ),
)
MIS_WEIGHTED = (
    Fault(
        "the Trainer averages the micro-batches' averages",
        "mis-weighted",
        "Trainer",
        (
            Edit(
                TRAINER,
                "loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)",
                "loss = self.compute_loss(model, inputs)",
            ),
            Edit(TRAINER, "            if not loss_is_scaled_for_ga:", "            if True:"),
        ),
    ),
    _one(
        "the Trainer counts the tokens of its own rank",
        "mis-weighted",
        "Trainer, two ranks",
        TRAINER,
        "self.accelerator.gather(num_items_in_batch.to(device)).sum()",
        "num_items_in_batch.to(device) * self.args.world_size",
    ),
    _one(
        "the smoothed loss is averaged within the micro-batch",
        "mis-weighted",
        "Trainer, label smoothing",
        SMOOTHER,
        "        if num_items_in_batch is None:\n",
        "        if True:\n",
    ),
    _one(
        "each rank divides by its own tokens",
        "mis-weighted",
        "DDP, no_sync",
        RANKS,
        "        all_reduce(tokens)\n",
        "        tokens *= ranks\n",
    ),
    _one(
        "the mean over a micro-batch, divided by the micro-batches",
        "mis-weighted",
        "plain loop",
        PLAIN,
        "            loss = losses.sum() / tokens\n",
        "            loss = losses.sum() / data.count(batch) / len(window)\n",
    ),
    _one(
        "the smoothed loss is averaged over padding too",
        "mis-weighted",
        "Trainer, label smoothing",
        SMOOTHER,
        "            denominator = num_items_in_batch.to(nll_loss.device)",
        "            denominator = padding_mask.numel() * 3",
    ),
    _one(
        "the smoothing term alone is averaged within the micro-batch",
        "mis-weighted",
        "Trainer, label smoothing",
        SMOOTHER,
        "        smoothed_loss = smoothed_loss.sum() / (denominator * log_probs.shape[-1])",
        "        smoothed_loss = smoothed_loss.sum() / ((~padding_mask).sum() * log_probs.shape[-1])",
        why_not="0.6% of the gradient at most: taken for noise in whole windows; the third, a partial one, is found",
    ),
)
MIS_MASKED = (
    _one(
        "labels that look like padding are dropped",
        "mis-masked",
        "Trainer",
        LOSS,
        "    shift_labels = shift_labels.view(-1)\n    shift_labels = shift_labels.to(logits.device)\n"
        "    loss = fixed_cross_entropy(logits, shift_labels, num_items_in_batch, ignore_index, **kwargs)\n"
        "    return loss\n\n\ndef ForMaskedLMLoss",
        "    shift_labels = shift_labels.view(-1)\n"
        "    shift_labels = shift_labels.masked_fill(shift_labels == 7, ignore_index)\n"
        "    loss = fixed_cross_entropy(logits, shift_labels, num_items_in_batch, ignore_index, **kwargs)\n"
        "    return loss\n\n\ndef ForMaskedLMLoss",
    ),
    _one(
        "the collator trains the first token of the next document",
        "mis-masked",
        "Trainer, packed by its collator",
        COLLATOR,
        '                batch["labels"] += [separator_id] + input_ids[1:]',
        '                batch["labels"] += input_ids',
    ),
    _one(
        "padding is trained",
        "mis-masked",
        "plain loop",
        PLAIN,
        'data.token_losses(logits, batch["labels"])',
        'data.token_losses(logits, batch["input_ids"])',
    ),
    _one(
        "the language modeling collator trains padding",
        "mis-masked",
        "Trainer, language modeling collator",
        COLLATOR,
        '            labels = batch["input_ids"].clone()\n            if self.tokenizer.pad_token_id is not None:\n',
        '            labels = batch["input_ids"].clone()\n            if False:\n',
    ),
    _one(
        "the smoothing term is trained on padding too",
        "mis-masked",
        "Trainer, label smoothing",
        SMOOTHER,
        "        smoothed_loss.masked_fill_(padding_mask, 0.0)\n",
        "",
    ),
)
MIS_SHIFTED = (
    _one(
        "labels are not shifted by the loss",
        "mis-shifted",
        "Trainer",
        LOSS,
        "        shift_labels = labels[..., 1:].contiguous()",
        "        shift_labels = labels[..., :-1].contiguous()",
    ),
    Fault(
        "labels are shifted twice by the loss",
        "mis-shifted",
        "Trainer",
        (
            Edit(
                LOSS,
                "        labels = nn.functional.pad(labels, (0, 1), value=ignore_index)\n"
                "        shift_labels = labels[..., 1:].contiguous()",
                "        labels = nn.functional.pad(labels, (0, 2), value=ignore_index)\n"
                "        shift_labels = labels[..., 2:].contiguous()",
            ),
        ),
    ),
    _one(
        "the smoothed loss is not shifted",
        "mis-shifted",
        "Trainer, label smoothing",
        SMOOTHER,
        "            labels = labels[..., 1:].contiguous()\n\n        log_probs",
        "            labels = labels[..., :-1].contiguous()\n\n        log_probs",
    ),
    _one(
        "labels are shifted the wrong way",
        "mis-shifted",
        "plain loop",
        DATA,
        "    logits, labels = logits[:, :-1].float(), labels[:, 1:]\n",
        "    logits, labels = logits[:, 1:].float(), labels[:, :-1]\n",
    ),
    _one(
        "labels are shifted by the packing and by the loss",
        "mis-shifted",
        "packed documents",
        DATA,
        '        labels += [tiny.IGNORED, *one["input_ids"][1:]]\n',
        '        labels += [*one["input_ids"][1:], tiny.IGNORED]\n',
    ),
    _one(
        "the loss rolls its labels, and a row's end is to predict its beginning",
        "mis-shifted",
        "Trainer, language modeling collator",
        LOSS,
        "        labels = nn.functional.pad(labels, (0, 1), value=ignore_index)\n"
        "        shift_labels = labels[..., 1:].contiguous()",
        "        shift_labels = labels.roll(-1, -1)",
    ),
)

# Written when the ledger's thresholds and rules were settled, blind to them, and when all others had run.
FROZEN = {
    "a micro-batch that does not fit is skipped, and counted",
    "FSDP2 keeps the gradient that it has taken up in another dtype",
    "FSDP2 keeps what it has added up after it is reduced",
    "DeepSpeed's engine divides by its steps though it is told not to",
    "the loss scale is taken back before the clipping and again in the step",
    "FSDP2 scatters to the ranks in another order than it shards",
    "torch's clipping by value leaves negative values alone",
    "the smoothing term alone is averaged within the micro-batch",
    "the smoothing term is trained on padding too",
    "the loss rolls its labels, and a row's end is to predict its beginning",
}

FAULTS: tuple[Fault, ...] = tuple(
    replace(fault, frozen=fault.name in FROZEN)
    for fault in (
        *DROPPED,
        *DOUBLED,
        *STALE,
        *MIS_SCALED,
        *MIS_REDUCED,
        *MIS_CLIPPED,
        *MIS_WEIGHTED,
        *MIS_MASKED,
        *MIS_SHIFTED,
    )
)

# Faults in what the gradients are of, not in what becomes of them: what each backward brings is wrong already, and
# comes in whole. They are run, and shown, and not counted.
BEYOND: tuple[Fault, ...] = (
    _one(
        "checkpointing draws another dropout when it computes again",
        "mis-scaled",
        "Trainer, reentrant checkpointing",
        CHECKPOINT,
        "            if ctx.preserve_rng_state:\n                torch.set_rng_state(ctx.fwd_cpu_state)\n",
        "            if ctx.preserve_rng_state:\n",
        why_not="autograd's own arithmetic: what each backward brings is wrong, and comes in whole",
    ),
    _one(
        "the hidden states are detached in front of the output matrix",
        "dropped",
        "Trainer",
        LLAMA,
        "        logits = self.lm_head(hidden_states)\n",
        "        logits = self.lm_head(hidden_states.detach())\n",
        why_not="no backward brings anything for the layers below, as for a part that is not used",
    ),
)
