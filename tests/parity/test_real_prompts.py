"""Scores of 238 real unseen prompts, against a plain loop of transformers, PEFT and rouge_score.

    JAX_LORA_REAL_PROMPTS=1 python -m pytest tests/parity/test_real_prompts.py -m parity

Five minutes of two CPU cores, so that it is skipped where the variable is not set.
"""

import os
import string

import numpy as np
import pytest

import jax_lora
from jax_lora.files import read_json, read_jsonl
from jax_lora.run import inputs
from jax_lora.run.folder import read_saved

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        "JAX_LORA_REAL_PROMPTS" not in os.environ, reason="set JAX_LORA_REAL_PROMPTS"
    ),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
NEW_TOKENS, BATCH = 16, 14


@pytest.fixture(scope="module")
def theirs(smollm2, tmp_path_factory):
    """Transformers' tokenizer, PEFT's model with a random adapter, and the adapter's folder."""
    source = dict(pretrained_model_name_or_path=smollm2.parent, gguf_file=smollm2.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source, padding_side="left")
    base = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=8, lora_alpha=2, target_modules="all-linear", init_lora_weights=False
    )
    model = peft.get_peft_model(base, config).eval()
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder, save_embedding_layers=False)
    return tokenizer, model, folder


@pytest.fixture(scope="module")
def folder(theirs, shared, smollm2, tmp_path_factory):
    """Ours: the folder of the answers to 238 prompts of 119 tasks."""
    keys = {
        "max_steps": 1,  # any run has a folder that can be scored with any adapter
        "batch_size": 1,
        "remat": "full",
        "optim.warmup_steps": 0,
        "data.path": str(shared / "data" / "niv2"),
        "data.test_per_task": 2,
        "data.source_length": 960,
        "data.target_length": 64,
        "data.buckets": (1024,),
        "eval.max_new_tokens": NEW_TOKENS,
        "eval.buckets": (256, 960),
        "eval.batch_tokens": 4096,
    }
    config = jax_lora.RunConfig().replace(model=str(smollm2), dtype="float32", **keys)
    opened = jax_lora.Run.open(config, tmp_path_factory.mktemp("run"))
    opened.train()
    opened.score(["unseen"], adapter=str(theirs[2]))
    (scores,) = opened.workdir.glob("eval*/unseen/scores.json")
    return scores.parent


@pytest.fixture(scope="module")
def answers(theirs, folder):
    """Theirs, by id: greedy answers to the same prompts, in batches.

    The ids are ours. Transformers reads no rule for digits from GGUF files, and cuts spaces in
    front of a digit otherwise: 9 of the 238 prompts.
    """
    (tokenizer, model, _), found = theirs, {}
    config, end = read_saved(folder.parents[1])[0], tokenizer.eos_token_id
    encoder = inputs.encoder(config)
    examples = inputs.test_sets(config, ("unseen",))["unseen"].examples
    rows = [(example.id, encoder.prompt_row(example).ids.tolist()) for example in examples]
    rows.sort(key=lambda row: len(row[1]))
    for start in range(0, len(rows), BATCH):
        names, ids = zip(*rows[start : start + BATCH], strict=True)
        padded = tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt")
        made = generate(model, padded, end)[:, padded.input_ids.shape[1] :]
        found |= zip(names, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True)
    return {name: text.strip() for name, text in found.items()}


def generate(model, inputs, end):
    with torch.no_grad():
        return model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=end,
            pad_token_id=end,
        )


def test_every_answer_and_score_equals_a_plain_loop_of_transformers_and_peft(
    theirs, folder, answers
):
    from rouge_score.rouge_scorer import RougeScorer

    examples = read_jsonl(folder / "examples.jsonl")
    ours = {row["id"]: row["prediction"] for row in read_jsonl(folder / "predictions.jsonl")}
    assert len(answers) == len(ours) == 238
    assert [name for name in answers if ours[name] != answers[name]] == []

    def normalized(text):
        return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    exact, rouge = [], []
    for example in examples:
        answer, references = ours[example["id"]], example["references"]
        exact.append(normalized(answer) in map(normalized, references))
        found = (scorer.score(one, answer)["rougeL"].fmeasure for one in references)
        rouge.append(max(found))
    scores = read_json(folder / "scores.json")["metrics"]
    assert scores["exact_match"] == pytest.approx(100 * np.mean(exact), abs=1e-4)
    assert scores["rougeL"] == pytest.approx(100 * np.mean(rouge), abs=1e-4)
    assert 0 < scores["exact_match"] < scores["rougeL"]  # the loop compared something
