"""Complete batches of prompts on all processes, print the texts and measure the throughput."""

import json
import time
from collections.abc import Callable

from data.tokenizer import Tokenizer
from evaluation.config import GenerateJobConfig
from evaluation.detokenizer import IncrementalDetokenizer, detokenize
from evaluation.generation import Completion, SamplingParams, generate
from evaluation.inference import InferenceContext
from evaluation.prompts import Prompt
from formats.tokenizers import stop_token_ids


class Completer:
    """Complete prompts with the sampling parameters of a configuration.

    The time to the first token of a batch counts as prompt processing, the rest as generation.
    """

    def __init__(
        self, config: GenerateJobConfig, context: InferenceContext, tokenizer: Tokenizer
    ) -> None:
        self.context, self.tokenizer = context, tokenizer
        self.max_new_tokens = config.max_new_tokens
        self.sampling = SamplingParams(config.temperature, config.top_k, config.top_p, config.seed)
        self.stop = stop_token_ids(tokenizer)
        self.n_prompts = 0
        self.prompt_tokens, self.prompt_seconds = 0, 0.0
        self.new_tokens, self.later_tokens, self.later_seconds = 0, 0, 0.0
        self.n_truncated = 0  # completions ended by the context length

    def stream(self, prompt: Prompt, prefix: str) -> None:
        """Print `prefix` and the completion, token by token, on rank 0."""
        detokenizer = IncrementalDetokenizer(self.tokenizer)
        self._print(prefix, end="")
        self.complete([prompt], lambda token: self._print(detokenizer.add(token), end=""))
        self._print(detokenizer.finish())

    def print_batch(self, prompts: list[Prompt], as_json: bool) -> None:
        """Print prompts and completions on rank 0, separated by empty lines, or as JSON lines."""
        for prompt, completion in zip(prompts, self.complete(prompts), strict=True):
            text = detokenize(self.tokenizer, completion.tokens)
            line = prompt.text + text + "\n"
            if as_json:
                record = {"prompt": prompt.text, "text": text, "tokens": completion.tokens}
                line = json.dumps(record, ensure_ascii=False)
            self._print(line)

    def _print(self, text: str, end: str = "\n") -> None:
        if self.context.fabric.is_global_zero:
            print(text, end=end, flush=True)

    def complete(
        self, prompts: list[Prompt], on_token: Callable[[int], None] | None = None
    ) -> list[Completion]:
        """Complete a batch; `on_token` is called with each sampled token, of any row."""
        start, token_times = time.perf_counter(), list[float]()

        def record(_: int, token: int) -> None:
            token_times.append(time.perf_counter())
            if on_token is not None:
                on_token(token)

        completions = generate(
            self.context.model,
            [prompt.ids for prompt in prompts],
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            stop=self.stop,
            device=self.context.fabric.device,
            sync=self.context.sync,
            on_token=record,
            first_prompt=self.n_prompts,
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
