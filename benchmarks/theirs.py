"""The peer: transformers with PEFT, at its best setting and with the weights of `ours`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.work import LEARNING_RATE, Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100
ENDS = {"a": "lora_A", "b": "lora_B"}


class Micro(NamedTuple):
    """A micro-batch: ids, labels, and 1 on real tokens (None where there is no padding)."""

    tokens: torch.Tensor
    labels: torch.Tensor
    real: torch.Tensor | None


class Trainer:
    """Training in progress.

    The setting: sdpa attention, no cache, `remat` other than "none" as gradient checkpointing
    without reentry, fused AdamW behind the clip of transformers' Trainer. Frozen weights have the
    case's dtype, what trains is float32, under autocast where the two differ: as Trainer(bf16)
    does, and as ours are. `weights` None leaves PyTorch's own initialization, and keeps JAX
    out of the process.
    """

    def __init__(self, case: Case, weights: Any):
        self.dtype = getattr(torch, case.config.dtype)
        self.model = _model(case, weights, torch.float32 if case.rank is None else self.dtype)
        if case.config.remat != "none":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )

    def steps(self, batches: Any) -> Iterator[float]:
        """Take a step for every global batch, a list of micro-batches; yields its loss."""
        for batch in batches:
            loss_tokens = sum(int((micro.labels[:, 1:] != IGNORED).sum()) for micro in batch)
            total = torch.zeros((), device=DEVICE)
            for micro in batch:
                ids, labels, real = (None if x is None else x.to(DEVICE) for x in micro)
                with torch.autocast(DEVICE, self.dtype, enabled=self.dtype != torch.float32):
                    loss = self.model(
                        ids, attention_mask=real, labels=labels, num_items_in_batch=loss_tokens
                    ).loss
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            _wait()
            yield float(total)

    def step(self, micro: Any) -> float:
        """One step on one of our micro-batches, which has no padding: its loss."""
        ids = torch.from_numpy(micro.tokens).long()
        labels = torch.where(torch.from_numpy(micro.loss_weights > 0), ids, IGNORED)
        (loss,) = self.steps([[Micro(ids, labels, None)]])
        return loss


def batches(
    rows: Sequence[Any], batch_size: int, micro_rows: int, *, grouped: bool, answer_only: bool
) -> Iterator[list[Micro]]:
    """An epoch as Trainer cuts it: micro-batches in random order, padded to their longest row.

    Args:
      rows: training rows.
      batch_size: examples of a step.
      micro_rows: examples of a micro-batch, Trainer's `per_device_train_batch_size`.
      grouped: rows of similar lengths together, its `group_by_length`.
      answer_only: loss on the answers, else on all tokens.

    Yields:
      The micro-batches of a step.
    """
    lengths = [len(row.ids) for row in rows]
    dice = torch.Generator().manual_seed(0)
    if grouped:
        order = get_length_grouped_indices(lengths, micro_rows, generator=dice)
    else:
        order = torch.randperm(len(rows), generator=dice).tolist()
    for at in range(0, len(order), batch_size):
        step = [rows[i] for i in order[at : at + batch_size]]
        cuts = range(0, len(step), micro_rows)
        yield [_padded(step[cut : cut + micro_rows], answer_only) for cut in cuts]


def _padded(rows: Sequence[Any], answer_only: bool) -> Micro:
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids, real = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], real[i, :n] = row.ids, 1
        start = row.prompt_length if answer_only else 0
        labels[i, start:n] = row.ids[start:]
    return Micro(*(torch.from_numpy(x) for x in (ids, labels, real)))


def generator(case: Case, weights: Any) -> Callable[[np.ndarray, int], np.ndarray]:
    """(prompts (B, P), new tokens N) → greedy continuations (B, N) that never end early."""
    model = _model(case, weights, getattr(torch, case.config.dtype)).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    @torch.inference_mode()
    def generate(prompts: np.ndarray, new: int) -> np.ndarray:
        ids = torch.from_numpy(prompts).long().to(DEVICE)
        found = model.generate(input_ids=ids, max_new_tokens=new, use_cache=True)
        return found[:, ids.shape[1] :].cpu().numpy()

    return generate


def _model(case: Case, weights: Any, dtype: torch.dtype) -> Any:
    c = case.shape
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=c.tie_word_embeddings,
        use_cache=False,
    )
    with torch.device(DEVICE):
        model: Any = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
    if case.rank is not None:
        settings = peft.LoraConfig(
            r=case.rank,
            lora_alpha=case.config.lora.alpha,
            lora_dropout=case.config.lora.dropout,
            target_modules=list(case.config.lora.targets),
        )
        with torch.device(DEVICE):
            model = peft.get_peft_model(model, settings)
    places = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in _tensors(weights) if weights is not None else ():
            if case.rank is not None:
                name = f"base_model.model.{name}"
                adapted = name.replace(".weight", ".base_layer.weight")
                name = adapted if adapted in places else name
            places.pop(name).copy_(tensor)
    assert weights is None or not places, sorted(places)
    return model


def _tensors(weights: Any) -> Iterator[tuple[str, torch.Tensor]]:
    # Our leaves by Hugging Face's names, a layer at a time and without a copy.
    def torch_of(x: Any) -> torch.Tensor:
        return torch.from_dlpack(x)

    params = weights["params"]
    yield "model.embed_tokens.weight", torch_of(params["embed_tokens"]["embedding"])
    yield "model.norm.weight", torch_of(params["norm"]["scale"])
    if "lm_head" in params:
        yield "lm_head.weight", torch_of(params["lm_head"]["kernel"]).T
    for group, modules in params["layers"].items():
        for name, leaf in modules.items() if group in ("self_attn", "mlp") else ():
            for i, x in enumerate(torch_of(leaf["kernel"])):
                yield f"model.layers.{i}.{group}.{name}.weight", x.T
        if group.endswith("layernorm"):
            for i, x in enumerate(torch_of(modules["scale"])):
                yield f"model.layers.{i}.{group}.weight", x
    for group, modules in weights["lora"]["layers"].items() if "lora" in weights else ():
        for (name, leaf), (ours_name, end) in itertools.product(modules.items(), ENDS.items()):
            for i, x in enumerate(torch_of(leaf[ours_name])):
                yield f"model.layers.{i}.{group}.{name}.{end}.default.weight", x.T


def product(dtype: str, side: int) -> Callable[[], Any]:
    """A function that multiplies two (side, side) matrices and waits."""
    a, b = torch.randn(2, side, side, dtype=getattr(torch, dtype), device=DEVICE)

    def multiply():
        torch.nn.functional.linear(a, b)
        _wait()

    return multiply


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak_bytes() -> int | None:
    """Most device memory held so far by PyTorch; None on a CPU, whose process tells."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
