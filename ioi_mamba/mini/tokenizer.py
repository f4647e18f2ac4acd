"""The tokenizer of `mini`: whole words, and bytes for whatever is not one of them.

Text is cut into words (each with the space before it), numbers and single punctuation marks; each piece is
then matched greedily, longest vocabulary entry first. A word of the vocabulary is one token, any other falls
apart: the vocabulary holds "After", "wards", "Fri" and "ends" but not "Afterwards" or "Friends", which gives
the paper's prompts the token boundaries they have in GPT-NeoX. All 256 byte values are entries too, so that
no text is unknown and decoding gives back exactly what was encoded.

As in GPT-NeoX, entries are spelled with the byte-level alphabet (a leading space is "Ġ"), "<|endoftext|>" is
id 0 and serves as BOS, EOS and padding, and nothing is added to a text: whoever wants a BOS prepends it.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

# Cut after 64 letters or digits, because matching takes time quadratic in the length, and because beyond
# LONGEST_PIECE bytes a piece would be unknown.
PIECE = r" ?\p{L}{1,64}| ?\p{N}{1,64}|[^\s\p{L}\p{N}]|\s"
LONGEST_PIECE = 1 + 64 * 4


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is "<|endoftext|>", the 256 byte values and `words`, in this order.

    words: entries as they stand in a text, with their leading space where they have one; repeats are ignored.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def spelled(word: str) -> str:
        return "".join(piece for piece, _ in byte_level.pre_tokenize_str(word))

    entries = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map(spelled, words)]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(
        models.WordPiece(
            vocabulary,
            unk_token=END_OF_TEXT,
            continuing_subword_prefix="",
            max_input_chars_per_word=LONGEST_PIECE,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECE), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
