"""Text tokenizers: padding, cutting, and the published vocabulary."""

import json
from pathlib import Path

import pytest

from dicode.config import CheckpointError
from dicode.lm.text import TextTokenizer

CAPTIONS = ["a swirling ice vortex", "a fireball", "arcane curse", "Water burst!"] * 3


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, 320)


def test_texts_are_padded_on_the_right_and_spell_what_was_said(text: TextTokenizer) -> None:
    ids = text.encode(["a fireball", "arcane curse"], 9)
    assert ids.shape == (2, 9)
    row = ids[0].tolist()
    assert row[-1] == text.pad_id == 0 and row[0] != text.pad_id
    assert text.tokenizer.decode([i for i in row if i != text.pad_id]).strip() == "a fireball"


def test_case_and_white_space_change_nothing(text: TextTokenizer) -> None:
    plain, odd = text.encode(["ice vortex", "  ICE \n Vortex "], 12)
    assert plain.tolist() == odd.tolist()


def test_empty_text_is_all_padding(text: TextTokenizer) -> None:
    assert text.encode(["", "   "], 5).tolist() == [[text.pad_id] * 5] * 2


def test_any_language_encodes_without_an_unknown_entry(text: TextTokenizer) -> None:
    row = text.encode(["огонь 火 🔥"], 40)[0].tolist()
    assert text.tokenizer.decode([i for i in row if i != text.pad_id]).strip() == "огонь 火 🔥"


def test_cut_texts_are_counted_in_a_warning(text: TextTokenizer) -> None:
    with pytest.warns(UserWarning, match="2 of 3 texts are longer than the model's 4 text tokens"):
        ids = text.encode(["a swirling ice vortex " * 3, "fireball " * 9, "a"], 4)
    assert ids.shape == (3, 4)


def test_spelling_a_special_entry_in_a_prompt_does_not_produce_it(text: TextTokenizer, tmp_path: Path) -> None:
    text.save(tmp_path)
    for tokenizer in (text, TextTokenizer.load(tmp_path)):
        ids = tokenizer.encode(["an <img> of <pad>"], 30)[0].tolist()
        assert tokenizer.begin_id not in ids
        assert tokenizer.pad_id not in ids[: len(ids) - ids[::-1].index(next(i for i in ids[::-1] if i != 0))]


def test_saved_tokenizer_loads_as_the_same(text: TextTokenizer, tmp_path: Path) -> None:
    text.save(tmp_path)
    again = TextTokenizer.load(tmp_path)
    assert again.encode(CAPTIONS, 12).tolist() == text.encode(CAPTIONS, 12).tolist()
    assert (again.pad_id, again.begin_id, again.vocab_size) == (text.pad_id, text.begin_id, text.vocab_size)


def test_missing_and_damaged_files_name_their_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextTokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"vocab\.json and merges\.txt"):
        TextTokenizer.gpt2(tmp_path)


def test_a_vocabulary_that_drops_letters_or_has_ids_beyond_the_model_is_refused(
    text: TextTokenizer, tmp_path: Path
) -> None:
    text.save(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    for held, said in (
        ({}, "got 2 entries.*26 letters"),
        ({"<pad>": 0, "<img>": 1, "a": 2}, "got 3 entries, none for b, c, d"),
    ):
        values["model"] |= {"vocab": held, "merges": []}
        (tmp_path / "tokenizer.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=rf"tokenizer\.json: expected entries for all letters, {said}"):
            TextTokenizer.load(tmp_path)
    values["model"]["vocab"] = {**vocabulary, "zz": 99_999}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert TextTokenizer.load(tmp_path).vocab_size == 100_000  # which no model of 320 takes


@pytest.mark.parametrize(("vocab", "merges"), [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_vocabulary_merges_by_rank_and_appends_the_published_entries(
    tmp_path: Path, vocab: str, merges: str
) -> None:
    entries = ["h", "o", "t", "i", "c", "e", "Ġ", "ic", "ho", "hot", "Ġic", "Ġice", "<|endoftext|>"]
    (tmp_path / vocab).write_text(json.dumps({entry: i for i, entry in enumerate(entries)}), encoding="utf-8")
    (tmp_path / merges).write_text("#version: 0.2\ni c\nh o\nho t\nĠ ic\nĠic e\n", encoding="utf-8")
    text = TextTokenizer.gpt2(tmp_path)
    assert (text.pad_id, text.begin_id, text.vocab_size) == (12, 14, 13 + 66)
    assert text.encode(["hot ice"], 4).tolist() == [[9, 11, 12, 12]]
    assert text.tokenizer.token_to_id("<img_00063>") == 12 + 66
