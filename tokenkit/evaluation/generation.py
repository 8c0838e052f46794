"""Text as a model writes it: each piece as soon as its characters are whole.

Tokens are read as bytes, so that a character over several tokens is shown whole. What may be the beginning
of a stop text is held back until it is known.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenkit.evaluation.sampling import Sampling

if TYPE_CHECKING:
    from tokenkit.evaluation.opened import Opened
    from tokenkit.tokenization.tokenizer import Tokenizer

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Generated:
    """What was written."""

    text: str
    """Without special tokens, and without the stop text that ended it."""
    ids: list[int]
    """All new tokens, those of EOS and of a stop text too."""
    ended: Literal["eos", "stop", "length"]
    """eos: the model said so; stop: a stop text; length: max_new_tokens, or the model's positions."""


class TextStream:
    """Tokens in, text out: transformers' `streamer` of one sequence.

    Args:
        tokenizer: the model's.
        stops: texts that end it.
        say: gets each piece of text that is sure.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], say: Say):
        self._tokenizer, self._stops, self._say = tokenizer, stops, say
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held, self._is_prompt, self._is_over = "", True, False
        self.text = ""
        """What was said."""

    def put(self, value: Tensor) -> None:
        """Take the prompt, at the first call, or new tokens."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.add(value.flatten().tolist())

    def add(self, ids: Iterable[int]) -> None:
        """Take new tokens."""
        self._show(self._decoder.decode(spelled(self._tokenizer, ids)))

    def end(self) -> None:
        """Say what was held back: no stop text came of it."""
        self._show(self._decoder.decode(b"", final=True), is_last=True)

    def _show(self, text: str, *, is_last: bool = False) -> None:
        if self._is_over:
            return
        held = self._held + text
        first = first_stop(held, self._stops)
        if first is not None:
            self._is_over, sure = True, first
        else:
            sure = len(held) if is_last else len(held) - _open_end(held, self._stops)
        self._held = held[sure:]
        if sure:
            self.text += held[:sure]
            self._say(held[:sure])


def first_stop(text: str, stops: Iterable[str]) -> int | None:
    """Return where the first stop text begins; None: there is none."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places, default=None)


def _open_end(text: str, stops: Iterable[str]) -> int:
    """Return how many characters at the end may be the beginning of a stop text."""
    lengths = (
        n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])
    )
    return max(lengths, default=0)


def spelled(tokenizer: Tokenizer, ids: Iterable[int]) -> bytes:
    """Return the bytes of tokens; special tokens and padding rows of the head have none."""
    size, special_V = tokenizer.vocab_size, tokenizer.is_special_V
    return b"".join(tokenizer.token_bytes[i] for i in ids if i < size and not special_V[i])


def stops_at(tokenizer: Tokenizer, stops: Sequence[str], prompt_length: int) -> list[Callable[..., Tensor]]:
    """Return the criteria by which `generate` ends rows whose new text holds a stop text."""
    if not stops:
        return []
    wanted = [stop.encode() for stop in stops]
    longest = max(map(len, wanted))

    def has_stop(ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        """Look at as many tokens as the longest stop text may have, which tokens without bytes make more."""
        new_BT = ids_BT[:, prompt_length:].tolist()
        ends = [spelled(tokenizer, row[-2 * longest - 8 :]) for row in new_BT]
        found = [any(stop in end for stop in wanted) for end in ends]
        return torch.tensor(found, device=ids_BT.device)

    return [has_stop]


def generation_config(opened: Opened, sampling: Sampling, max_new_tokens: int) -> Any:
    """Return transformers' settings: what `sampling` says, and the ends that the model's own names."""
    own = opened.model.generation_config
    ends = {own.eos_token_id} if isinstance(own.eos_token_id, int) else set(own.eos_token_id or ())
    ends |= {opened.tokenizer.eos_id, opened.tokenizer.special_ids.get("end_turn")} - {None}
    drawing = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p or 1.0,
    }
    pad = own.pad_token_id if own.pad_token_id is not None else opened.tokenizer.pad_id
    settings: Any = type(own)(  # not the model's own values
        max_new_tokens=max_new_tokens,
        num_beams=sampling.num_beams,
        do_sample=sampling.temperature > 0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad if pad is not None else min(ends, default=0),
        **(drawing if sampling.temperature > 0 else {}),
    )
    return settings


@torch.no_grad()
def generate(
    opened: Opened,
    prompt_1T: Tensor,
    sampling: Sampling,
    say: Say | None = None,
    processors: Sequence[Any] = (),
    positions: int | None = None,
) -> Generated:
    """Write on behind one prompt.

    Args:
        opened: the model.
        prompt_1T: int64 ids of the prompt, at least one.
        sampling: how tokens are chosen. Who wants other draws seeds torch before.
        say: gets the text piece by piece; with beams, all of it at the end.
        processors: of transformers, over the logits before anything is drawn.
        positions: tokens that can be read. None: the model's own number.

    Raises:
        ValueError: a prompt without tokens, or one that fills the model's positions.
    """
    length = prompt_1T.shape[1]
    limit = room_for(opened, length, sampling.max_new_tokens, positions or opened.positions)
    stream = TextStream(opened.tokenizer, sampling.stop, say or (lambda text: None))
    settings = generation_config(opened, sampling, limit)
    ids_1T = opened.model.generate(
        prompt_1T.to(opened.device),
        attention_mask=torch.ones_like(prompt_1T, device=opened.device),
        generation_config=settings,
        stopping_criteria=stops_at(opened.tokenizer, sampling.stop, length),
        logits_processor=list(processors),
        streamer=stream if sampling.num_beams == 1 else None,
    )
    new = ids_1T[0, length:].tolist()
    if sampling.num_beams > 1:
        stream.add(new)
        stream.end()
    if new and new[-1] in (settings.eos_token_id or ()):
        return Generated(stream.text, new, "eos")
    text = spelled(opened.tokenizer, new).decode("utf-8", "replace")
    return Generated(stream.text, new, "length" if first_stop(text, sampling.stop) is None else "stop")


def room_for(opened: Opened, length: int, max_new_tokens: int, positions: int | None) -> int:
    """Return how many tokens can be written behind a prompt of `length` tokens.

    Raises:
        ValueError: none, or a prompt of none.
    """
    if not length:
        raise ValueError(
            "the prompt has no tokens, and this tokenizer writes none before a text: give a prompt"
        )
    if positions is None:
        return max_new_tokens
    if length >= positions:
        raise ValueError(
            f"the prompt has {length} tokens and {opened.name} has {positions} positions: give a shorter one"
        )
    return min(max_new_tokens, positions - length)
