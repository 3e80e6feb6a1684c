"""Small tokenizers and chat templates in the documented formats of five projects."""

import re

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

TEXT = [
    "You are a helpful assistant. Answer briefly.",
    "What is the capital of France? And of Italy?",
    "The capital of France is Paris.\n\nThat of Italy is Rome.",
    "Write 3 words: <s> </s> [INST] [/INST] <|im_end|> <|im_start|> <|eot_id|> user system",
]
# «…» stands for {% generation %}…{% endgeneration %}, which the unmarked templates lack.
_CHATML = """
{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' }}
    {%- if m['role'] == 'assistant' %}
        {{- «m['content'] + '<|im_end|>'» }}
    {%- else %}
        {{- m['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
_TEMPLATES = {
    # https://github.com/meta-llama/llama3 (Llama 3): a header per turn, contents trimmed.
    "llama3": """
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if m['role'] == 'assistant' %}
        {{- «m['content'] | trim + '<|eot_id|>'» }}
    {%- else %}
        {{- m['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    # ChatML with a default system message, https://huggingface.co/Qwen/Qwen2.5-7B-Instruct.
    "qwen2.5": """
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}"""
    + _CHATML,
    # https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.3: the system message goes into the
    # last user turn, so that what a conversation begins with depends on how it goes on.
    "mistral": """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- set last = turns | selectattr('role', 'equalto', 'user') | list | length %}
{%- set ns = namespace(users=0) %}
{%- for m in turns %}
    {%- if m['role'] == 'user' %}
        {%- set ns.users = ns.users + 1 %}
        {{- '[INST] ' + (system if ns.users == last else '') + m['content'] + '[/INST]' }}
    {%- elif m['role'] == 'assistant' %}
        {{- ' ' }}
        {{- «m['content'] + eos_token» }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported') }}
    {%- endif %}
{%- endfor %}""",
    # https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
    "chatml": _CHATML,
    # https://huggingface.co/HuggingFaceH4/zephyr-7b-beta: roles are text, </s> ends every turn.
    "zephyr": """
{%- for m in messages %}
    {{- '<|' + m['role'] + '|>\\n' }}
    {%- if m['role'] == 'assistant' %}
        {{- «m['content'] + eos_token» }}
    {%- else %}
        {{- m['content'] + eos_token }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}""",
}
# BOS, EOS and the other control tokens of each; None: no BOS.
_SPECIAL = {
    "llama3": (
        ["<|begin_of_text|>", "<|eot_id|>"],
        ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
    ),
    "qwen2.5": ([None, "<|im_end|>"], ["<|im_start|>", "<|endoftext|>"]),
    "mistral": (["<s>", "</s>"], ["[INST]", "[/INST]"]),
    "chatml": ([None, "<|im_end|>"], ["<|im_start|>"]),
    "zephyr": (["<s>", "</s>"], []),
}
NAMES = tuple(_TEMPLATES)


def template(name: str, marked: bool) -> str:
    """The template of a project, with `{% generation %}` blocks or without."""
    if marked:
        block = r"{%- generation %}{{- \1 }}{%- endgeneration %}"
        return re.sub(r"\{\{- «(.*?)» \}\}", block, _TEMPLATES[name]).lstrip("\n")
    return re.sub("[«»]", "", _TEMPLATES[name]).lstrip("\n")


def tokenizer(name: str, marked: bool = True, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of a few hundred tokens with the template and control tokens of a project.

    Mistral's and Zephyr's is SentencePiece's kind, the others' are byte-level.
    """
    (bos, eos), others = _SPECIAL[name]
    special = [token for token in ("<unk>", bos, eos, *others) if token]
    if name in ("mistral", "zephyr"):
        inner = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [chr(i) for i in range(10, 127)]
    else:
        inner = Tokenizer(BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        clean_up_tokenization_spaces=False,
        chat_template=template(name, marked),
        unk_token="<unk>",
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=others,
    )
