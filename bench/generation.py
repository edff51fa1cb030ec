"""Generation time against transformers' `generate`, on a vocabulary of 128,256: `python -m
bench.generation`.

A small model with random weights, for which the head and the sampling take most of a step. Both
programs generate the same number of tokens in turn; the results are ratios of neighboring times.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.measurement import spread, write
from evaluation.generation import generate
from evaluation.sampling import SamplingParams
from formats.conversion import convert
from formats.detection import open_weights
from formats.stored_tensor import StoredTensor
from formats.weights import Weights, load_weights, parameter_shapes
from model.config import ModelConfig
from model.llama import Llama

MODEL = ModelConfig("bench", 256, 4, 8, 4, 768, 128_256, max_seq_len=1024, tie_embeddings=True)
TOKENS, PROMPT, REPEATS = 24, 64, 9
KINDS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(0.8),
    "top_k": SamplingParams(0.8, top_k=50),
    "top_p": SamplingParams(0.8, top_k=None, top_p=0.9),
}


def main() -> None:
    """Measure each kind of sampling, and write `bench/results/generation.json`."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "hf"
        convert(_random_weights(), None, folder, "hf")
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ours = Llama(MODEL).eval()
        load_weights(ours, open_weights(folder))
    prompt = torch.randint(MODEL.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0))
    results = {}
    for kind, sampling in KINDS.items():
        is_greedy = sampling.temperature == 0
        options: dict[str, Any] = {"do_sample": not is_greedy, "eos_token_id": None}
        if not is_greedy:
            filters = {"top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
            options |= {"temperature": sampling.temperature, **filters}

        def run_ours(sampling: SamplingParams = sampling) -> list[int]:
            (found,) = generate(
                ours,
                [prompt.tolist()],
                max_new_tokens=TOKENS,
                sampling=sampling,
                stop=[],
                device=torch.device("cpu"),
            )
            return found.tokens

        def run_theirs(options: dict[str, Any] = options) -> list[int]:
            ids = prompt.unsqueeze(0)
            mask = torch.ones_like(ids)
            found = theirs.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, **options)
            tokens: list[int] = found[0, PROMPT:].tolist()
            return tokens

        assert len(run_ours()) == len(run_theirs()) == TOKENS
        if is_greedy:
            assert run_ours() == run_theirs()
        pairs = [(_seconds(run_ours), _seconds(run_theirs)) for _ in range(REPEATS)]
        results[kind] = {
            "ratio": spread([one / other for one, other in pairs]),
            "tokens_per_second": spread([TOKENS / one for one, _ in pairs]),
        }
    write("generation", results)


def _seconds(run: Callable[[], list[int]]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class _MemoryTensor(StoredTensor):
    """A random tensor that is generated when it is read."""

    def read(self, offsets: Any = None, sizes: Any = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(self.shape))
        tensor = 0.05 * torch.randn(self.shape, generator=generator) + (len(self.shape) == 1)
        for dim, size in enumerate(self.shape if sizes is None else sizes):
            tensor = tensor.narrow(dim, 0 if offsets is None else offsets[dim], size)
        return tensor.contiguous()


def _random_weights() -> Weights:
    shapes = parameter_shapes(MODEL)
    tensors = {name: _MemoryTensor(torch.float32, shape, ()) for name, shape in shapes.items()}
    return Weights("hf", Path("random"), MODEL, tensors)


if __name__ == "__main__":
    main()
