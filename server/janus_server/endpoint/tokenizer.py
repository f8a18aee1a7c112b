"""Text to token ids and back, with the checkpoint's own tokenizer.json."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import tokenizers

from janus_server.endpoint.tokenizer_file import checked_tokenizer
from janus_server.errors import OverloadedError, RequestFailedError
from janus_server.model.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

_SHORT_CHARS = 16 * 2**10
"""A text up to this size takes about 10 ms; the longest ones take seconds."""
MAX_WAITING_CHARS = 32 * 2**20
"""Characters of all prompts that wait for their token ids; more could not have them in time."""
ENCODE_TIMEOUT_S = 30.0
"""How long a prompt may wait for its token ids, behind others of its kind, in seconds."""
_MAX_UNFINISHED = 64
"""Tokens that may wait to become text; of more, the first are shown, broken as they are."""
_BROKEN = "\ufffd"
_MIN_WAITING = 8
"""Tokens that always go on waiting: a character has 4 bytes, and some tokens have none."""


def load_tokenizer(checkpoint: Checkpoint) -> "Tokenizer | None":
    """The tokenizer of a model folder; None where it has none, and token ids alone are served.

    Raises CheckpointError.
    """
    library = checked_tokenizer(checkpoint)
    return None if library is None else Tokenizer(library)


class Tokenizer:
    """The tokenizer of a checkpoint; `close` it."""

    def __init__(
        self, library: tokenizers.Tokenizer, *, timeout_s: float = ENCODE_TIMEOUT_S
    ) -> None:
        """`timeout_s` is how long `encode` may take, waiting included."""
        self._timeout_s = timeout_s
        self._num_waiting_chars = 0
        self._tokenizer = library
        # One thread for each kind, so that long texts, which are a client's choice, keep only each
        # other waiting.
        self._short, self._long = (
            ThreadPoolExecutor(1, thread_name_prefix=f"tokenizer of {kind} texts")
            for kind in ("short", "long")
        )

    async def encode(self, text: str, check_length: Callable[[int], None]) -> list[int]:
        """Token ids of a prompt, off the event loop.

        `check_length` is called with their number before there is a list of them, and raises what
        this raises where it is too large. Raises OverloadedError where too much
        waits already, and when this takes too long.
        """
        if self._num_waiting_chars and self._num_waiting_chars + len(text) > MAX_WAITING_CHARS:
            raise OverloadedError(
                f"{self._num_waiting_chars} characters of other prompts wait to be tokenized; try "
                "again later"
            )
        threads = self._short if len(text) <= _SHORT_CHARS else self._long
        loop = asyncio.get_running_loop()
        self._num_waiting_chars += len(text)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await loop.run_in_executor(threads, self._encode, text, check_length)
        except TimeoutError:
            raise OverloadedError(
                f"the prompt waited for {self._timeout_s:g} s to be tokenized; try again later"
            ) from None
        finally:
            self._num_waiting_chars -= len(text)

    def detokenizer(self) -> "Detokenizer":
        """A detokenizer for one stream."""
        return Detokenizer(self._tokenizer)

    def close(self) -> None:
        """End the threads."""
        for threads in (self._short, self._long):
            threads.shutdown(cancel_futures=True)

    def _encode(self, text: str, check_length: Callable[[int], None]) -> list[int]:
        try:
            # Fast, as it keeps no positions in the text: they are most of the time and memory.
            [encoding] = self._tokenizer.encode_batch_fast([text])
        except BaseException:  # a panic of the library is no Exception
            logger.exception("the tokenizer failed at a text of %d characters", len(text))
            raise RequestFailedError("the tokenizer failed at the prompt") from None
        try:
            check_length(len(encoding))
            ids: list[int] = encoding.ids
        finally:
            del encoding  # a hundred bytes a token, which an error on its way would keep
        return ids


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
        before = self._decode(self._context)
        text = self._decode(self._context + self._unfinished)
        num_ready = len(self._unfinished)
        if not (finish or (len(text) > len(before) and not text.endswith(_BROKEN))):
            num_ready, text = self._broken_part(text)
        if not num_ready:
            return ""
        if len(text) > len(before):
            self._context = self._unfinished[:num_ready]
        del self._unfinished[:num_ready]
        return text[len(before) :]

    def _broken_part(self, text: str) -> tuple[int, str]:
        """How many of too many unfinished tokens end where a character does, and their text.

        `text` is that of all.
        """
        if len(self._unfinished) > _MAX_UNFINISHED:
            for num_ready in range(len(self._unfinished) - _MIN_WAITING, 0, -1):
                part = self._decode(self._context + self._unfinished[:num_ready])
                if text.startswith(part):
                    return num_ready, part
        return 0, ""

    def _decode(self, token_ids: list[int]) -> str:
        try:
            text: str = self._tokenizer.decode(token_ids)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of the library is no Exception
            logger.exception("the tokenizer failed at %d token ids", len(token_ids))
            raise RequestFailedError("the tokenizer failed at the text") from None
        return text
