"""Generate text: `python generate.py checkpoint=… prompt="Once upon a time"`.

    python generate.py checkpoint=runs/llama3_tiny/checkpoints/step-00000160 prompt="def "
    python generate.py checkpoint=Llama-3.2-1B prompts=prompts.txt temperature=0
    python generate.py checkpoint=Meta-Llama-3-70B parallel.tp=8       reads prompts from stdin

Text is written to stdout, everything else to stderr.
"""

import dataclasses
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
from training.config_validation import ConfigError

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from evaluation.completer import Completer
    from evaluation.inference import InferenceContext
    from evaluation.prompts import Prompt
    from formats.weights import Weights


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(composed: DictConfig) -> None:
    """Load the configuration and generate; user errors exit with a message."""
    with exit_on_user_error():
        run(load_generate_config(composed))


def run(config: GenerateJobConfig) -> None:
    """Complete all prompts and print the throughput.

    Raises:
        FormatError, ConfigError: Weights, prompts or mesh are invalid.
    """
    from evaluation.completer import Completer
    from evaluation.prompts import interactive_prompts, read_prompts
    from formats.conversion import check_vocabulary
    from formats.detection import open_weights
    from formats.tokenizers import resolve_tokenizer

    weights = open_weights(Path(config.checkpoint))
    tokenizer = resolve_tokenizer(weights.folder, config.tokenizer_path)
    assert tokenizer is not None
    check_vocabulary(weights, tokenizer)
    prompts: list[Prompt] = []
    is_interactive = config.prompt is None and config.prompts is None
    if not is_interactive:
        prompts, errors = read_prompts(config.prompt, config.prompts, tokenizer, weights.model)
        if errors:
            raise ConfigError(errors)
    context = launch(config, weights)
    completer = Completer(config, context, tokenizer)
    with context.exit_on_interrupt():
        if is_interactive:
            for prompt in interactive_prompts(context.fabric, tokenizer, weights.model):
                stream(completer, prompt, "", tokenizer)
        elif config.prompt is not None:
            stream(completer, prompts[0], prompts[0].text, tokenizer)
        else:
            as_json = Path(str(config.prompts)).suffix == ".jsonl"
            for first in range(0, len(prompts), config.batch_size):
                batch = prompts[first : first + config.batch_size]
                print_batch(completer, batch, tokenizer, as_json)
        if context.fabric.is_global_zero:
            print("\n".join(completer.summary()), file=sys.stderr, flush=True)
    context.watchdog.close()


def launch(config: GenerateJobConfig, weights: "Weights") -> "InferenceContext":
    """Load the model on its mesh; raise ConfigError if the mesh does not fit the model."""
    from evaluation.inference import load_model, plan_inference
    from training.config_rules import model_errors

    # A generation step has one column, which cannot be split along seq.
    parallel = dataclasses.replace(config.parallel, sequence_parallel=False, loss_parallel=False)
    axis_errors = [
        f"parallel.{axis}={size} is not supported for generation; use parallel.{axis}=1, and "
        "parallel.tp to shard the model"
        for axis in ("dp_replicate", "dp_shard", "cp")
        if (size := getattr(parallel, axis)) != 1
    ]
    model = weights.model
    processes, mesh, errors = plan_inference(parallel, model, model.max_seq_len, model_errors)
    if axis_errors or errors:
        raise ConfigError(axis_errors or errors)
    return load_model(weights, processes, mesh, parallel, config.precision)


def stream(completer: "Completer", prompt: "Prompt", prefix: str, tokenizer: "Tokenizer") -> None:
    """Print `prefix` and the completion, token by token."""
    from evaluation.detokenizer import IncrementalDetokenizer

    def show(text: str, end: str = "") -> None:
        if completer.context.fabric.is_global_zero:
            print(text, end=end, flush=True)

    detokenizer = IncrementalDetokenizer(tokenizer)
    show(prefix)
    completer.complete([prompt], lambda token: show(detokenizer.add(token)))
    show(detokenizer.finish(), end="\n")


def print_batch(
    completer: "Completer", batch: "list[Prompt]", tokenizer: "Tokenizer", as_json: bool
) -> None:
    """Print prompts with their completions, separated by empty lines, or as JSON lines."""
    from evaluation.detokenizer import detokenize

    for prompt, completion in zip(batch, completer.complete(batch), strict=True):
        text = detokenize(tokenizer, completion.tokens)
        line = prompt.text + text + "\n"
        if as_json:
            record = {"prompt": prompt.text, "text": text, "tokens": completion.tokens}
            line = json.dumps(record, ensure_ascii=False)
        if completer.context.fabric.is_global_zero:
            print(line, flush=True)


if __name__ == "__main__":
    sys.argv[1:] = hydra_arguments(sys.argv[1:], "generate", texts=("prompt",))
    main()
