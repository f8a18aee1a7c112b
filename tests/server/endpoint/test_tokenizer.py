import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from janus_server.endpoint.tokenizer import MAX_WAITING_CHARS, Detokenizer, Tokenizer
from janus_server.endpoint.tokenizer_file import read_tokenizer
from janus_server.errors import (
    CheckpointError,
    InvalidRequestError,
    OverloadedError,
    RequestFailedError,
)
from tests.fakes.checkpoints import save_tokenizer

TEXT = """Der Löwe 🦁 trifft 東京 und 👩‍👩‍👧‍👦; naïve café — “quoted”.
    def f(x):\n\treturn x ** 2  # ∀x∈∅
Привет, мир! 🏳️‍🌈 नमस्ते \ufffd is itself a character. ok"""


def trained() -> Library:
    """A byte-level BPE with merges inside and across words, and a special token."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    library.train_from_iterator([TEXT] * 3, trainer)
    return library


def with_metaspace() -> Library:
    """Decodes as SentencePiece models do: the space before a word depends on the token before."""
    words = ["▁", "▁one", "▁two", "th", "ree", "<0xF0>", "<0x9F>", "<0xA6>", "<0x81>"]
    library = Library(models.BPE({word: i for i, word in enumerate(words)}, merges=[]))
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens(["<s>"])
    return library


BYTE_LEVEL = trained()
METASPACE = with_metaspace()


def stream(library: Library, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(library)
    return [*(detokenizer.feed([token_id]) for token_id in token_ids), detokenizer.finish()]


def any_length(length: int) -> None:
    assert length > 0


@pytest.fixture
def tokenizer(tmp_path: Path) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer(read_tokenizer(save_tokenizer(tmp_path, BYTE_LEVEL)))
    yield tokenizer
    tokenizer.close()


def test_a_text_with_too_many_tokens_is_refused_before_they_are_listed(
    tokenizer: Tokenizer,
) -> None:
    def refuse(length: int) -> None:
        raise InvalidRequestError(f"{length} tokens")

    with pytest.raises(InvalidRequestError, match=r"^\d+ tokens$"):
        asyncio.run(tokenizer.encode(TEXT, refuse))


def test_short_texts_do_not_wait_for_long_ones(tokenizer: Tokenizer) -> None:
    async def check() -> None:
        long_is_checked = threading.Event()
        short_is_done = threading.Event()

        def wait(length: int) -> None:
            long_is_checked.set()
            assert short_is_done.wait(20)

        long = [asyncio.create_task(tokenizer.encode("x" * 20_000, wait)) for _ in range(3)]
        while not long_is_checked.is_set():
            await asyncio.sleep(0.005)
        assert await tokenizer.encode("x", any_length)
        short_is_done.set()
        for encoded in await asyncio.gather(*long):
            assert encoded

    asyncio.run(check())


def test_a_text_that_waits_for_too_long(tmp_path: Path) -> None:
    tokenizer = Tokenizer(read_tokenizer(save_tokenizer(tmp_path, BYTE_LEVEL)), timeout_s=0.01)
    given_up = threading.Event()

    def wait(length: int) -> None:
        assert given_up.wait(20)

    with pytest.raises(OverloadedError, match=r"the prompt waited for 0\.01 s to be tokenized"):
        asyncio.run(tokenizer.encode("x", wait))
    given_up.set()
    tokenizer.close()


def test_texts_that_wait_are_bounded(tokenizer: Tokenizer) -> None:
    async def check() -> None:
        refused = threading.Event()

        def wait(length: int) -> None:
            assert refused.wait(20)

        text = "word " * (MAX_WAITING_CHARS // 5 // 64)
        waiting = [asyncio.create_task(tokenizer.encode(text, wait)) for _ in range(64)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="characters of other prompts wait to be token"):
            await tokenizer.encode(text, wait)
        for task in waiting:
            task.cancel()
        refused.set()
        await asyncio.wait(waiting)
        assert await tokenizer.encode("x", any_length)

    asyncio.run(check())


def test_text_comes_back_in_whole_characters(tokenizer: Tokenizer) -> None:
    token_ids = asyncio.run(tokenizer.encode(TEXT, any_length))
    assert len(token_ids) > 100
    pieces = stream(BYTE_LEVEL, token_ids)
    assert "".join(pieces) == TEXT
    # Only the replacement character that is in the text itself is ever shown.
    assert "".join(pieces[:-1]).count("\ufffd") == 1
    assert pieces[-1] == ""


def test_an_emoji_waits_for_its_last_byte() -> None:
    token_ids = BYTE_LEVEL.encode("🐙").ids
    assert len(token_ids) > 1
    assert stream(BYTE_LEVEL, token_ids) == [*[""] * (len(token_ids) - 1), "🐙", ""]
    assert stream(BYTE_LEVEL, token_ids[:-1])[-1].startswith("\ufffd")


@given(st.text(max_size=30))
def test_any_text_comes_back(text: str) -> None:
    assert "".join(stream(BYTE_LEVEL, BYTE_LEVEL.encode(text).ids)) == text


# Some ids are beyond the vocabulary, as in models whose embedding is padded.
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=40))
def test_deltas_are_the_decoding_of_all_ids(token_ids: list[int]) -> None:
    assert "".join(stream(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids)


# Words, a special and an unknown token, and an emoji of four byte tokens.
@given(st.lists(st.sampled_from([[0], [1], [2], [3], [4], [9], [99], [5, 6, 7, 8]]), max_size=40))
def test_deltas_of_a_metaspace_tokenizer(words: list[list[int]]) -> None:
    token_ids = [token_id for word in words for token_id in word]
    assert "".join(stream(METASPACE, token_ids)) == METASPACE.decode(token_ids)


class Counting:
    """Notes how many ids are decoded at once at most."""

    most = 0

    def decode(self, token_ids: list[int]) -> str:
        self.most = max(self.most, len(token_ids))
        return BYTE_LEVEL.decode(token_ids)


@pytest.mark.parametrize("token_id", [0, 10_000], ids=["special", "unknown"])
def test_ids_without_text_do_not_pile_up(token_id: int) -> None:
    counting = Counting()
    detokenizer = Detokenizer(counting)
    assert detokenizer.feed(BYTE_LEVEL.encode("on").ids) == "on"
    for _ in range(500):
        assert detokenizer.feed([token_id]) == ""
    assert detokenizer.feed(BYTE_LEVEL.encode(" and").ids) == " and"
    assert counting.most < 100


def test_endless_halves_of_characters_are_shown_at_last() -> None:
    half = BYTE_LEVEL.encode("🐙").ids[:1]
    pieces = stream(BYTE_LEVEL, half * 200)
    assert "".join(pieces) == "\ufffd" * 200
    assert max(map(len, pieces)) < 100


@pytest.mark.parametrize("num_halves", range(58, 72))
@pytest.mark.parametrize("character", ["é", "€", "🐙"])
def test_a_character_after_endless_halves_is_whole(num_halves: int, character: str) -> None:
    half = BYTE_LEVEL.encode("🐙").ids[:1]
    token_ids = half * num_halves + [i for c in character * 2 for i in BYTE_LEVEL.encode(c).ids]
    pieces = stream(BYTE_LEVEL, token_ids)
    assert "".join(pieces) == BYTE_LEVEL.decode(token_ids)
    assert "".join(pieces).endswith(character * 2)


def test_a_whole_delta_at_once(tokenizer: Tokenizer) -> None:
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.feed(BYTE_LEVEL.encode(TEXT).ids) == TEXT
    assert detokenizer.finish() == ""


def test_a_panic_of_the_library_fails_the_request() -> None:
    library = Library(models.BPE({"a": 0}, merges=[]))
    library.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 0, 9)])
    with pytest.raises(RequestFailedError, match="the tokenizer failed at the text"):
        Detokenizer(library).feed([0])


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_a_broken_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a usable tokenizer") as raised:
        read_tokenizer(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read_tokenizer(tmp_path / "tokenizer.json")
