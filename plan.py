"""Plans a training run before it is launched: `python plan.py hardware=h100 key=value …`.

Takes what `train.py` takes, and tells for any mesh whether the model fits, where its memory goes,
what it sends over which link, how fast and how dear it will be, and with `search=true` what is
best. Ends with exit code 1 where a run does not fit. Allocates nothing, reads no data.
"""

import sys

import hydra
from omegaconf import DictConfig

from cli.arguments import plan_arguments
from cli.config import load_plan_config
from cli.errors import exit_on_user_error
from planning.config import PlanJobConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="plan")
def main(composed: DictConfig) -> None:
    """Checks, plans, tells."""
    with exit_on_user_error("Not planned"):
        config = load_plan_config(composed)
        # Imported here, so that `--help` and a wrong configuration answer at once.
        if config.calibrate:
            from planning.answer import measure_machine

            measure_machine()
            return
        fits = answer(config)
    sys.exit(not fits)


def answer(config: PlanJobConfig) -> bool:
    """Tells all that is asked; returns whether the run fits, or under a search any run."""
    from planning.answer import answer_plan, answer_search

    return answer_search(config) if config.search else answer_plan(config)


if __name__ == "__main__":
    sys.argv[1:] = plan_arguments(sys.argv[1:])
    main()
