"""Warnings about the configuration of a plan, which do not reject it."""

from collections.abc import Collection, Iterator

from planning.frameworks import DEFAULT
from planning.hardware import Hardware
from planning.step_spec import StepSpec


def currency_warnings(hardware: Hardware, given: Collection[str]) -> Iterator[str]:
    """Yield a warning if only the currency of a price is given on the command line."""
    price, currency = hardware.price_per_hour, hardware.currency
    if price and "hardware.currency" in given and "hardware.price_per_hour" not in given:
        yield (
            f"hardware.currency={currency} does not convert hardware.price_per_hour={price:g} of "
            f"the hardware file; add hardware.price_per_hour=… in {currency}"
        )


def flash_attention_warnings(spec: StepSpec) -> Iterator[str]:
    """Yield a warning if a step does not run the FlashAttention that is given."""
    name, model, cp = spec.flash_attention, spec.model, spec.mesh.cp
    if name == "FA2" or spec.runs_flash_attention:
        return
    given = f"flash_attention_impl={name} has no effect"
    if spec.framework == DEFAULT and not name.startswith("FA"):
        yield (
            f"{given}, because train.py does not run it; use flash_attention_impl=FA2, or the "
            "framework that does, such as framework=nemo"
        )
        return
    causes = {
        f"parallel.{cp=}": cp > 1 and "parallel.cp=1",
        f"model.attention={model.attention}": model.attention != "auto" and "model.attention=auto",
        "data.document_mask=false": not spec.document_mask and "data.document_mask=true",
        "precision.param=fp32": spec.precision.param == "fp32" and "precision.param=bf16",
    }
    remedies = {cause: change for cause, change in causes.items() if change}
    given_with = " and ".join(remedies) or f"heads of {model.head_dim} elements"
    use = " or ".join(filter(None, [" ".join(remedies.values()), "flash_attention_impl=FA2"]))
    yield f"{given} with {given_with}: attention is planned as {spec.attention_name}; use {use}"
