"""Tokenizers of folders without a tokenizer.json, held against those of transformers and of SentencePiece."""

import json

import pytest
import tokenizers
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from attnlab.data import Tokenizer
from attnlab.pretrained import import_export

WORDS = "the cat sat on the mat because it was tired and then the naïve dog's 3 friends ran 42 miles home"
TEXTS = [WORDS, WORDS.title(), WORDS[::-1], "The  quick brown fox; isn't it? (Yes!) 12,345.67"] * 20
ODD = [
    "the cat sat", " the cat", "the  cat   sat ", "  ", "", "a", "The Cat's NAÏVE café", "naïve ﬁne ½ Ⅷ １２３",
    "日本語のテキスト", "emoji 🙂👩‍👩‍👧 x", "tab\tand\nnew\r\nlines\n\n", "x\u00a0y\u3000z\u200bw", "12345.678", "\u2581 under\u2581score",
    "don't they'll we've", "a\u0301 e\u0301", "Ωμέγα кот кошка", "!!!???...", "[UNK] [CLS] x",
]  # fmt: skip


def folder(path, model_type, settings=None, **more):
    """The small files of a checkpoint."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": model_type} | more))
    if settings is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return epath.Path(path)


def trained(path, kind, texts=TEXTS, **options):
    """A model of SentencePiece."""
    spm = pytest.importorskip("sentencepiece")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path.with_suffix("")), model_type=kind,
        hard_vocab_limit=False, minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    path.with_suffix(".model").rename(path)
    return spm.SentencePieceProcessor(model_file=str(path))


LLAMA = {
    "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True,
    "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
}  # fmt: skip
GEMMA = LLAMA | {
    "add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>",
    "bos_piece": "<bos>", "user_defined_symbols": ["<mask>", "<start_of_turn>", "\n", "\n\n"],
}  # fmt: skip
T5 = {"vocab_size": 150, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def same(ours, theirs, texts=ODD):
    for text in texts:
        assert ours.encode_document(text) == theirs(text)["input_ids"], text
        assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parity
def test_llama(tmp_path, legacy):
    (tmp_path / "llama").mkdir()
    peer = trained(tmp_path / "llama" / "tokenizer.model", "bpe", **LLAMA)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "chat_template": "{{ bos_token }}x"}
    ours = import_export.read_tokenizer(folder(tmp_path / "llama", "llama", settings))
    for text in ODD if legacy else [text for text in ODD if not text.startswith((" ", "\u2581"))]:
        assert ours.encode(text).tolist() == peer.encode(text), text
        assert ours.decode(peer.encode(text)) == text.replace("\u2581", " ")
    assert ours.encode_document("the") == ours.encode_prompt("the") == [1, *peer.encode("the")]
    assert (ours.eos_id, ours.bos_tokens, ours.encode_chat([])[0]) == (2, [1], 1)
    assert ours.token_bytes[peer.encode("é")].sum() == 3  # and a space before it


@pytest.mark.parametrize("name", ["llama", "gemma", "t5"])
@pytest.mark.parity
def test_sentencepiece_as_transformers_reads_it(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    options, file, kind = {
        "llama": (LLAMA, "tokenizer.model", "bpe"),
        "gemma": (GEMMA, "tokenizer.model", "bpe"),
        "t5": (T5, "spiece.model", "unigram"),
    }[name]
    path = tmp_path / name
    path.mkdir()
    trained(path / file, kind, **options)
    cls = {"llama": "LlamaTokenizer", "gemma": "GemmaTokenizer", "t5": "T5Tokenizer"}[name]
    settings = {"tokenizer_class": cls} | (
        {} if name == "t5" else {"add_bos_token": True, "add_eos_token": name == "llama"}
    )
    ours = import_export.read_tokenizer(folder(path, name, settings))
    theirs = getattr(transformers, cls).from_pretrained(path)
    same(ours, theirs)
    assert ours.vocab_size == len(theirs)


GERMAN = "die Katze saß auf der Matte weil sie müde war und dann rannte der Hund mit 3 Freunden nach Hause"
OPUS = {"vocab_size": 90, "bos_id": -1}
CODES = [">>deu<<", ">>fra<<"]


def opus(path):
    """The files of a translator's tokenizer: pieces of two languages, but a few, numbered together."""
    path = folder(path, "marian", {"source_lang": "eng", "target_lang": "deu"}, eos_token_id=0)
    pieces = {"</s>": 0, "<unk>": 1}
    for name, texts in {"source": TEXTS, "target": [GERMAN, GERMAN.title(), GERMAN[::-1]] * 20}.items():
        spm = trained(path / f"{name}.spm", "unigram", texts=texts, **OPUS)
        own = [spm.id_to_piece(i) for i in range(len(spm))]
        pieces |= {
            piece: len(pieces) + i
            for i, piece in enumerate(p for p in own if p not in {*pieces, "q", "R", "\u2581the"})
        }
    pieces |= {token: len(pieces) + i for i, token in enumerate([*CODES, "<pad>"])}
    (path / "vocab.json").write_text(json.dumps(pieces))
    return path


