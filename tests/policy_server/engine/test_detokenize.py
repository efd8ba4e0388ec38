from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from policy_server.engine.detokenize import IncrementalText, StopStrings, TokenDecoder
from tests.support.models import make_byte_tokenizer

PIECES = ["▁the", "▁", "s", "▁film", "▁is", "é", "good", ",", "▁▁", "\n"]


def _byte_symbols() -> dict[int, str]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for 256, 257, … in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def byte_level() -> TokenDecoder:
    return TokenDecoder(make_byte_tokenizer())


def byte_pairs() -> TokenDecoder:
    """Byte-level with tokens of several bytes, whole and broken characters among them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbol = _byte_symbols()
    merges = [(0xC3, 0xA9), (0xE2, 0x82), (0x20, 0x61), (0x61, 0xE2), (0xAC, 0x20), (0xF0, 0x9F)]
    pairs = [(symbol[a], symbol[b]) for a, b in merges]
    vocab = {text: index for index, text in enumerate([*alphabet, *("".join(pair) for pair in pairs)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.decoder = decoders.ByteLevel()
    return TokenDecoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"))


def sentencepiece_like() -> TokenDecoder:
    """Words with a leading space that is lost at the very start, and byte tokens for the rest (as Llama 2 decodes)."""
    names = ["<unk>", *PIECES, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return TokenDecoder(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>"))


DECODERS = {"byte_level": byte_level(), "byte_pairs": byte_pairs(), "sentencepiece_like": sentencepiece_like()}
SIZES = {"byte_level": 257, "byte_pairs": 263, "sentencepiece_like": 268}


def streamed(decoder: TokenDecoder, ids: Sequence[int], cuts: Sequence[int]) -> list[str]:
    text = IncrementalText(decoder)
    pieces = []
    start = 0
    for size in cuts:
        pieces.append(text.push(ids[start : start + size]))
        start += size
    pieces.append(text.push(ids[start:]))
    return [*pieces, text.finish()]


@pytest.mark.parametrize("kind", sorted(DECODERS))
@given(data=st.data())
def test_pieces_add_up_to_the_whole_decoding(kind: str, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, SIZES[kind] - 1), max_size=80))
    cuts = data.draw(st.lists(st.integers(1, 5), max_size=80))
    assert "".join(streamed(DECODERS[kind], ids, cuts)) == DECODERS[kind](ids)


@given(text=st.text(max_size=40), cuts=st.lists(st.integers(1, 3), max_size=60))
def test_whole_characters_come_as_soon_as_they_are_whole(text: str, cuts: list[int]) -> None:
    tokenizer = make_byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = streamed(DECODERS["byte_level"], ids, cuts)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_is_never_given_out_in_part() -> None:
    text = IncrementalText(byte_level())
    ids = make_byte_tokenizer()("a€b")["input_ids"]
    assert [text.push([token]) for token in ids] == ["a", "", "", "€", "b"]
    assert text.finish() == ""


def test_a_character_that_stays_incomplete_ends_as_one_replacement() -> None:
    text = IncrementalText(byte_level())
    ids = make_byte_tokenizer()("a€")["input_ids"]
    assert text.push(ids[:-1]) == "a"
    assert text.finish() == "\ufffd"


def test_special_tokens_have_no_text_and_lose_no_space() -> None:
    decoder = DECODERS["sentencepiece_like"]
    ids = [1, 267, 4, 267, 267, 5]  # ▁the <s> ▁film <s> <s> ▁is
    assert "".join(streamed(decoder, ids, [1] * 5)) == "the film is"


def test_a_long_run_of_ill_formed_bytes_keeps_the_window_short() -> None:
    decoder = byte_level()
    longest = 0

    class Measured(TokenDecoder):
        def __init__(self) -> None:
            self.byte_token_ids = self.skipped_token_ids = frozenset()

        def __call__(self, token_ids: Sequence[int]) -> str:
            nonlocal longest
            longest = max(longest, len(token_ids))
            return decoder(token_ids)

    text = IncrementalText(Measured())
    lone = make_byte_tokenizer()("é")["input_ids"][0]  # a first byte that no second follows
    pieces = [text.push([lone]) for _ in range(500)]
    assert longest < 200
    assert "".join(pieces) + text.finish() == "\ufffd" * 500


def by_character(text: str, stops: Sequence[str]) -> tuple[str, str]:
    """Text before the stop string that is complete first, the longest of several that end together."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, ""


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 5), max_size=40),
)
def test_stop_strings_cut_the_text_wherever_pieces_end(text: str, stops: list[str], cuts: list[int]) -> None:
    search = StopStrings(stops)
    shown = ""
    start = 0
    kept, found = by_character(text, stops)
    for size in [*cuts, len(text)]:
        shown += search.push(text[start : start + size])
        start += size
        assert kept.startswith(shown)
    assert (shown + search.finish(), search.found) == (kept, found)


def test_a_stop_string_of_byte_tokens_is_found_at_once() -> None:
    decoder = DECODERS["sentencepiece_like"]
    text, stops = IncrementalText(decoder), StopStrings(["\n\n"])
    newline = 1 + len(PIECES) + ord("\n")
    assert stops.push(text.push([1, newline])) == ""
    assert not stops.would_find(text.unsettled())
    assert stops.push(text.push([newline])) == ""
    assert stops.would_find(text.unsettled())
    assert (stops.push(text.finish()), stops.found) == ("the", "\n\n")


def test_text_that_may_become_a_stop_string_waits_and_comes_when_it_does_not() -> None:
    search = StopStrings(["END", "\n\n"])
    pieces = ["the E", "N", "GINE", "\n", "EN", "D!"]
    assert [search.push(piece) for piece in pieces] == ["the ", "", "ENGIN", "E", "\n", ""]
    assert (search.found, search.finish()) == ("END", "")


def test_text_before_counts_for_a_stop_string_but_is_not_shown() -> None:
    search = StopStrings(["END"], before="…EN")
    assert search.push("D of") == ""
    assert search.found == "END"
    other = StopStrings(["END"], before="…EN")
    assert other.push("TER") == "TER"
