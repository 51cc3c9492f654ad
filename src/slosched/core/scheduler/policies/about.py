"""What a policy says about itself, so that options, help and documents can ask before one is made."""

from __future__ import annotations

from dataclasses import dataclass

from slosched.config import FIDELITIES
from slosched.units import NS_PER_MS

#: The version of what a policy of another package relies on: `About`, `Policy`, `Refusals` (base.py) and what
#: they name. It rises when a policy that was written for the old version would no longer work.
POLICY_INTERFACE = 1


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The values of options that are not given; without arguments those of fidelity "best"."""

    schedule_ahead_ns: int = 10 * NS_PER_MS
    generated_ahead_ns: int = 10 * NS_PER_MS  # the same where the controller generates the inputs
    max_exec_ns: int = 25 * NS_PER_MS
    max_batch: int = 16


_BY_FIDELITY = {
    "best": Defaults(),
    # Those of the published code, which differ from its help text.
    "paper": Defaults(generated_ahead_ns=15 * NS_PER_MS, max_exec_ns=250 * NS_PER_MS, max_batch=8),
}


@dataclass(frozen=True, kw_only=True)
class About:
    """One policy's own description. Times in ns."""

    #: TYPE on the command line, and the fidelities that this class serves under it.
    type: str
    fidelities: tuple[str, ...] = FIDELITIES
    #: The POLICY_INTERFACE that it is written for; a policy of another package must say it.
    interface: int | None = None
    #: Its place in lists of policies, the lowest first.
    rank: int = 99
    #: One line for `slosched controller --help`.
    summary: str
    #: None: those of the fidelity.
    defaults: Defaults | None = None
    #: `schedule_ahead` must be longer than this, or the policy would never send anything.
    least_ahead_ns: int = 0
    #: Whether weights are placed by a rule of placement/, which the option `placement` names.
    takes_placement: bool = True
    #: Whether instances that no client uses may be unloaded: the policy keeps nothing about each instance.
    unloads_unused: bool = True
    #: Whether it keeps the published code's defects, so that less is promised under faults.
    published: bool = False
    #: False: it knows one queue of each model, so that every request runs in the longest length class.
    length_classes: bool = True
    #: False: requests are answered without running a model, and without an output.
    runs_models: bool = True
    #: Whether it serves functions beside models; hosts and functions of workers are not used otherwise.
    serves_functions: bool = False
    #: Whether it serves one cascade (`SchedulerConfig.cascades`) and nothing else.
    one_cascade: bool = False
    #: Why no number of GPUs answers `slosched plan`; "": some number may.
    not_planned: str = ""
    #: Positional options of the published command that are accepted behind the common ones, and ignored.
    ignored_options: tuple[str, ...] = ()

    def defaults_under(self, fidelity: str) -> Defaults:
        return _BY_FIDELITY[fidelity] if self.defaults is None else self.defaults