@pytest.fixture(scope="module")
def translators(tmp_path_factory):
    """Our tokenizer of such files, what a run keeps of it, and that of transformers."""
    transformers = pytest.importorskip("transformers")
    path = opus(tmp_path_factory.mktemp("opus"))
    ours = import_export.read_tokenizer(path)
    ours.save(tmp_path_factory.mktemp("run") / "tokenizer.json")
    kept = Tokenizer.load(tmp_path_factory.getbasetemp() / "run0" / "tokenizer.json")
    return ours, kept, transformers.MarianTokenizer.from_pretrained(path)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([*f"{WORDS} {GERMAN}".split(), *CODES, "  ", ">>", "<<"]), st.text(max_size=4)
        )
    )
)
@pytest.mark.parity
def test_marian(translators, words):
    """A source, a target, and the text of what is written."""
    *both, theirs = translators
    for text in (" ".join(words), "".join(words), *ODD):
        if any(token in text for token in theirs.all_special_tokens):
            continue  # of which there the text would be made, and here it has their letters
        for ours in both:
            source, target = theirs(text)["input_ids"], theirs(text_target=text)["input_ids"]
            assert ours.encode_source(text) == source, text
            assert ours.encode_document(text) == target and ours.encode(text).tolist() == target[:-1], text
            for ids in (source, target):
                assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parity
def test_marian_by_hand(translators, tmp_path, refuses):
    ours, _, theirs = translators
    assert (
        ours.encode_source(">>deu<< the cat")[0] == theirs.convert_tokens_to_ids(">>deu<<")
        and ours.bos_tokens == []
    )
    unknown = ours.encode_source("日")
    assert ours.encode_source("ß") != unknown and 1 in unknown  # the other language's is known
    assert (ours.eos_id, ours.decode(ours.encode_document(GERMAN))) == (0, GERMAN)
    assert ours.token_bytes[ours.encode_document("müde")].sum() == 6
    path = opus(tmp_path)
    folder(path, "marian", {"separate_vocabs": True})
    with refuses("separate_vocabs=True is not supported"):
        import_export.read_tokenizer(path)


BERT = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on mat ##s ##at a na ##ive dog ' s 3 ! ? . , 日 本 ca ##fe ##f ##e".split()


@pytest.mark.parametrize(
    "settings", [{}, {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False}]
)
@pytest.mark.parity
def test_word_pieces(tmp_path, settings):
    transformers = pytest.importorskip("transformers")
    path = folder(tmp_path, "bert", {"tokenizer_class": "BertTokenizer", **settings})
    (path / "vocab.txt").write_text("\n".join(BERT) + "\n")
    ours = import_export.read_tokenizer(path)
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    same(ours, theirs, [text for text in ODD if "[" not in text])
    assert ours.encode_document("the cats") == [2, 5, 6, 10, 3] and ours.encode_prompt("the cat") == [2, 5, 6]
    assert ours.decode(ours.encode_document("the cats")) == "the cats"


@pytest.mark.parametrize("name", ["GPT2", "Roberta", "CLIP"])
@pytest.mark.parity
def test_bytes(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    path = folder(tmp_path, {"GPT2": "gpt2", "Roberta": "roberta", "CLIP": "clip"}[name])
    special = {"GPT2": ["<|endoftext|>"], "Roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]}
    special["CLIP"] = ["<|startoftext|>", "<|endoftext|>"]
    ending = {"end_of_word_suffix": "</w>"} if name == "CLIP" else {}
    backend = tokenizers.Tokenizer(models.BPE(**ending))
    spaces = [pre_tokenizers.Whitespace()] if name == "CLIP" else []
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*spaces, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special[name], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **ending,
    )  # fmt: skip
    backend.train_from_iterator([t.lower() for t in TEXTS], trainer)
    backend.model.save(str(tmp_path))
    ours = import_export.read_tokenizer(path)
    same(ours, getattr(transformers, f"{name}Tokenizer").from_pretrained(tmp_path))
    if name != "CLIP":
        assert all(ours.decode(ours.encode_document(text)) == text for text in ODD)


def test_tokens_beyond_the_vocabulary_and_what_is_refused(tmp_path, refuses, monkeypatch):
    settings = {"added_tokens_decoder": {len(BERT): {"content": "[USER]", "special": True}}}
    path = folder(tmp_path / "bert", "bert", settings)
    (path / "vocab.txt").write_text("\n".join(BERT))
    ours = import_export.read_tokenizer(path)
    assert ours.vocab_size == len(BERT) + 1 and ours.token_bytes[-1] == 0
    (path / "added_tokens.json").write_text(json.dumps({"[OTHER]": len(BERT) + 2}))
    with refuses("the token [OTHER] is to be number"):
        import_export.read_tokenizer(path)
    folder(path, "bert", {"tokenizer_class": "MPNetTokenizer"})
    with refuses("vocab.txt: of a MPNetTokenizer only a tokenizer.json can be read; there are BertTokenizer"):
        import_export.read_tokenizer(path)
    path = folder(tmp_path / "llama", "llama")
    (path / "tokenizer.model").write_bytes(b"nothing")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with refuses(
        "tokenizer.model is read by the package sentencepiece", 'pip install "attnlab[sentencepiece]"'
    ):
        import_export.read_tokenizer(path)
