"""Tokenizers from Hugging Face folders, from `tokenizer.model` and from a GGUF's own metadata."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from jax_lora.errors import DataError, MissingFileError, first_line
from jax_lora.files import read_json
from jax_lora.weights.gguf_file import open_gguf
from jax_lora.weights.hf import resolve
from jax_lora.weights.sentencepiece import NORMAL_KINDS, read_sentencepiece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Where torch is missing, which nothing here needs, transformers would remark on it on stderr.
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith("PyTorch was not found")
)

_LONGEST_PIECE = 256  # characters; every way to cut a piece in two is looked at
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types, in GGUF as in SentencePiece

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut into words before the merges, by the name that llama.cpp gives it: expressions
# applied one after the other to what the earlier ones left.
_PRE = {
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "gpt-2": (_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_LLAMA3_NAMES = ("llama-bpe", "llama-v3", "llama3")


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of a model.

    Args:
      source: a Hugging Face folder (`tokenizer.json`, or SentencePiece's `tokenizer.model`
        alone), a GGUF file, or a hub id.

    Returns:
      A transformers tokenizer, with the special tokens and the chat template of the source.

    Raises:
      MissingFileError: the folder has no tokenizer, or there is no such file.
      DataError: a damaged one, or one of a kind that is not supported.
    """
    path = resolve(source, weights=False)
    if path.is_file():
        return _from_gguf(path)
    if (path / "tokenizer.json").is_file():
        return _from_tokenizer_json(path)
    if (path / "tokenizer.model").is_file():
        return _from_tokenizer_model(path)
    text = "no tokenizer, expected tokenizer.json or tokenizer.model"
    raise MissingFileError(errno.ENOENT, text, str(path))


def has_tokenizer(source: str | os.PathLike[str]) -> bool:
    """Whether a source has a tokenizer that `load_tokenizer` would read."""
    path = resolve(source, weights=False)
    names = ("tokenizer.json", "tokenizer.model")
    return path.is_file() or any((path / name).is_file() for name in names)


def check_vocabulary(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, source: str | os.PathLike[str]
) -> None:
    """Refuse a tokenizer whose special tokens are no tokens of the model.

    An added token beyond the table may never occur; `data.prompts.Encoder` with a `vocab_size`
    refuses the row where one does.

    Args:
      tokenizer: as of `load_tokenizer`.
      vocab_size: rows of the model's embedding table.
      source: where the tokenizer is from, for the message.

    Raises:
      DataError: its BOS, EOS or padding token has an id of `vocab_size` or more; or its EOS is
        none of its tokens, such as "", whose id would be the unknown token's.
    """
    for name in ("bos", "eos", "pad"):
        i, token = (getattr(tokenizer, f"{name}_token{part}") for part in ("_id", ""))
        if i is not None and i >= vocab_size:
            raise DataError(
                f"{source}: {name} token {token!r}: found id {i}, expected below the model's "
                f"vocab_size {vocab_size}"
            )
        if name == "eos" and (i is None or tokenizer.convert_ids_to_tokens(i) != token):
            raise DataError(f"{source}: eos token: found {token!r}, expected a token of its own")


