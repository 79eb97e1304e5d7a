"""Tokenizers of checkpoints without a `tokenizer.json`, built from their vocabulary files."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from etils import epath
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from attnlab import untrusted
from attnlab.data.tokenizer_files import read_vocabulary
from attnlab.errors import InputError, shorten

TokenizerConfig = dict[str, Any]
MODEL_BYTES = 16 << 20  # of a SentencePiece model; the largest published ones have 5 MiB
MAX_PIECE = 1024


class TokenizerParts(NamedTuple):
    """The constructor arguments of `Tokenizer`."""

    backend: tokenizers.Tokenizer
    settings: TokenizerConfig
    source_target_tokenizers: tuple[tokenizers.Tokenizer, tokenizers.Tokenizer] | None = None


SPACE = "\u2581"  # SentencePiece's symbol for a space
# Whether the tokenizer class adds a BOS and an EOS token by default.
ADDED_ENDS = {"Llama": (True, False), "CodeLlama": (True, False), "Gemma": (True, False), "T5": (False, True)}
BERT_CLASSES = ("Bert", "DistilBert", "Electra")


def read(folder: epath.Path, settings: TokenizerConfig, model_type: str) -> TokenizerParts | None:
    """Build the tokenizer of a folder, or return None without vocabulary files.

    The returned settings include the defaults of the tokenizer class.

    Args:
      folder: the checkpoint.
      settings: the fields of its `tokenizer_config.json`, or {}.
      model_type: the `model_type` of its config.

    Raises:
      InputError: the tokenizer class is not supported, or sentencepiece is not installed.
    """
    kind = re.sub("Tokenizer(Fast)?$", "", settings.get("tokenizer_class") or "")
    for name, usual, make in (
        ("source.spm", "Marian", _marian),
        ("tokenizer.model", "Llama", _sentencepiece),
        ("spiece.model", "T5", _sentencepiece),
        ("vocab.txt", "Bert", _word_piece),
        (
            "merges.txt",
            {"clip": "CLIP", "roberta": "Roberta", "bart": "Bart"}.get(model_type, "GPT2"),
            _byte_level,
        ),
    ):
        if (folder / name).exists():
            with untrusted.one_line_errors(str(folder / name)):
                parts = make(folder / name, kind or usual, settings)
            merged = parts.settings | {k: v for k, v in settings.items() if v is not None}
            _add_tokens(parts.backend, folder, merged)
            return parts._replace(settings=merged)
    return None


def _unsupported(file: epath.Path, kind: str, known: Sequence[str]) -> InputError:
    supported = ", ".join(f"{k}Tokenizer" for k in known)
    return InputError(
        f"{file}: {kind}Tokenizer needs a tokenizer.json; without one, {supported} are supported"
    )


def _lines(text: str) -> list[str]:
    """Split at line feeds only: a word may be another line separator, such as U+2028."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else str(token)


def _add_tokens(backend: tokenizers.Tokenizer, folder: epath.Path, settings: TokenizerConfig) -> None:
    """Add the tokens that the settings list with ids, and mark the special tokens."""
    special = {_text(v) for k, v in settings.items() if k.endswith("_token") and isinstance(v, str | Mapping)}
    for name in ("additional_special_tokens", "extra_special_tokens"):
        special |= {_text(token) for token in settings.get(name) or ()}
    listed = settings.get("added_tokens_decoder") or {}
    numbered = {int(n): _text(token) for n, token in listed.items()}
    special |= {_text(t) for t in listed.values() if isinstance(t, Mapping) and t.get("special")}
    if (file := folder / "added_tokens.json").exists():
        numbered |= {number: token for token, number in read_vocabulary(file).items()}
    for number, token in sorted(numbered.items()):
        backend.add_tokens([AddedToken(token, normalized=False, special=token in special)])
        if backend.token_to_id(token) != number:
            actual = backend.token_to_id(token)
            raise InputError(f"{folder}: token {token} must have id {number}, but would get {actual}")
    inside = [token for token in sorted(special) if backend.token_to_id(token) is not None]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in inside])


def _id(vocabulary: Mapping[str, int], token: str) -> int:
    if token not in vocabulary:
        raise InputError(f"the vocabulary lacks the special token {shorten(repr(token))}")
    return vocabulary[token]


