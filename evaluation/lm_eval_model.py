"""Adapter that exposes a Llama on a mesh as an lm-eval language model.

Encoding of pairs, truncation, windows and stop sequences follow lm-eval's own `hf` model on the
exported weights, so that scores are comparable with published ones. lm-eval treats every process as
the only one. The adapter distributes the requests over the data ranks, which run equally many
forwards because sharded weights are gathered collectively.
"""

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.models.utils import postprocess_generated_text as cut_at_stops
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from data.tokenizer import BOS_TOKEN, EOS_TOKEN, Tokenizer
from evaluation.errors import NOT_FINITE, TaskError
from evaluation.generation import generate
from evaluation.inference import InferenceContext
from evaluation.likelihood import target_scoring
from evaluation.sampling import SamplingParams
from formats.instruct import ChatTemplate, end_token_ids
from formats.weights import all_gather

MAX_NEW_TOKENS = 256
"""Default of a task's max_gen_toks."""

GENERATION_KEYS = {
    *("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"),
    "repetition_penalty",
}
"""Supported keys of a task's generation_kwargs."""

EMPTY_CONTINUATION = (
    "a task scores an empty continuation; remove the empty choice or answer from its data, or "
    "check doc_to_choice and doc_to_target"
)


class LlameshLM(TemplateLM):
    """lm-eval language model, constructed and called with the same arguments on every process.

    Args:
        context: A loaded model, without context, sequence and loss parallelism.
        tokenizer: Tokenizer of the weights.
        batch_size: Number of requests per forward of a data rank.
        template: Chat template for tasks that are run with one.
    """

    def __init__(
        self,
        context: InferenceContext,
        tokenizer: Tokenizer,
        batch_size: int,
        template: ChatTemplate | None = None,
    ) -> None:
        super().__init__()
        self.context, self._tokenizer, self.batch_size = context, tokenizer, batch_size
        self.max_length = context.weights.model.max_seq_len
        self._ends = end_token_ids(context.weights.folder, tokenizer)
        self._template = template
        self.is_first = context.fabric.is_global_zero
        self.is_computing = False  # whether this process may be in a collective of the model

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's cache of requests."""
        return self._tokenizer.hash

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt for a conversation; a last message of the assistant is continued."""
        assert self._template is not None
        return self._template.render(chat_history)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encode a text as the exported tokenizer does, including names of special tokens.

        The begin-of-text token is prepended unless the text starts with its name or
        `add_special_tokens` is False.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(BOS_TOKEN)
        ids = self._tokenizer.encode_with_specials(string)
        return [self._tokenizer.bos_id, *ids] if add_special_tokens else ids

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log-probability in nats of each continuation and whether it is greedy."""
        if any(request.args == ("", "") for request in requests):
            raise TaskError(EMPTY_CONTINUATION)
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return log-probabilities in nats of full texts, split into windows of the context."""
        start, length = self.prefix_token_id, self.max_length
        split = partial(
            get_rolling_token_windows, prefix_token=start, max_seq_len=length, context_len=1
        )
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = [[(None, *make_disjoint_window(each)) for each in split(text)] for text in texts]
        answers = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
        return [sum(next(answers)[0] for _ in text) for text in windows]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability in nats of each continuation and whether it is greedy.

        Args:
            requests: Tuples (ignored, context ids, continuation ids).
        """
        # Continuations that differ only in their last token share a row.
        rows: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not context or not continuation:  # lm-eval's own model rejects them too
                raise TaskError(EMPTY_CONTINUATION)
            if len(continuation) > self.max_length:
                raise TaskError(
                    f"a task scores a continuation of {len(continuation):,} tokens, more than the "
                    f"model's context length (max_seq_len={self.max_length:,}); remove the task"
                )
            ids = (context + continuation)[-(self.max_length + 1) :]
            rows.setdefault(tuple(ids[:-1]), []).append((index, continuation))
        longest_first = sorted(rows, key=lambda tokens: (-len(tokens), tokens))
        answers = [
            answer
            for batch in self._local_batches(longest_first, "loglikelihood")
            for answer in self._score(batch, [rows[tokens] for tokens in batch])
        ]
        gathered = self._gather_in_order(answers, len(requests))
        _check_finite([math.isfinite(log_prob) for log_prob, _ in gathered])
        return gathered

    @torch.no_grad()
    def _score(
        self, batch: list[tuple[int, ...]], continuations: list[list[tuple[int, list[int]]]]
    ) -> list[tuple[int, tuple[float, bool]]]:
        """Return the answers to a batch of rows with the index of their request.

        Args:
            batch: Token ids of each row; empty if this rank only joins the collectives.
            continuations: For each row, the request indices and continuations that end it.
        """
        longest = max((len(tokens) for tokens in batch), default=1)
        inputs = torch.zeros(max(len(batch), 1), longest, dtype=torch.int64)  # (batch, seq)
        targets: list[tuple[int, int, int]] = []
        for row, (tokens, requests) in enumerate(zip(batch, continuations, strict=True)):
            inputs[row, : len(tokens)] = torch.tensor(tokens)
            for _, continuation in requests:
                first = len(tokens) - len(continuation)
                targets += ((row, first + i, token) for i, token in enumerate(continuation))
        target_tensor = torch.tensor(targets, dtype=torch.int64).view(-1, 3).t()  # (3, targets)
        device = self.context.fabric.device
        # Shapes differ from training batches; compiling them does not pay off.
        with torch.compiler.set_stance("force_eager"), target_scoring(self.context.llama):
            scores = self.context.model(inputs.to(device), None, target_tensor.to(device))
        log_probs, is_argmax = scores.double().cpu()  # (targets) each
        answers, first = [], 0
        for index, continuation in (request for requests in continuations for request in requests):
            span = slice(first, first := first + len(continuation))
            answers.append((index, (float(log_probs[span].sum()), bool(is_argmax[span].all()))))
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the generated continuation of each context, cut at the task's stop sequences."""
        groups: dict[str, list[int]] = {}  # request indices by their generation_kwargs
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        answers: list[tuple[int, str | None]] = []
        n_before = 0
        for indices in groups.values():
            options = _GenerationOptions(requests[indices[0]].args[1], self.max_length)
            prompts = {
                index: self.tok_encode(requests[index].args[0])[-options.max_prompt_tokens :]
                for index in indices
            }
            indices.sort(key=lambda index: (-len(prompts[index]), prompts[index], index))
            for batch in self._local_batches(indices, "generate_until"):
                # Without a batch, this rank generates a dummy text to join the collectives.
                batch_prompts = [prompts[index] for index in batch] or [[self.prefix_token_id]]
                first = n_before + indices.index(batch[0]) if batch else 0
                texts = self._generate(batch_prompts, options, first)[: len(batch)]
                answers += zip(batch, texts, strict=True)
            n_before += len(indices)
        gathered = self._gather_in_order(answers, len(requests))
        _check_finite([text is not None for text in gathered])
        return gathered

    def _generate(
        self, prompts: list[list[int]], options: "_GenerationOptions", first_prompt: int
    ) -> list[str | None]:
        """Return the text for each prompt; None if the logits are not finite."""
        stops = [stop.encode() for stop in options.stops if stop]
        longest = max(map(len, stops))
        tails = [b""] * len(prompts)  # last bytes of each text, in which a stop may end

        def is_at_stop(row: int, token: int) -> bool:
            tail = tails[row]
            if token < self._tokenizer.vocab_size:  # the model's vocabulary may exceed it
                tail += self._tokenizer.encoding.decode_single_token_bytes(token)
            tails[row] = tail[-longest:]
            return any(stop in tail for stop in stops)

        completions = generate(
            self.context.model,
            prompts,
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling,
            stop=self._ends,
            device=self.context.fabric.device,
            sync=self.context.sync,
            on_token=is_at_stop,
            first_prompt=first_prompt,
        )
        n_ordinary = len(self._tokenizer.ranks)
        texts = [
            self._tokenizer.decode(token for token in completion.tokens if token < n_ordinary)
            for completion in completions
        ]
        return [
            cut_at_stops(text, options.stops, None) if completion.finite else None
            for text, completion in zip(texts, completions, strict=True)
        ]

    def _local_batches(self, items: list[Any], kind: str) -> Iterator[list[Any]]:
        """Yield this data rank's batches; the last one is empty if only other ranks have one."""
        rounds = range(0, len(items), self.batch_size * self.context.mesh.dp)
        self.is_computing = True
        for start in tqdm(rounds, desc=f"{kind}, batches", disable=not self.is_first):
            first = start + self.context.data_rank * self.batch_size
            yield items[first : first + self.batch_size]

    def _gather_in_order(self, answers: list[tuple[int, Any]], n_requests: int) -> list[Any]:
        """Return the answers of all data ranks in the order of the requests."""
        gathered = dict(answer for part in all_gather(answers) for answer in part)
        self.is_computing = False
        return [gathered[index] for index in range(n_requests)]


