"""Complete batches of prompts on all processes, print the texts and measure the throughput."""

import time
from collections.abc import Callable

from data.files import json_line
from data.tokenizer import Tokenizer
from evaluation.config import GenerateJobConfig
from evaluation.detokenizer import StoppedText
from evaluation.errors import NOT_FINITE, EvaluationError
from evaluation.generation import Completion, generate
from evaluation.inference import InferenceContext
from evaluation.prompts import Prompt
from evaluation.sampling import SamplingParams
from formats.instruct import end_token_ids


class Completer:
    """Complete prompts with the sampling parameters of a configuration.

    The time to the first token of a batch counts as prompt processing, the rest as generation.
    """

    def __init__(
        self, config: GenerateJobConfig, context: InferenceContext, tokenizer: Tokenizer | None
    ) -> None:
        self.context, self.tokenizer = context, tokenizer
        self.max_new_tokens = config.max_new_tokens
        self.sampling = SamplingParams(
            config.temperature, config.top_k, config.top_p, config.seed, config.repetition_penalty
        )
        self.stop, self.ends = config.stop, end_token_ids(context.weights.folder, tokenizer)
        self.n_prompts = 0
        self.prompt_tokens, self.prompt_seconds = 0, 0.0
        self.new_tokens, self.later_tokens, self.later_seconds = 0, 0, 0.0
        self.n_truncated = 0  # completions ended by the context length

    def stream(self, prompt: Prompt, prefix: str) -> None:
        """Print `prefix` and the completion, token by token, on rank 0."""
        assert self.tokenizer is not None
        text = StoppedText(self.tokenizer, self.stop)
        self._print(prefix, end="")

        def print_token(_: int, token: int) -> bool:
            self._print(text.add(token), end="")
            return text.is_stopped

        self.complete([prompt], print_token)
        self._print(text.finish())

    def print_batch(self, prompts: list[Prompt], as_json: bool) -> None:
        """Print prompts and completions on rank 0, separated by empty lines, or as JSON lines.

        Without a tokenizer, JSON lines have no text.
        """
        texts = [StoppedText(self.tokenizer, self.stop) for _ in prompts if self.tokenizer]
        parts: list[list[str]] = [[] for _ in texts]

        def add_token(row: int, token: int) -> bool:
            parts[row].append(texts[row].add(token))
            return texts[row].is_stopped

        completions = self.complete(prompts, add_token if texts else None)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            text = "".join([*parts[row], texts[row].finish()]) if texts else ""
            line = prompt.text + text + "\n"
            if as_json:
                record = prompt.record | ({"text": text} if texts else {})
                record["tokens"] = completion.tokens
                line = json_line(record)
            self._print(line)

    def _print(self, text: str, end: str = "\n") -> None:
        if self.context.fabric.is_global_zero:
            print(text, end=end, flush=True)

    def complete(
        self, prompts: list[Prompt], on_token: Callable[[int, int], bool] | None = None
    ) -> list[Completion]:
        """Complete a batch; `on_token` is called as by `generate`.

        Raises:
            EvaluationError: The logits of a prompt are not finite.
        """
        start, token_times = time.perf_counter(), list[float]()

        def record(row: int, token: int) -> bool:
            token_times.append(time.perf_counter())
            return on_token is not None and on_token(row, token)

        completions = generate(
            self.context.model,
            [prompt.ids for prompt in prompts],
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            stop=self.ends,
            device=self.context.fabric.device,
            sync=self.context.sync,
            on_token=record,
            first_prompt=self.n_prompts,
        )
        for index, completion in enumerate(completions, start=self.n_prompts + 1):
            if not completion.finite:
                raise EvaluationError(
                    f"the logits of prompt {index} are not finite after "
                    f"{len(completion.tokens)} tokens: {NOT_FINITE}"
                )
        end = time.perf_counter()
        first_token_time = token_times[0] if token_times else end
        self.n_prompts += len(prompts)
        self.prompt_tokens += sum(len(prompt.ids) for prompt in prompts)
        self.prompt_seconds += first_token_time - start
        self.later_seconds += end - first_token_time
        for completion in completions:
            n_tokens = len(completion.tokens)
            self.new_tokens += n_tokens
            self.later_tokens += max(n_tokens - 1, 0)
            self.n_truncated += not completion.stopped and n_tokens < self.max_new_tokens
        return completions

    def summary(self) -> list[str]:
        """Return lines with token counts and throughput."""
        if not self.n_prompts:
            return []
        speed = self.prompt_tokens / self.prompt_seconds
        lines = [f"prompts: {self.prompt_tokens:,} tokens, {speed:,.1f} tokens/s"]
        lines.append(f"generated: {self.new_tokens:,} tokens")
        if self.later_tokens:
            lines[-1] += f", {self.later_tokens / self.later_seconds:,.1f} tokens/s"
        if self.n_truncated:
            lines.append(
                f"{self.n_truncated} of {self.n_prompts} completions reached the model's context "
                f"length (max_seq_len={self.context.weights.model.max_seq_len:,})"
            )
        return lines