def base_end_ids(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, source: str | os.PathLike[str]
) -> tuple[int, ...]:
    """Every id that ends an answer of the model, the tokenizer's own first.

    Args:
      tokenizer: as of `load_tokenizer`.
      vocab_size: rows of the model's embedding table; an id beyond them can never be generated.
      source: a folder, whose generation_config.json and config.json name more, or a GGUF file,
        whose metadata do.

    Raises:
      DataError: an `eos_token_id` that is neither a number nor a list of numbers.
    """
    found: list[object] = [tokenizer.eos_token_id]
    path = resolve(source, weights=False)
    if path.is_file():
        metadata = open_gguf(path).metadata
        names = ("eos", "eot", "eom")
        found += [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    else:
        for file in (path / "generation_config.json", path / "config.json"):
            given = read_json(file, dict).get("eos_token_id") if file.is_file() else None
            ids = given if isinstance(given, list) else [given]
            if not all(i is None or type(i) is int for i in ids):
                raise DataError(f"{file}: eos_token_id: found {given!r:.60}, expected ids")
            found += ids
    return tuple(dict.fromkeys(i for i in found if isinstance(i, int) and 0 <= i < vocab_size))


def _from_tokenizer_json(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = folder / "tokenizer_config.json"
    known = settings.is_file() and "tokenizer_class" in read_json(settings, dict)
    # Without a class to look up, tokenizer.json itself says all there is.
    loader = AutoTokenizer if known else PreTrainedTokenizerFast
    with _damaged(folder):
        found = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found.decode(found("Hello").input_ids)  # some damage shows at the first use only
        if not isinstance(template := found.chat_template, str | dict | None):
            raise DataError(f"{settings}: chat_template: found {template!r:.60}, expected a text")
        return found


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Whatever the libraries raise over a tokenizer's files, as one DataError."""
    try:
        yield
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # the Rust side raises bare Exceptions, and panics, which are none
        reason = first_line(error)
        raise DataError(f"{path}: its tokenizer cannot be read: {reason}") from None


def _from_tokenizer_model(folder: Path) -> PreTrainedTokenizerFast:
    with _damaged(folder):
        return _from_sentencepiece(folder)


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    spm = read_sentencepiece(folder / "tokenizer.model")
    inner = _sentencepiece(spm.pieces, spm.scores, spm.kinds, spm.add_prefix)
    path = folder / "tokenizer_config.json"
    settings, older, names = (
        read_json(file, dict) if file.is_file() else {}
        for file in (path, folder / "special_tokens_map.json", folder / "added_tokens.json")
    )
    if settings.get("legacy") is False:  # no space is put before what follows a control token
        inner.normalizer = None
        scheme = "first" if spm.add_prefix else "never"
        inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    if "added_tokens_decoder" in settings:  # transformers reads the older files without it alone
        older, names = {}, {}
    listed = settings.get("added_tokens_decoder") or {
        i: {"content": token, "special": False} for token, i in names.items()
    }
    added = {
        int(i): AddedToken(t["content"], special=t.get("special", True), normalized=False)
        for i, t in listed.items()
    }
    for i in sorted(i for i in added if i >= len(spm.pieces)):
        if i != inner.get_vocab_size():
            expected = inner.get_vocab_size()
            raise DataError(f"{path}: added token {i}: found a gap, expected id {expected}")
        inner.add_tokens([added[i]])
    ids = {"bos": spm.bos, "eos": spm.eos, "unk": spm.unk, "pad": spm.pad}
    for name in ids:
        token = older.get(f"{name}_token", settings.get(f"{name}_token"))
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            ids[name] = inner.token_to_id(token)
            if ids[name] is None:
                expected = "a token of tokenizer.model or one that is added"
                raise DataError(f"{folder}: {name}_token: found {token!r}, expected {expected}")
    template = folder / "chat_template.jinja"
    return _finish(
        inner,
        ids,
        bool(settings.get("add_bos_token", True)),
        bool(settings.get("add_eos_token", False)),
        template.read_text("utf-8") if template.is_file() else settings.get("chat_template"),
    )


def _from_gguf(path: Path) -> PreTrainedTokenizerFast:
    metadata = open_gguf(path).metadata
    with _damaged(path):
        return _from_metadata(path, metadata)


def _from_metadata(path: Path, metadata: dict) -> PreTrainedTokenizerFast:
    prefix = "tokenizer.ggml."
    settings: dict = {
        k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)
    }
    get = settings.get
    model, tokens = get("model"), get("tokens")
    if model not in ("gpt2", "llama"):
        raise DataError(f"{path}: tokenizer.ggml.model: found {model!r}, expected gpt2 or llama")
    if not tokens or len(set(tokens)) != len(tokens):
        found = f"{len(tokens)} tokens, some twice" if tokens else "nothing"
        raise DataError(f"{path}: tokenizer.ggml.tokens: found {found}, expected distinct tokens")
    kinds = get("token_type", [1] * len(tokens))
    if len(kinds) != len(tokens):
        raise DataError(
            f"{path}: tokenizer.ggml.token_type: found {len(kinds)}, expected {len(tokens)}"
        )
    ids = {
        name: get(f"{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    if model == "llama":
        scores = get("scores")
        if scores is None or len(scores) != len(tokens):
            found = "nothing" if scores is None else len(scores)
            raise DataError(f"{path}: tokenizer.ggml.scores: found {found}, expected {len(tokens)}")
        # SentencePiece's own numbers, which llama.cpp too takes where the file is silent.
        ids = {"bos": 1, "eos": 2, "unk": 0} | {k: v for k, v in ids.items() if v is not None}
        inner = _sentencepiece(tokens, scores, kinds, get("add_space_prefix", True))
        add_bos = True
    else:
        pre = get("pre", "default")
        pre = "llama-bpe" if pre in _LLAMA3_NAMES else pre
        if pre not in _PRE:
            supported = ", ".join(_PRE)
            raise DataError(
                f"{path}: tokenizer.ggml.pre: found {pre!r}, expected one of {supported}"
            )
        inner = _byte_level(tokens, get("merges", []), kinds, pre)
        add_bos = pre == "llama-bpe"
    for name, i in ids.items():
        if i is not None and not 0 <= i < len(tokens):
            raise DataError(f"{path}: {name} token: found id {i}, expected below {len(tokens)}")
    return _finish(
        inner,
        ids,
        get("add_bos_token", add_bos),
        get("add_eos_token", False),
        metadata.get("tokenizer.chat_template"),
    )


def _byte_level(tokens: list[str], merges: list[str], kinds: list[int], pre: str) -> Tokenizer:
    """GPT-2's BPE over bytes, the words cut as `pre` says."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [(m[:cut], m[cut + 1 :]) for m in merges for cut in [m.index(" ", 1)]]
    # Llama 3 takes a word that is in the vocabulary as it is, whatever the merges would give.
    inner = Tokenizer(BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre == "llama-bpe"))
    cuts = [pre_tokenizers.Split(Regex(e), behavior="isolated") for e in _PRE[pre]]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_only])
    inner.decoder = decoders.ByteLevel()
    return _with_added(inner, tokens, kinds)


def _sentencepiece(
    pieces: list[str], scores: list[float], kinds: list[int], prefix: bool
) -> Tokenizer:
    """SentencePiece's BPE: of all neighbours, join those whose union has the highest score.

    `tokenizers` wants pairs in order of precedence: every way to cut a piece into two pieces,
    the highest score first.
    """
    if (longest := max(map(len, pieces))) > _LONGEST_PIECE:
        raise ValueError(
            f"found a piece of {longest} characters, expected {_LONGEST_PIECE} at most"
        )
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    normal = [i for i, kind in enumerate(kinds) if kind in NORMAL_KINDS]
    parts = {pieces[i] for i in normal}
    merges = [
        (piece[:cut], piece[cut:])
        for i in sorted(normal, key=lambda i: -scores[i])
        for piece in [pieces[i]]
        for cut in range(1, len(piece))
        if piece[:cut] in parts and piece[cut:] in parts
    ]
    unknown = next((pieces[i] for i, kind in enumerate(kinds) if kind == _UNKNOWN), None)
    inner = Tokenizer(
        BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    first = [normalizers.Prepend("▁")] if prefix else []
    inner.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return _with_added(inner, pieces, kinds)


def _with_added(inner: Tokenizer, tokens: list[str], kinds: list[int]) -> Tokenizer:
    # Both kinds are found in the text before anything else; only control tokens vanish on decoding.
    added = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
    inner.add_tokens(
        [
            AddedToken(token, special=added[kind], normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in added
        ]
    )
    return inner


def _finish(
    inner: Tokenizer,
    ids: dict[str, int | None],
    add_bos: bool,
    add_eos: bool,
    chat_template: str | None,
) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    if chat_template is not None and not isinstance(chat_template, str):
        raise ValueError(f"chat template: found {chat_template!r:.60}, expected a text")
    names = {k: str(inner.id_to_token(i)) for k, i in ids.items() if i is not None}
    bos = [names["bos"]] if add_bos and "bos" in names else []
    eos = [names["eos"]] if add_eos and "eos" in names else []
    if bos or eos:
        around = [(name, inner.token_to_id(name)) for name in {*bos, *eos}]
        pair = [*bos, "$A", *eos, *(f"{t}:1" for t in (*bos, "$B", *eos))]
        inner.post_processor = TemplateProcessing(
            single=[*bos, "$A", *eos], pair=pair, special_tokens=around
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
        **{f"{name}_token": token for name, token in names.items()},
    )
