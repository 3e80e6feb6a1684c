"""Record what transformers and PEFT say, for the tests that run without them.

    python tests/record.py            writes tests/recorded/llama.npz
    python tests/record.py --check    recomputes every value and compares

Needs the parity extra. What a reference says is float32 on the CPU; its own rounding differs
between machines, so the check allows 1e-5.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import reference  # noqa: E402


def record() -> dict[str, np.ndarray]:
    """Every value by its name in the file."""
    import peft  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    from jax_lora.weights import peft as our_peft

    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def load(case: str):
            path = reference.write(folder / case, case)
            return transformers.LlamaForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            )

        ids = torch.tensor(reference.tokens(), dtype=torch.int64)
        for case in reference.CASES:
            with torch.no_grad():
                found[f"{case}/logits"] = load(case)(ids).logits.numpy()

        # Decoding, one prompt at a time.
        model = load(reference.ADAPTED)
        for i, prompt in enumerate(reference.PROMPTS):
            with torch.no_grad():
                out = model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                    do_sample=False,
                    max_new_tokens=reference.NEW_TOKENS,
                    eos_token_id=reference.END,
                    pad_token_id=0,
                )
            found[f"greedy/{i}"] = out[0, len(prompt) :].numpy()

        # An adapted model: logits, loss and gradients of A and B.
        our_peft.save(
            folder / "adapter",
            reference.adapters(),
            rank=reference.RANK,
            alpha=reference.ALPHA,
        )
        adapted = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
        labels = torch.where(torch.tensor(reference.loss_mask()), ids, -100)
        out = adapted(ids, labels=labels)
        out.loss.backward()
        found["lora/logits"] = out.logits.detach().numpy()
        found["lora/loss"] = out.loss.detach().numpy()
        for name, weight in adapted.named_parameters():
            if weight.grad is not None:
                key = name.removeprefix("base_model.model.model.").replace(".default.weight", "")
                found[f"lora/gradient/{key}"] = weight.grad.numpy()

    # Learning rates over a run of 30 steps with 5 of warm-up.
    for kind in ("linear", "cosine"):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        make = getattr(transformers, f"get_{kind}_schedule_with_warmup")
        scheduler = make(optimizer, num_warmup_steps=5, num_training_steps=30)
        rates = []
        for _ in range(30):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        found[f"schedule/{kind}"] = np.asarray(rates)
    return found


def main() -> None:
    found = record()
    if "--check" not in sys.argv:
        np.savez_compressed(reference.RECORDED, **found)  # pyright: ignore[reportArgumentType]
        print(f"{len(found)} values → {reference.RECORDED}")
        return
    with np.load(reference.RECORDED) as recorded:
        names = set(recorded.files)
        if names != set(found):
            raise SystemExit(f"recorded names differ: {sorted(names ^ set(found))}")
        worst = 0.0
        for name, value in found.items():
            np.testing.assert_allclose(value, recorded[name], rtol=0, atol=1e-5, err_msg=name)
            worst = max(worst, float(np.max(np.abs(value - recorded[name]), initial=0.0)))
    print(f"{len(found)} recorded values made again, the worst {worst:.1e} apart")


if __name__ == "__main__":
    main()
