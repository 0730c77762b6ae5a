"""Captions and prompts as token ids: byte-level pair encoding, padded on the right to one length."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_lowercase

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dicode.config import CheckpointError
from dicode.shapes import TextIds

FILE = "tokenizer.json"
PAD, BEGIN = "<pad>", "<img>"
GPT2_PAD, LLAMA_PAD = "<|endoftext|>", "<|end_of_text|>"
PADS = (PAD, GPT2_PAD, LLAMA_PAD)
# The published vocabulary adds these to GPT-2's, in this order (ids 50,257 …); only `<img>` is used.
IMAGE_ENTRIES = ["</img>", BEGIN, *(f"<img_{i:05d}>" for i in range(64))]


class TextTokenizer:
    """A `tokenizers.Tokenizer` with padding and begin-of-image entries. Empty text is all padding: the null prompt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        pad_id = next((i for i in map(tokenizer.token_to_id, PADS) if i is not None), None)
        begin_id = tokenizer.token_to_id(BEGIN)
        if pad_id is None or begin_id is None:
            raise CheckpointError(f"text tokenizer: expected entries {PAD!r} (or one of {PADS[1:]}) and {BEGIN!r}")
        tokenizer.encode_special_tokens = True  # a prompt that spells "<img>" is text like any other
        self.tokenizer, self.pad_id, self.begin_id = tokenizer, pad_id, begin_id
        self.vocab_size = 1 + max(tokenizer.get_vocab().values())  # rows of an embedding, for the special ones too

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "TextTokenizer":
        """Learn pairs from captions, lower-cased and NFKC-normalised; few captions may fill fewer than `vocab_size`."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, BEGIN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer)

    @classmethod
    def gpt2(cls, folder: Path) -> "TextTokenizer":
        """GPT-2's vocabulary from `vocab.json` and `merges.txt` (or `encoder.json` and `vocab.bpe`), plus the published
        entries for images. Padding is GPT-2's end of text."""
        pairs = [[folder / n for n in names] for names in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))]
        found = next((pair for pair in pairs if all(path.is_file() for path in pair)), None)
        if found is None:
            raise CheckpointError(f"{folder}: expected vocab.json and merges.txt, or encoder.json and vocab.bpe")
        tokenizer = Tokenizer(models.BPE.from_file(*map(str, found)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([GPT2_PAD, *IMAGE_ENTRIES])
        return cls(tokenizer)

    @classmethod
    def from_pretrained(cls, folder: Path) -> "TextTokenizer":
        """GPT-2's or Llama's vocabulary from a folder of `transformers`, plus the published entries for images.

        Nothing is put around a text, not even Llama's begin of text, so that empty text stays all padding.
        """
        if not (folder / FILE).is_file():
            return cls.gpt2(folder)
        tokenizer = _read(folder / FILE)
        tokenizer.post_processor = None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if tokenizer.token_to_id(BEGIN) is None:
            tokenizer.add_special_tokens(IMAGE_ENTRIES)
        return cls(tokenizer)

    @classmethod
    def load(cls, folder: Path) -> "TextTokenizer":
        """Read `tokenizer.json` of a checkpoint folder. Raises `CheckpointError` where it drops letters of texts."""
        text = cls(_read(folder / FILE))
        if lost := [letter for letter in ascii_lowercase if not text.tokenizer.encode(letter).ids]:
            found = f"got {text.vocab_size} entries, none for {', '.join(lost[:3])} ({len(lost)} letters)"
            raise CheckpointError(f"{folder / FILE}: expected entries for all letters, {found}; copy it again")
        return text

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into a checkpoint folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / FILE), pretty=False)

    def encode(self, texts: Sequence[str], length: int) -> TextIds:
        """Ids padded on the right to `length`. Texts that are longer lose their end, and a warning says how many."""
        encoded = [e.ids for e in self.tokenizer.encode_batch([" ".join(text.split()) for text in texts])]
        cut = [i for i, ids in enumerate(encoded) if len(ids) > length]
        if cut:
            warnings.warn(
                f"{len(cut)} of {len(texts)} texts are longer than the model's {length} text tokens and lose their "
                f"end; the first has {len(encoded[cut[0]])}: {texts[cut[0]][:60]!r}…",
                stacklevel=2,
            )
        rows = [(ids + [self.pad_id] * length)[:length] for ids in encoded]
        return torch.tensor(rows, dtype=torch.long).view(len(texts), length)


def _read(path: Path) -> Tokenizer:
    if not path.is_file():
        found = "a folder, pipe or device" if path.exists() else "no such file"
        raise CheckpointError(f"{path}: {found}; expected a text tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception for a missing and for a damaged file
        raise CheckpointError(f"{path}: not a readable text tokenizer ({error})") from error
