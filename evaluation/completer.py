"""Complete batches of prompts on all processes and measure the throughput."""

import time
from collections.abc import Callable

from data.tokenizer import Tokenizer
from evaluation.config import GenerateJobConfig
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
        self.context, self.sync = context, context.sync
        self.max_new_tokens = config.max_new_tokens
        self.sampling = SamplingParams(config.temperature, config.top_k, config.top_p, config.seed)
        self.stop = stop_token_ids(tokenizer)
        self.n_prompts = 0
        self.prompt_tokens, self.prompt_seconds = 0, 0.0
        self.new_tokens, self.later_tokens, self.later_seconds = 0, 0, 0.0
        self.n_truncated = 0  # completions ended by the context length

    def complete(
        self, prompts: list[Prompt], on_token: Callable[[int], None] | None = None
    ) -> list[Completion]:
        """Complete a batch; `on_token` is called with each sampled token, of any row."""
        start = time.perf_counter()
        first_token_time: float | None = None

        def record(_: int, token: int) -> None:
            nonlocal first_token_time
            if first_token_time is None:
                first_token_time = time.perf_counter()
            if on_token is not None:
                on_token(token)

        completions = generate(
            self.context.model,
            [prompt.ids for prompt in prompts],
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            stop=self.stop,
            device=self.context.fabric.device,
            sync=self.sync,
            on_token=record,
            first_prompt=self.n_prompts,
        )
        end = time.perf_counter()
        first_token_time = end if first_token_time is None else first_token_time
        lengths = [len(completion.tokens) for completion in completions]
        self.n_prompts += len(prompts)
        self.prompt_tokens += sum(len(prompt.ids) for prompt in prompts)
        self.prompt_seconds += first_token_time - start
        self.new_tokens += sum(lengths)
        self.later_tokens += sum(length - 1 for length in lengths if length)
        self.later_seconds += end - first_token_time
        self.n_truncated += sum(
            not completion.stopped and length < self.max_new_tokens
            for completion, length in zip(completions, lengths, strict=True)
        )
        return completions

    def summary(self) -> list[str]:
        """Return lines with token counts and throughput."""
        if not self.n_prompts:
            return []
        speed = f"{self.prompt_tokens / self.prompt_seconds:,.1f} tokens/s"
        lines = [f"prompts: {self.prompt_tokens:,} tokens, {speed}"]
        generated = f"generated: {self.new_tokens:,} tokens"
        if self.later_tokens:
            generated += f", {self.later_tokens / self.later_seconds:,.1f} tokens/s"
        lines.append(generated)
        if self.n_truncated:
            lines.append(
                f"{self.n_truncated} of {self.n_prompts} completions reached the model's context "
                f"length (max_seq_len={self.context.weights.model.max_seq_len:,})"
            )
        return lines
