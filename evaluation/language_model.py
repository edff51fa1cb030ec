"""Our model as lm-eval wants one: texts in; log-probabilities, or the text that follows, out.

What is compared with what are the conventions of lm-eval's own `hf` model on the exported folder:
its encoding of pairs, truncation, windows and stops, so that scores are comparable with published
ones. Every process looks to lm-eval like the only one. Here the work is dealt to the data ranks,
which all make as many forwards, because sharded weights are gathered together.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.models.utils import postprocess_generated_text as cut_at_stops
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn
from tqdm import tqdm

from data.tokenizer import BOS_TOKEN, EOS_TOKEN, Tokenizer, split_text
from evaluation.errors import TaskError
from evaluation.generation import SINGLE_PROCESS, Agreement, Sampling, generate
from evaluation.likelihood import scoring
from model.llama import Llama

MAX_NEW_TOKENS = 256
"""Of a text to generate, where its task does not say."""

GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
"""What a task may ask of generation."""


def alone(own: list[Any]) -> list[list[Any]]:
    """What one data rank gathers."""
    return [own]


class LlameshModel(TemplateLM):
    """A Llama for lm-eval's evaluator; made and called with the same arguments on every process.

    Args:
        model: A Llama, or Fabric's wrapper of one, whole along seq: no context parallelism; and to
            generate text, no sequence parallelism either.
        tokenizer: Of the weights.
        device: Where the model is.
        batch_size: Requests that a data rank computes at a time.
        stop: Ids that end a text, and are no part of it.
        data_rank, data_size: Which share of the requests is this process's.
        gather: A list of this data rank's to those of all, in their order.
        agree: What processes tell each other while they generate.
        multiple_of: Sequences that are scored are padded to a multiple of this.
        is_first: Whether this process is the one that shows progress.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        device: torch.device,
        batch_size: int,
        stop: Sequence[int],
        data_rank: int = 0,
        data_size: int = 1,
        gather: Callable[[list[Any]], list[list[Any]]] = alone,
        agree: Agreement = SINGLE_PROCESS,
        multiple_of: int = 1,
        is_first: bool = True,
    ) -> None:
        super().__init__()
        llama = model if isinstance(model, Llama) else model.module
        assert isinstance(llama, Llama)
        self.model, self.llama, self.text = model, llama, tokenizer
        self.max_length = llama.config.max_seq_len
        self._device, self.batch_size, self.stop = device, batch_size, stop
        self.data_rank, self.data_size, self.gather = data_rank, data_size, gather
        self.agree, self.multiple_of, self.is_first = agree, multiple_of, is_first

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.text.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text as the exported tokenizer has them: names of special tokens are such.

        Begin-of-text comes first, unless the text begins with its name or the caller says no.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(BOS_TOKEN)
        encoding = self.text.encoding
        ids = [
            token
            for piece in split_text(string)
            for token in encoding.encode(piece, allowed_special="all")
        ]
        return [self.text.bos_id, *ids] if add_special_tokens else ids

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability in nats of whole texts, in windows of the model's context."""
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        answers = iter(self._loglikelihood_tokens([each for text in windows for each in text]))
        return [sum(next(answers)[0] for _ in text) for text in windows]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation, and whether it is what greedy choice gives.

        Args:
            requests: (anything, ids of the context, ids of the continuation) each.
        """
        # Answers that differ in their last token alone share a row.
        rows: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for number, (_name, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise TaskError(
                    f"a task asks for the probability of {len(continuation):,} tokens at once, and "
                    f"the model's context has {self.max_length:,} (max_seq_len): leave it out of "
                    "tasks"
                )
            whole = (context + continuation)[-(self.max_length + 1) :]
            rows.setdefault(tuple(whole[:-1]), []).append((number, continuation))
        longest_first = sorted(rows, key=lambda tokens: (-len(tokens), tokens))
        batches = _batches(longest_first, self.batch_size)
        own = [
            answer
            for batch in self._dealt(batches, "loglikelihood")
            for answer in self._scored(batch, [rows[tokens] for tokens in batch])
        ]
        return self._in_order(own, len(requests))

    @torch.no_grad()
    def _scored(
        self, batch: list[tuple[int, ...]], asked: list[list[tuple[int, list[int]]]]
    ) -> list[tuple[int, tuple[float, bool]]]:
        """The answers to a batch of rows, by the number of their request.

        Args:
            batch: Ids of each row; none where this rank has no batch and computes for the others.
            asked: Of each row, the numbers of the requests and what they ask it to continue with.
        """
        longest = max((len(tokens) for tokens in batch), default=1)
        seq = -(-longest // self.multiple_of) * self.multiple_of
        inputs = torch.zeros(max(len(batch), 1), seq, dtype=torch.int64)  # (batch, seq)
        targets: list[tuple[int, int, int]] = []
        for row, (tokens, requests) in enumerate(zip(batch, asked, strict=True)):
            inputs[row, : len(tokens)] = torch.tensor(tokens)
            for _, continuation in requests:
                first = len(tokens) - len(continuation)
                targets += ((row, first + i, token) for i, token in enumerate(continuation))
        wanted = torch.tensor(targets, dtype=torch.int64).view(-1, 3).t()  # (3, targets)
        # Of other shapes than training's batches: not worth a compilation.
        with torch.compiler.set_stance("force_eager"), scoring(self.llama):
            scores = self.model(inputs.to(self._device), None, wanted.to(self._device))
        log_probabilities, likeliest = scores.double().cpu()  # (targets) each
        answers, first = [], 0
        for number, continuation in (request for requests in asked for request in requests):
            its = slice(first, first := first + len(continuation))
            answer = float(log_probabilities[its].sum()), bool(likeliest[its].all())
            answers.append((number, answer))
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to where its task says that it ends."""
        asked = [request.args for request in requests]
        groups: dict[str, list[int]] = {}  # requests that want the same
        for number, (_, wish) in enumerate(asked):
            groups.setdefault(json.dumps(wish, sort_keys=True), []).append(number)
        own: list[tuple[int, str]] = []
        n_before = 0
        for numbers in groups.values():
            wish = _Wish(asked[numbers[0]][1], self.max_length)
            prompts = {
                number: self.tok_encode(asked[number][0])[-wish.longest_prompt :]
                for number in numbers
            }
            numbers.sort(key=lambda number: (-len(prompts[number]), prompts[number], number))
            places = {number: n_before + place for place, number in enumerate(numbers)}
            n_before += len(numbers)
            for batch in self._dealt(_batches(numbers, self.batch_size), "generate_until"):
                # A rank without a batch computes for the others, until these are done.
                texts = [prompts[number] for number in batch] or [[self.text.bos_id]]
                first = places[batch[0]] if batch else 0
                answers = self._generated(texts, wish, first)[: len(batch)]
                own += zip(batch, answers, strict=True)
        return self._in_order(own, len(requests))

    def _generated(self, prompts: list[list[int]], wish: "_Wish", first: int) -> list[str]:
        """The texts that follow a batch of prompts, of which `first` is the first one's number."""
        stops = [stop.encode() for stop in wish.stops if stop]
        longest = max(map(len, stops))
        ends = [b""] * len(prompts)  # as much of each text's as a stop may need

        def is_at_stop(row: int, token: int) -> bool:
            end = ends[row] + self._bytes(token)
            ends[row] = end[-longest:]
            return any(stop in end for stop in stops)

        completions = generate(
            self.model,
            prompts,
            max_new_tokens=wish.max_new_tokens,
            sampling=wish.sampling,
            stop=self.stop,
            device=self._device,
            agree=self.agree,
            on_token=is_at_stop,
            first_prompt=first,
        )
        n_ordinary = len(self.text.ranks)
        texts = [
            self.text.decode(token for token in completion.tokens if token < n_ordinary)
            for completion in completions
        ]
        return [cut_at_stops(text, wish.stops, None) for text in texts]

    def _bytes(self, token: int) -> bytes:
        """What a token stands for; nothing where the vocabulary is larger than the tokenizer's."""
        if token >= self.text.vocab_size:
            return b""
        return self.text.encoding.decode_single_token_bytes(token)

    def _dealt(self, batches: list[list[Any]], kind: str) -> Iterator[list[Any]]:
        """This data rank's batches, and empty ones where other ranks have one more."""
        rounds = range(0, len(batches), self.data_size)
        for first in tqdm(rounds, desc=f"{kind}, batches", disable=not self.is_first):
            own = first + self.data_rank
            yield batches[own] if own < len(batches) else []

    def _in_order(self, own: list[tuple[int, Any]], size: int) -> list[Any]:
        """The answers of all data ranks in the order of the requests, on each of them."""
        answers = dict(answer for share in self.gather(own) for answer in share)
        return [answers[number] for number in range(size)]


