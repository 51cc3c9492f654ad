"""Settings of experiments by name, and policies with options of their own as texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import msgspec

from slosched.cascade_spec import CascadeOptions
from slosched.errors import InvalidConfig, UnknownName


@dataclass(frozen=True)
class Variant:
    """A policy with its options, under a name for tables and folders; `preempt` None is as in the rest."""

    name: str
    policy: str
    options: CascadeOptions = field(default_factory=CascadeOptions)
    preempt: bool | None = None


@dataclass(frozen=True)
class Preset:
    """Options for every policy, the judge's time (None: the cascade's own), and which policies are compared."""

    options: CascadeOptions
    judge_ns: int | None
    variants: tuple[Variant, ...]


def _sanity() -> Preset:
    """The settings of a sanity simulation of DiffServe: recorded scores, true arrival rates, no noise.

    Factor 1.2, a drop at 1.5 SLO, no time for the judge; roles cost nothing because both programs fit. As in
    the artifact, requests are routed at random, except in the last variant, and of plans with the same
    threshold the first one is taken.
    """
    options = CascadeOptions(over_provision=1.2, drop_at=1.5, ties="first")
    at_random = replace(options, routing="random")
    return Preset(
        options=options,
        judge_ns=0,
        variants=(
            Variant("all-light", "CLIPPER-LIGHT", at_random),
            Variant("all-heavy", "CLIPPER-HEAVY", at_random),
            Variant("static", "DIFFSERVE-STATIC", at_random),
            Variant("random-routing", "DIFFSERVE", at_random),
            Variant("least-loaded", "DIFFSERVE", options),
        ),
    )


#: What a comparison has if it names neither a preset nor policies.
POLICIES = (
    "CASCADE",
    "DIFFSERVE",
    "DIFFSERVE-STATIC",
    "PROTEUS",
    "CLIPPER-LIGHT",
    "CLIPPER-HEAVY",
)

PRESETS = {"sanity": _sanity()}


def preset_named(name: str) -> Preset:
    """Raises UnknownName."""
    if name not in PRESETS:
        raise UnknownName("preset", name, list(PRESETS))
    return PRESETS[name]


def parse_variants(text: str, base: CascadeOptions) -> tuple[Variant, ...]:
    """The policies of "cascade,diffserve:routing=random:over_provision=1.2", each over the options `base`.

    "cascade:preempt=true" may interrupt whatever the experiment says. Raises InvalidConfig if one is named
    twice, or an option is unknown or wrong.
    """
    found: list[Variant] = []
    for part in (part.strip() for part in text.split(",")):
        policy, *words = part.split(":")
        if not policy:
            raise InvalidConfig(
                f"{text!r}: write the policies as cascade,diffserve with commas between"
            )
        name = part.lower().replace(":", "-").replace("/", "_")
        if any(each.name == name for each in found):
            raise InvalidConfig(f"the policy {part} is named twice")
        options = [word for word in words if word not in _PREEMPT]
        preempt = [_PREEMPT[word] for word in words if word in _PREEMPT]
        last = preempt[-1] if preempt else None
        found.append(Variant(name, policy.upper(), with_texts(base, options), last))
    return tuple(found)


def with_texts(base: CascadeOptions, words: Sequence[str]) -> CascadeOptions:
    """`base` with the options of "NAME=VALUE" texts. Raises UnknownName, InvalidConfig."""
    # A duration is written by the option of the command; here are the switches of ablations.
    kinds: dict[str, Any] = {
        each.name: type(getattr(base, each.name))
        for each in fields(base)
        if not each.name.endswith("_ns")
    }
    values: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not value:
            raise InvalidConfig(f"{word!r}: write an option of a policy as NAME=VALUE")
        if name not in kinds:
            raise UnknownName("option", name, list(kinds))
        try:
            values[name] = msgspec.convert(value, kinds[name], strict=False)
        except msgspec.ValidationError:
            raise InvalidConfig(
                f"{word!r}: {name} must be {_WORDS.get(kinds[name], 'a text')}"
            ) from None
    return replace(base, **values)


#: No option of the cascade's: it is the experiment's, and the workers have it too.
_PREEMPT = {"preempt=true": True, "preempt=false": False}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number"}
