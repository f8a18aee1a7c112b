"""Text to token ids and back, with the checkpoint's own tokenizer.json."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tokenizers

from janus_server.errors import CheckpointError
from janus_server.input_file import is_there, read_file

_FILE = "tokenizer.json"
_MAX_BYTES = 2**28
"""Several times the largest that is known."""
_NUM_THREADS = 2
_MAX_UNFINISHED = 64
"""Tokens that may wait to become text; more are taken for what they are, if only to be shown."""


def load_tokenizer(checkpoint: Path) -> "Tokenizer | None":
    """The tokenizer of a model folder; None where it has none, and token ids alone are served."""
    path = checkpoint / _FILE
    return Tokenizer(path) if is_there(path) else None


def check_tokenizer(checkpoint: Path) -> None:
    """Refuse a model folder whose tokenizer cannot be used; raises CheckpointError.

    Reads all of it, which takes under half a second with the largest vocabularies.
    """
    path = checkpoint / _FILE
    if is_there(path):
        _read(path)


class Tokenizer:
    """The tokenizer of a checkpoint; `close` it."""

    def __init__(self, path: Path) -> None:
        """Read tokenizer.json at `path`; raises CheckpointError where it is unusable."""
        self._tokenizer = _read(path)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokenizer")

    async def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, off the event loop: a long text takes long."""
        loop = asyncio.get_running_loop()
        encoding = await loop.run_in_executor(self._threads, self._tokenizer.encode, text)
        ids: list[int] = encoding.ids
        return ids

    def detokenizer(self) -> "Detokenizer":
        """A detokenizer for one stream."""
        return Detokenizer(self._tokenizer)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)


def _read(path: Path) -> tokenizers.Tokenizer:
    content = read_file(path, CheckpointError, max_bytes=_MAX_BYTES)
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is not a usable tokenizer: {error}") from None


class Detokenizer:
    """Turns the token ids of one stream into text, piece by piece.

    Never emits half of a character, unless _MAX_UNFINISHED tokens make no whole one; all pieces
    together are the decoding of all ids.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Decoding a token can depend on the one before (a leading space), so the last emitted
        # tokens are decoded again as context of the new ones.
        self._context: list[int] = []
        self._unfinished: list[int] = []

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text that these ids completed."""
        self._unfinished += token_ids
        return self._emit(finish=False)

    def finish(self) -> str:
        """What is left, broken characters included."""
        return self._emit(finish=True)

    def _emit(self, *, finish: bool) -> str:
        if not self._unfinished:
            return ""
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._unfinished)
        is_whole = len(text) > len(before) and not text.endswith("\ufffd")
        if not (is_whole or finish or len(self._unfinished) > _MAX_UNFINISHED):
            return ""
        if len(text) > len(before):
            self._context = self._unfinished
        self._unfinished = []
        return text[len(before) :]