def _check_finite(finite: list[bool]) -> None:
    """Raise TaskError, on all ranks, if the answer to a request is not finite."""
    if n := finite.count(False):
        raise TaskError(
            f"the answers to {n} of {len(finite)} requests are not finite: {NOT_FINITE}"
        )


class _GenerationOptions:
    """A task's generation_kwargs, validated.

    Raises:
        TaskError: A key is not supported, or no context is left for the prompt.
    """

    def __init__(self, generation_kwargs: dict[str, Any], max_length: int) -> None:
        options = normalize_gen_kwargs(generation_kwargs, MAX_NEW_TOKENS)
        if options.get("num_beams") == 1:
            del options["num_beams"]
        if unsupported := sorted(set(options) - GENERATION_KEYS):
            raise TaskError(
                f"a task sets unsupported generation_kwargs ({', '.join(unsupported)}); use only "
                f"{', '.join(sorted(GENERATION_KEYS))} in its file"
            )
        self.stops = handle_stop_sequences(options["until"], eos=EOS_TOKEN)
        self.max_new_tokens = options["max_gen_toks"]
        self.max_prompt_tokens = max_length - self.max_new_tokens
        if self.max_prompt_tokens < 1:
            raise TaskError(
                f"a task sets generation_kwargs.max_gen_toks={self.max_new_tokens}, which leaves "
                f"no context for a prompt (max_seq_len={max_length}); set it to at most "
                f"{max_length - 1} in the task file"
            )
        temperature = options.get("temperature", 0.0)
        self.sampling = SamplingParams(
            temperature,
            options.get("top_k"),
            options.get("top_p"),
            repetition_penalty=options.get("repetition_penalty"),
        )
