"""Small tokenizers of every kind that a checkpoint may come with, each knowing the words it is given.

Each is made of `words` (as they stand in a text) and knows single letters too, so that no text is unknown.
"""

import string

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = [*string.ascii_letters, *string.digits, *",.'\u0301éÉ"]


def _fast(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _unigram(pieces):
    scores = {"<unk>": -100.0, "<s>": 0.0, "</s>": 0.0}
    scores |= dict.fromkeys(["\u2581", *LETTERS], -50.0) | dict.fromkeys(pieces, -1.0)
    return Tokenizer(models.Unigram(list(scores.items()), unk_id=0))


def prepend_replace(words, inside=()):
    """Llama: a normaliser puts a mark in front of every text and makes one of every space. inside: pieces without one."""
    tokenizer = _unigram([f"\u2581{word}" for word in words] + list(inside))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Metaspace()
    return _fast(tokenizer)


def metaspace(scheme):
    """SentencePiece Unigram, the mark in front of "first" or "always" every piece of text, or "never"."""

    def build(words):
        tokenizer = _unigram([f"\u2581{word}" for word in words])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
        return _fast(tokenizer)

    return build


def without_accents(words):
    """ALBERT: SentencePiece after taking accents and capitals away."""
    normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    tokenizer = _unigram([f"\u2581{normalizer.normalize_str(word)}" for word in words])
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _fast(tokenizer)


def byte_fallback(words):
    """Llama 2: merges of a whole text whose spaces are marks, bytes for letters it does not know."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *LETTERS[:-2]]
    merges = []
    for word in words:
        spelled = f"\u2581{word}"
        # A letter that is only bytes cannot be merged: it is an entry here.
        vocabulary += [letter for letter in spelled if letter not in vocabulary]
        for k in range(1, len(spelled)):
            merges.append((spelled[:k], spelled[k]))
            vocabulary.append(spelled[: k + 1])
    ids = {piece: index for index, piece in enumerate(dict.fromkeys(vocabulary))}
    bpe = models.BPE(ids, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _fast(tokenizer)


def byte_level(add_prefix_space, trim_offsets=True):
    """GPT-2 and RoBERTa: bytes, merged into words with the space before them."""

    def build(words):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        merges, vocabulary = [], ["<unk>", "<s>", "</s>", *letters]
        for word in words:
            spelled = "".join(piece for piece, _ in split.pre_tokenize_str(f" {word}"))
            for k in range(1, len(spelled)):
                merges.append((spelled[:k], spelled[k]))
                vocabulary.append(spelled[: k + 1])
        ids = {piece: index for index, piece in enumerate(dict.fromkeys(vocabulary))}
        tokenizer = Tokenizer(models.BPE(ids, list(dict.fromkeys(merges)), unk_token="<unk>"))
        # No regex of GPT-2's: a word is a space and what follows it, digits are single.
        cut = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| |[^\s\p{L}\p{N}]"), "isolated")
        space = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)
        tokenizer.pre_tokenizer = space if add_prefix_space else pre_tokenizers.Sequence([cut, split])
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
        tokenizer.decoder = decoders.ByteLevel()
        return _fast(tokenizer)

    return build


def word_piece(normalizer):
    """BERT: lower case without accents or not, pieces that go on are spelled with ##."""

    def build(words):
        normal = [normalizer.normalize_str(word) for word in words]
        entries = ["<unk>", "<s>", "</s>", *normal, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
        ids = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return _fast(tokenizer)

    return build


def adds_bos(words):
    """A tokenizer that puts BOS in front and EOS at the end of what it is given."""
    tokenizer = metaspace("first")(words)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


KINDS = {
    "prepend and replace": prepend_replace,
    "metaspace first": metaspace("first"),
    "metaspace always": metaspace("always"),
    "metaspace never": metaspace("never"),
    "without accents": without_accents,
    "byte fallback": byte_fallback,
    "bytes": byte_level(False),
    "bytes, spaces in spans": byte_level(False, trim_offsets=False),
    "bytes, prefix space": byte_level(True),
    "word piece, lower case": word_piece(normalizers.BertNormalizer(lowercase=True)),
    "word piece, NFKC": word_piece(normalizers.Sequence([normalizers.NFKC()])),
    "word piece, NFD": word_piece(normalizers.NFD()),
    "adds BOS": adds_bos,
}
