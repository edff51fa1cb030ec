"""Base class and field annotations of all configuration dataclasses.

A field declares its bounds with `annotated_types` (`Ge(1)`), its choices with `Literal`, and with
`ResumePolicy` whether a resumed run may change it; `training.config_validation` checks the former,
`training.resume_policy` the latter. Located in `model` because every package may import it.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge


class ConfigSection:
    """A configuration dataclass that rejects unknown keys."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class ResumePolicy:
    """Whether a field, and all keys below it, may change when a run resumes.

    Attributes:
        change: `free` at any time; `override` only when `run.allow_changes` lists the key;
            `forbidden` never, since the result would be a different run.
        decides: What the field determines, for error messages.
        on_load: Whether the field must also match when a new run starts from another run's
            checkpoint.
    """

    change: Literal["free", "override", "forbidden"]
    decides: str = ""
    on_load: bool = False


FREE = ResumePolicy("free")
PositiveInt = Annotated[int, Ge(1)]
