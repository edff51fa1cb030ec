"""Generates text from weights: `python generate.py checkpoint=… prompt="Once upon a time"`.

    python generate.py checkpoint=runs/llama3_tiny/checkpoints/step-00000160 prompt="def "
    python generate.py checkpoint=Llama-3.2-1B prompts=prompts.txt temperature=0
    python generate.py checkpoint=Meta-Llama-3-70B parallel.tp=8       asks for prompts

Text goes to the standard output, everything else to the standard error.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from cli.arguments import hydra_arguments
from cli.config import load_generate_config
from cli.errors import exit_on_user_error
from evaluation.config import GenerateJobConfig
from evaluation.prompts import (
    Completer,
    Prompt,
    check_mesh,
    ending_early,
    read_prompts,
    typed_prompts,
)

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(composed: DictConfig) -> None:
    """Checks, launches, generates."""
    with exit_on_user_error("Nothing is generated"):
        run(load_generate_config(composed))


def run(config: GenerateJobConfig) -> None:
    """Completes every prompt, and tells how fast.

    Raises:
        FormatError, ConfigError: weights, prompts or mesh are not what they have to be.
    """
    from evaluation.inference import load_model, tokenizer_of
    from formats.conversion import check_vocabulary
    from formats.recognition import open_weights

    weights = open_weights(Path(config.checkpoint))
    tokenizer = tokenizer_of(weights, config.tokenizer_path)
    assert tokenizer is not None
    check_vocabulary(weights, tokenizer)
    prompts = read_prompts(config, tokenizer, weights.model)
    parallel, processes, mesh = check_mesh(config, weights.model)
    loaded = load_model(weights, processes, mesh, parallel, config.precision)
    complete = Completer(config, loaded, tokenizer)
    with ending_early(loaded):
        if prompts is None:
            for prompt in typed_prompts(loaded.fabric, tokenizer, weights.model):
                stream(complete, prompt, "", tokenizer)
        elif config.prompt is not None:
            stream(complete, prompts[0], prompts[0].text, tokenizer)
        else:
            as_json = Path(str(config.prompts)).suffix == ".jsonl"
            for first in range(0, len(prompts), config.batch_size):
                batch = prompts[first : first + config.batch_size]
                print_batch(complete, batch, tokenizer, as_json)
        if complete.tells:
            print("\n".join(complete.figures()), file=sys.stderr, flush=True)
    loaded.watchdog.close()


def stream(complete: Completer, prompt: Prompt, begin: str, tokenizer: "Tokenizer") -> None:
    """One text, printed while it comes into being, after `begin`."""
    from evaluation.streaming import TextStream

    def show(text: str, end: str = "") -> None:
        if complete.tells:
            print(text, end=end, flush=True)

    text = TextStream(tokenizer)
    show(begin)
    complete([prompt], lambda token: show(text.add(token)))
    show(text.end(), end="\n")


def print_batch(
    complete: Completer, batch: list[Prompt], tokenizer: "Tokenizer", as_json: bool
) -> None:
    """The whole texts of a batch with an empty line between, or JSON objects, one a line."""
    from evaluation.streaming import text_of

    for prompt, completion in zip(batch, complete(batch), strict=True):
        text = text_of(tokenizer, completion.tokens)
        line = prompt.text + text + "\n"
        if as_json:
            answer = {"prompt": prompt.text, "text": text, "tokens": completion.tokens}
            line = json.dumps(answer, ensure_ascii=False)
        if complete.tells:
            print(line, flush=True)


if __name__ == "__main__":
    sys.argv[1:] = hydra_arguments(sys.argv[1:], "generate", texts=("prompt",))
    main()
