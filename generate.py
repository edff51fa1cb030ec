"""Generate text: `python generate.py checkpoint=… prompt="Once upon a time"`.

    python generate.py checkpoint=runs/llama3_tiny prompt="def "
    python generate.py checkpoint=Llama-3.2-1B prompts=prompts.txt temperature=0
    python generate.py checkpoint=Llama-3.2-1B-Instruct chat=true prompt="Why is the sky blue?"
    python generate.py checkpoint=Meta-Llama-3-70B parallel.tp=8       reads prompts from stdin

Text is written to stdout, everything else to stderr.
"""

import dataclasses
import sys
from pathlib import Path

from cli.composition import compose_config
from cli.config import check_inference_mesh, load_generate_config
from cli.errors import exit_on_user_error
from cli.start_up import start_up
from evaluation.config import GenerateJobConfig
from training.config_validation import ConfigError

SMALLER = (
    "use batch_size=1 or precision.param=bf16, or divide the weights over more processes "
    "(parallel.tp)"
)


def main(arguments: list[str]) -> None:
    """Load the configuration and generate; user errors exit with a message."""
    with exit_on_user_error(smaller=SMALLER):
        run(load_generate_config(compose_config("generate", arguments)))


def run(config: GenerateJobConfig) -> None:
    """Complete all prompts and print the throughput.

    Raises:
        FormatError, ConfigError: Weights, prompts or mesh are invalid.
    """
    from formats.detection import check_path, open_weights

    check_path(Path(config.checkpoint))  # before the slow imports
    from evaluation.completer import Completer
    from evaluation.inference import load_model
    from evaluation.prompts import PromptEncoder, interactive_prompts, read_prompts
    from formats.conversion import check_vocabulary
    from formats.instruct import prompt_folders
    from formats.tokenizers import resolve_tokenizer

    weights = open_weights(Path(config.checkpoint))
    or_ids = ", or tokenizer_path=null with token ids in prompts=FILE.jsonl"
    tokenizer = resolve_tokenizer(weights.folder, config.tokenizer_path, or_ids)
    check_vocabulary(weights, tokenizer)
    model, folders = weights.model, prompt_folders(weights, config.tokenizer_path)
    encoder = PromptEncoder(model, tokenizer, folders, config.chat, config.system)
    is_interactive = config.prompt is None and config.prompts is None
    if config.chat:
        _ = encoder.template  # raises without one
    if not is_interactive:
        prompts, errors = read_prompts(config.prompt, config.prompts, encoder)
        if errors:
            raise ConfigError(errors)
    # A generation step has one column, which cannot be split along seq.
    parallel = dataclasses.replace(config.parallel, sequence_parallel=False, loss_parallel=False)
    processes, mesh = check_inference_mesh(parallel, config.precision, model, model.max_seq_len)
    context = load_model(weights, processes, mesh, parallel, config.precision)
    completer = Completer(config, context, tokenizer)
    with context.exit_on_interrupt():
        if is_interactive:
            for prompt in interactive_prompts(context.fabric, encoder):
                completer.stream(prompt, prefix="")
        elif config.prompt is not None:
            completer.stream(prompts[0], prefix=prompts[0].text)
        else:
            as_json = Path(str(config.prompts)).suffix.lower() == ".jsonl"
            for first in range(0, len(prompts), config.batch_size):
                completer.print_batch(prompts[first : first + config.batch_size], as_json)
        if context.fabric.is_global_zero:
            print("\n".join(completer.summary()), file=sys.stderr, flush=True)
    context.watchdog.close()


if __name__ == "__main__":
    start_up()
    main(sys.argv[1:])