def _set_template(backend: tokenizers.Tokenizer, first: str | None, last: str | None) -> None:
    """Add a first and a last token to each text of a single or a pair."""
    ends = [token for token in (first, last) if token]
    vocabulary = backend.get_vocab()
    numbers = [(token, _id(vocabulary, token)) for token in dict.fromkeys(ends)]
    single = [*filter(None, (first, "$A", last))]
    pair = [*single, *(f"{t}:1" for t in filter(None, (first, "$B", last)))]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=numbers)


# SentencePiece ----------------------------------------------------------------------------------


def _sentencepiece(file: epath.Path, kind: str, settings: TokenizerConfig) -> TokenizerParts:
    """Build a tokenizer from a SentencePiece model with the space handling of its class."""
    if kind not in ADDED_ENDS:
        raise _unsupported(file, kind, tuple(ADDED_ENDS))
    proto = _read_proto(file)
    pieces, spec = proto.pieces, proto.normalizer_spec
    known: TokenizerConfig = {
        f"{name}_token": pieces[number].piece
        for name in ("bos", "eos", "unk", "pad")
        if 0 <= (number := getattr(proto.trainer_spec, f"{name}_id")) < len(pieces)
    }
    extra = settings.get("extra_ids", 100 if kind == "T5" else 0)
    known["additional_special_tokens"] = [f"<extra_id_{i}>" for i in reversed(range(extra))]
    backend = tokenizers.Tokenizer(_model(proto, known["additional_special_tokens"], file))
    added = [(p.piece, p.type == p.CONTROL) for p in pieces if p.type in (p.CONTROL, p.USER_DEFINED)]
    backend.add_tokens([AddedToken(piece, normalized=False, special=special) for piece, special in added])
    prefix = settings.get("add_prefix_space")
    prefix = spec.add_dummy_prefix if prefix is None else prefix
    _set_space_handling(backend, spec, prefix, settings.get("legacy", kind == "T5"))
    begin, end = (
        settings.get(f"add_{name}_token", usual)
        for name, usual in zip(("bos", "eos"), ADDED_ENDS[kind], strict=True)
    )
    token = {**known, **{k: _text(v) for k, v in settings.items() if k in ("bos_token", "eos_token") and v}}
    _set_template(backend, token["bos_token"] if begin else None, token["eos_token"] if end else None)
    return TokenizerParts(backend, known)


def _set_space_handling(backend: tokenizers.Tokenizer, spec, prefix: bool, everywhere: bool) -> None:
    """Set the normalizer and the decoder of a SentencePiece model.

    Args:
      backend: the tokenizer to change.
      spec: the `NormalizerSpec` of the model.
      prefix: add a space before the text.
      everywhere: also add it after each special token (the `legacy` behaviour).
    """
    # In the order of SentencePiece's normalization.
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix and everywhere:  # each segment between special tokens is normalized separately
        steps.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if prefix and not everywhere:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first", split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _read_proto(file: epath.Path):
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise InputError(
            f"{file} requires the package sentencepiece, which is not installed: "
            'pip install "attnlab[sentencepiece]"'
        ) from error
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    data = untrusted.read_bytes(file, MODEL_BYTES)
    try:
        proto.ParseFromString(data)
    except Exception as error:  # exception types depend on the protobuf implementation
        raise InputError(f"{file} cannot be read as a SentencePiece model: {error}") from error
    if any(len(piece.piece) > MAX_PIECE for piece in proto.pieces):
        raise InputError(f"{file} has a piece of more than {MAX_PIECE} characters")
    return proto


