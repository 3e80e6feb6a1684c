"""Record what the reference implementations say, for the tests that run without them.

    python tests/record.py            writes tests/recorded/
    python tests/record.py --check    makes every value again and compares

Needs the parity extra; the tokens need LLaMA's tokenizer beside the repository and the base model
of `make base` too. Float values are float32 on the CPU, whose rounding differs between machines:
the check allows 1e-5. (`metric_goldens.json` was computed once with Tk-Instruct's own code.)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import record_weights, reference  # noqa: E402

RECORDED = ROOT / "tests" / "recorded"
LLAMA = ROOT.parent / "shared" / "tokenizers" / "llama" / "tokenizer.model"
SMOLLM2 = ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"


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
            return transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            )

        ids = torch.tensor(reference.tokens(), dtype=torch.int64)
        for case in reference.CASES:
            with torch.no_grad():
                found[f"{case}/logits"] = load(case)(ids).logits.numpy()

        # Decoding, one prompt at a time.
        for case in (reference.ADAPTED, *reference.FAMILIES):
            model = load(case)
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
                found[f"{_prefix(case)}greedy/{i}"] = out[0, len(prompt) :].numpy()

        # Adapted models: logits, loss and gradients of A, B and m.
        labels = torch.where(torch.tensor(reference.loss_mask()), ids, -100)
        kinds = [(reference.ADAPTED, "dora")]
        kinds += [(case, "lora") for case in (reference.ADAPTED, *reference.FAMILIES)]
        for case, kind in kinds:
            prefix = f"{_prefix(case)}{kind}"
            our_peft.save(
                folder / prefix,
                reference.adapters(dora=kind == "dora", case=case),
                rank=reference.RANK,
                alpha=reference.ALPHA,
            )
            adapted = peft.PeftModel.from_pretrained(load(case), folder / prefix, is_trainable=True)
            out = adapted(ids, labels=labels)
            out.loss.backward()
            found[f"{prefix}/logits"] = out.logits.detach().numpy()
            found[f"{prefix}/loss"] = out.loss.detach().numpy()
            for name, weight in adapted.named_parameters():
                if weight.grad is not None:
                    key = name.removeprefix("base_model.model.model.")
                    key = key.replace(".default", "").removesuffix(".weight")
                    found[f"{prefix}/gradient/{key}"] = weight.grad.numpy()

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


def _prefix(case: str) -> str:
    return "" if case == reference.ADAPTED else f"{case}/"


def write(folder: Path) -> None:
    """Make every recorded file in a folder."""
    np.savez_compressed(folder / "llama.npz", **record())  # pyright: ignore[reportArgumentType]
    record_weights.write_adapter(folder / "peft_adapter")
    if LLAMA.is_file() and SMOLLM2.is_file():
        text = json.dumps(record_weights.tokens(LLAMA, SMOLLM2), indent=0, ensure_ascii=True)
        (folder / "tokens.json").write_text(text + "\n")
    else:
        print("tokens.json: left out, LLaMA's tokenizer or the base model is not here")


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz or .safetensors file."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file)
    return load_file(path)


def check(fresh: Path) -> None:
    """Compare freshly made files with the recorded ones; exits where they differ."""
    compared, worst = 0, 0.0
    for path in sorted(fresh.rglob("*")):
        recorded = RECORDED / path.relative_to(fresh)
        if path.suffix in (".npz", ".safetensors"):
            ours, theirs = arrays(path), arrays(recorded)
            if ours.keys() != theirs.keys():
                raise SystemExit(f"{recorded.name}: names differ: {ours.keys() ^ theirs.keys()}")
            for name, value in ours.items():
                np.testing.assert_allclose(value, theirs[name], rtol=0, atol=1e-5, err_msg=name)
                worst = max(worst, float(np.max(np.abs(value - theirs[name]), initial=0.0)))
            compared += len(ours)
        elif path.name == "tokens.json":
            ours, theirs = json.loads(path.read_text()), json.loads(recorded.read_text())
            if ours != theirs:
                raise SystemExit("tokens.json: the reference tokenizers now say something else")
            compared += sum(map(len, ours.values()))
    print(f"{compared} recorded values made again, the worst number {worst:.1e} apart")


if __name__ == "__main__":
    if "--check" in sys.argv:
        with tempfile.TemporaryDirectory() as temporary:
            write(Path(temporary))
            check(Path(temporary))
    else:
        write(RECORDED)
