"""What the gate does with a verdict: per class block, allow or review, and from which p(unsafe).

A policy is a TOML or JSON file; everything may be left out, and an unknown key or class is refused::

    default = "block"             # block, allow or review: what is done about a class not named below
    still_unsure = "block"        # block or allow: when the exact verdict settles nothing either
    confirm = true                # let the exact verdict block what the standalone guard allowed

    [classes]
    financial_advice = "allow"
    weapon_related_violence = "review"

    [guard]                       # limits on p(unsafe); without: the bundle's thresholds, else 0.5 and 0.5
    block = 0.9
    allow = 0.1

    [exact]                       # the same for the exact verdict; without: 0.5 and 0.5
    block = 0.5
    allow = 0.5

A class that is allowed counts as safe: its probability is taken off p(unsafe), and the image is judged by the
other harms. A class under review is never blocked by the standalone guard alone: the exact verdict is asked, and
when that blocks or is unsure, too, the image is blocked and marked for review.

No policy turns an error into an allow.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from safevlm.contract.class_names import MAX_LENGTH, safe_index
from safevlm.contract.manifest_fields import BelowOne, Frozen, Probability
from safevlm.errors import InputError
from safevlm.files.json_file import first_problem
from safevlm.files.table_file import read_table
from safevlm.terminal.printable import shortened

__all__ = ["DEFAULT_BLOCK", "DEFAULT_LIMITS", "Action", "Limits", "Policy", "read_policy"]

Action = Literal["block", "allow", "review"]


class Limits(Frozen):
    """Block at p(unsafe) >= ``block``, allow below ``allow``, unsure between; with 1 for ``allow`` all would pass."""

    block: Probability
    allow: BelowOne

    @model_validator(mode="after")
    def _check(self) -> Limits:
        if self.allow > self.block:
            raise ValueError(f"allow ({self.allow}) must not be above block ({self.block})")
        return self


DEFAULT_BLOCK = 0.5
"""p(unsafe) from which an image is blocked until thresholds are fitted."""
DEFAULT_LIMITS = Limits(block=DEFAULT_BLOCK, allow=DEFAULT_BLOCK)


class Policy(Frozen):
    """See the module's text. The safe class has no action: there is nothing to do about it."""

    default: Action = "block"
    classes: Mapping[str, Action] = Field(default_factory=dict)
    guard: Limits | None = None
    exact: Limits | None = None
    confirm: bool = True
    still_unsure: Literal["block", "allow"] = "block"

    def action(self, harm: str) -> Action:
        """Return what is done about a class."""
        return self.classes.get(harm, self.default)

    def check(self, classes: Sequence[str]) -> None:
        """Raise InputError for a class that the guard does not know, for the safe one, and where all are allowed."""
        safe = classes[safe_index(classes)]
        for name in self.classes:
            if name == safe:
                raise InputError(f"the policy names the class {shortened(name)!r}, which is not a harm. Remove it.")
            if name not in classes:
                near = difflib.get_close_matches(name[:MAX_LENGTH], classes, n=1)
                nearest = f" The nearest is {near[0]!r}." if near else ""
                known = ", ".join(harm for harm in classes if harm != safe)
                raise InputError(f"the policy names the class {shortened(name)!r}; this guard knows {known}.{nearest}")
        if all(self.action(name) == "allow" for name in classes if name != safe):
            raise InputError(
                "the policy allows every class, so nothing would be blocked. Name at least one class to block."
            )


def read_policy(path: Path) -> Policy:
    """Read a policy file, TOML or JSON by its ending; InputError says what is wrong and where.

    Classes are compared with a guard's by :meth:`Policy.check`. TOML needs Python 3.11 or later.
    """
    try:
        return Policy.model_validate(read_table(path, "policy"), strict=True)
    except ValidationError as error:
        raise InputError(
            f"{path}: {first_problem(error)}. Known keys: {', '.join(Policy.model_fields)}; actions: block, allow, "
            "review."
        ) from error