def _model(proto, added: Sequence[str], file: epath.Path) -> models.Model:
    """Return the `tokenizers` model of a SentencePiece model, with added tokens at the end."""
    spec = proto.trainer_spec
    scored = [(p.piece, p.score) for p in proto.pieces] + [(token, 0.0) for token in added]
    if spec.model_type == spec.UNIGRAM:
        return models.Unigram(scored, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    if spec.model_type != spec.BPE:
        raise InputError(f"{file} is a word or character model; only unigram and BPE models are supported")
    return models.BPE(
        vocab={piece: number for number, (piece, _) in enumerate(scored)},
        merges=_merges({p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}),
        unk_token=spec.unk_piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
    )


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return all pairs of pieces whose concatenation is a piece, by falling score of that piece."""
    ranked = []
    for number, (piece, score) in enumerate(scores.items()):
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        ranked += [(-score, number, pair) for pair in splits if pair[0] in scores and pair[1] in scores]
    return [pair for *_, pair in sorted(ranked)]


def _marian(file: epath.Path, kind: str, settings: TokenizerConfig) -> TokenizerParts:
    """Build Marian's tokenizer: a SentencePiece model per language and a joint `vocab.json`."""
    if kind != "Marian":
        raise _unsupported(file, kind, ("Marian",))
    if settings.get("separate_vocabs"):
        raise InputError(f"{file.parent}: separate_vocabs=True is not supported, only a joint vocab.json")
    known = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    vocabulary = read_vocabulary(file.parent / "vocab.json")
    unknown = _text(settings.get("unk_token") or known["unk_token"])
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown))
    around = decoders.Replace(Regex(r"\A\s+|\s+\z"), "")
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), around])
    return TokenizerParts(
        backend, known, (_piece_tokenizer(file), _piece_tokenizer(file.parent / "target.spm"))
    )


def _piece_tokenizer(file: epath.Path) -> tokenizers.Tokenizer:
    """Return a tokenizer into the pieces of a model; text never yields control pieces."""
    proto = _read_proto(file)
    for number, piece in enumerate(proto.pieces):
        if piece.type == piece.CONTROL:
            piece.piece = f"\uffff{number}"  # not a valid character, so no text contains it
    backend = tokenizers.Tokenizer(_model(proto, (), file))
    own = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in own])
    _set_space_handling(backend, proto.normalizer_spec, proto.normalizer_spec.add_dummy_prefix, True)
    return backend


# WordPiece and byte-level BPE ---------------------------------------------------------------


def _word_piece(file: epath.Path, kind: str, settings: TokenizerConfig) -> TokenizerParts:
    """Build BERT's WordPiece tokenizer, with [CLS] and [SEP] (arXiv 1810.04805, section 3)."""
    if kind not in BERT_CLASSES:
        raise _unsupported(file, kind, BERT_CLASSES)
    known = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    token = {k: _text(settings.get(k) or v) for k, v in known.items()}
    vocabulary = {word: number for number, word in enumerate(_lines(untrusted.read_text(file)))}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=token["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    _set_template(backend, token["cls_token"], token["sep_token"])
    return TokenizerParts(backend, known)


def _byte_level(file: epath.Path, kind: str, settings: TokenizerConfig) -> TokenizerParts:
    """Build a byte-level BPE tokenizer from `vocab.json` and `merges.txt`."""
    makers: dict[str, Callable[..., TokenizerParts]] = {
        "GPT2": _gpt2,
        "Roberta": _roberta,
        "Bart": _roberta,
        "CLIP": _clip,
    }
    if kind not in makers:
        raise _unsupported(file, kind, tuple(makers))
    vocabulary = read_vocabulary(file.parent / "vocab.json")
    lines = _lines(untrusted.read_text(file))
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return makers[kind](vocabulary, merges, settings)


def _gpt2(vocabulary, merges, settings: TokenizerConfig) -> TokenizerParts:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
    backend.decoder = decoders.ByteLevel()
    return TokenizerParts(backend, dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"))


def _roberta(vocabulary, merges, settings: TokenizerConfig) -> TokenizerParts:
    backend = _gpt2(vocabulary, merges, settings).backend
    known = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    known |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    token = {k: _text(settings.get(k) or v) for k, v in known.items()}
    first, last = token["cls_token"], token["sep_token"]
    ends = (last, _id(vocabulary, last)), (first, _id(vocabulary, first))
    backend.post_processor = processors.RobertaProcessing(
        *ends, True, settings.get("add_prefix_space", False)
    )
    return TokenizerParts(backend, known)


def _clip(vocabulary, merges, settings: TokenizerConfig) -> TokenizerParts:
    """Build CLIP's tokenizer: lower case, with an end-of-word suffix on each word's last token."""
    known = {"bos_token": "<|startoftext|>"}
    known |= dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    token = {k: _text(settings.get(k) or v) for k, v in known.items()}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=token["unk_token"],
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    first, last = token["bos_token"], token["eos_token"]
    ends = (last, _id(vocabulary, last)), (first, _id(vocabulary, first))
    backend.post_processor = processors.RobertaProcessing(*ends, False, False)
    return TokenizerParts(backend, known)
