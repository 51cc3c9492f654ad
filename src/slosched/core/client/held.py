"""The models that callers hold, by name and copy, and what is loaded again after a controller's restart."""

from __future__ import annotations

from collections.abc import Sequence

from slosched.config import canonical_model
from slosched.core.client.interface import HeldModel
from slosched.messages import ModelInfo
from slosched.model_source import is_version_of


class Held:
    """All that was loaded through this client. A name's copies are loaded again together."""

    def __init__(self) -> None:
        self._models: dict[
            str, dict[int, HeldModel]
        ] = {}  # by name and copy, in the order of loading
        self._asked_as: dict[str, str] = {}  # the name that the caller gave

    def __len__(self) -> int:
        return sum(map(len, self._models.values()))

    def has(self, model: HeldModel) -> bool:
        """False for a model of another client."""
        return self._models.get(model.info.name, {}).get(model.info.copy) is model

    def loaded(
        self, asked_as: str, infos: Sequence[ModelInfo], incarnation: int
    ) -> tuple[HeldModel, ...]:
        """The controller `incarnation` has loaded these. Those that a caller holds already follow."""
        models = []
        for info in infos:
            copies = self._models.setdefault(info.name, {})
            # A version that was loaded under its plain name is loaded again itself: callers hold that one.
            self._asked_as[info.name] = (
                info.name if is_version_of(info.name, asked_as) else asked_as
            )
            model = copies.get(info.copy)
            if model is None:
                model = copies[info.copy] = HeldModel(info, incarnation)
            else:
                model.loaded(info, incarnation)
            models.append(model)
        return tuple(models)

    def unloaded(self, name: str) -> None:
        """The caller gave up all copies of `name`."""
        for each in self.under(name):
            for model in self._models[each].values():
                model.unloaded = True

    def under(self, name: str) -> list[str]:
        """What is held under `name`: that model, or else the versions of it (as the controller reads it)."""
        canonical = canonical_model(name)
        if canonical in self._models:
            return [canonical]
        return [each for each in self._models if is_version_of(each, name)]

    def to_load_again(self) -> list[tuple[str, int]]:
        """Name and number of copies of all that is held, in the order in which it was first loaded."""
        wanted = []
        for name, copies in self._models.items():
            held = [copy for copy, model in copies.items() if not model.unloaded]
            if held:
                wanted.append((self._asked_as[name], max(held) + 1))
        return wanted

    def missing(self, incarnation: int) -> int:
        """How many are held and not loaded by the controller `incarnation`."""
        return sum(
            not model.unloaded and model.incarnation != incarnation
            for copies in self._models.values()
            for model in copies.values()
        )