class _Wish:
    """What a task asks of generation, and the room that it leaves to a prompt.

    Raises:
        TaskError: what we do not do, or more than the context holds.
    """

    def __init__(self, asked: dict[str, Any], max_length: int) -> None:
        wish = normalize_gen_kwargs(asked, MAX_NEW_TOKENS)
        beams = wish.pop("num_beams", 1)
        unknown = sorted(set(wish) - GENERATION_KEYS) + (["num_beams"] if beams != 1 else [])
        if unknown:
            raise TaskError(
                f"a task sets generation_kwargs {', '.join(unknown)}, which generation here does "
                f"not know: use {', '.join(sorted(GENERATION_KEYS))} in its file"
            )
        self.stops = handle_stop_sequences(wish["until"], eos=EOS_TOKEN)
        self.max_new_tokens = wish["max_gen_toks"]
        self.longest_prompt = max_length - self.max_new_tokens
        if self.longest_prompt < 1:
            raise TaskError(
                f"a task generates {self.max_new_tokens} tokens (generation_kwargs.max_gen_toks), "
                f"and the model's context has {max_length} (max_seq_len), which leaves no room for "
                f"a prompt: set it to at most {max_length - 1} in the task's file"
            )
        self.sampling = Sampling(
            temperature=wish.get("temperature", 0.0),
            top_k=wish.get("top_k"),
            top_p=wish.get("top_p"),
        )


def _batches(items: list[Any], size: int) -> list[list[Any]]:
    """The items in lists of `size`, the last one shorter."""
    return [items[first : first + size] for first in range(0, len(items), size)]
