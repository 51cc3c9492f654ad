"""What a CUDA worker can load: torch models of the zoo and the config, and models of CuPy functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np

from slosched.config import ModelSource, WorkerConfig, canonical_model
from slosched.daemon.backends.checking import OneTensor, refuse_texts
from slosched.daemon.backends.cuda.bindings import CudaDriver
from slosched.daemon.backends.cuda.choice import Wish
from slosched.daemon.backends.cuda.driver import Block
from slosched.daemon.backends.cuda.preparing import Preparable, Source
from slosched.daemon.backends.cuda.torch_program import TorchProgram, TorchStreams
from slosched.daemon.backends.sources import imported, open_specs, source_spec
from slosched.daemon.backends.templates import Template
from slosched.daemon.backends.zoo import ModelSpec
from slosched.daemon.repository.listing import Version
from slosched.daemon.repository.modules import Packages
from slosched.daemon.repository.opened import opened
from slosched.errors import InvalidConfig


class Models:
    """Builds models by name, for the device of `streams`, and twins for `urgent` ones."""

    def __init__(
        self,
        config: WorkerConfig,
        driver: CudaDriver,
        streams: TorchStreams,
        urgent: TorchStreams | None = None,
    ) -> None:
        self._driver, self._streams, self._urgent = driver, streams, urgent
        self._wishes = {
            canonical_model(each.name): Wish(each.boundary_ns, each.in_flight, each.urgent)
            for each in config.models
        }
        self._specs = open_specs(config)
        self._repository, self._packages = config.repository, Packages()
        self.versions: dict[str, Version] = {}  # of the repository, by name
        self.digests: dict[str, str] = {}  # of the files that they were built of
        self._built: dict[str, str] = {}  # their fingerprints, as they were built
        self._cupy: dict[str, ModelSource | None] = {
            canonical_model(each.name): each for each in config.models if each.cupy
        }
        self.no_cupy = ""  # why no model of CuPy functions can be built
        if find_spec("cupy") is None:
            self.no_cupy = (
                "its factory needs cupy, which is not installed: pip install 'slosched[gpu]'"
            )
        else:
            from slosched.daemon.backends.cuda.cupy_zoo import CUPY_ZOO

            self._cupy.update({name: None for name in CUPY_ZOO if name not in self._cupy})
        self.loadable = tuple(sorted({*self._specs, *self._cupy}))

    def build(self, name: str, place: Block) -> Source:
        """Build the model, its weights on the host; its program has no class yet. Takes seconds.

        `place` is memory on the device that weights will be copied from.

        Raises InvalidConfig or what the operator's code raises.
        """
        if name in self._cupy:
            wish = self._wishes.get(name, Wish())
            return self._build_cupy(name, self._cupy[name], wish, place)
        if name in self._specs:
            return self._build_torch(self._specs[name], self._wishes.get(name, Wish()), place)
        version = self.versions.get(name)
        if version is None:
            raise InvalidConfig(f"model {name!r} is not in the repository any more")
        if self.changed(name):
            raise InvalidConfig(
                f"model {name!r}: its files were changed since it was loaded; unload it and load it again"
            )
        self._built[name] = version.fingerprint
        source = version.model_source()
        wish = Wish(source.boundary_ns, source.in_flight, source.urgent)
        with opened(self._repository, version, self._packages) as found:
            self.digests[name] = found.digest
            if found.source.cupy:
                return self._build_cupy(name, found.source, wish, place)
            return self._build_torch(source_spec(found.source), wish, place)

    def changed(self, name: str) -> bool:
        """Whether the files of a version are others than those that it was built of."""
        version = self.versions.get(name)
        built = self._built.get(name, "")
        return version is not None and bool(built) and built != version.fingerprint

    def forget(self, name: str) -> None:
        """Nothing that was built of `name` is left."""
        self._built.pop(name, None)
        self.digests.pop(name, None)
        self._packages.drop(name)

    def _build_torch(self, spec: ModelSpec, wish: Wish, place: Block) -> Source:
        refuse_texts(spec)
        template = Template(spec)
        twin: Callable[[], Preparable] | None = None
        if self._urgent is not None:
            twin = partial(TorchProgram, template, self._urgent, place)
        return Source(
            program=TorchProgram(template, self._streams, place),
            weights=template.host.numpy(),
            model=template.spec,
            random_weights=spec.random_weights,
            labels=spec.labels,
            twin=twin,
            wish=wish,
        )

    def _build_cupy(
        self, name: str, source: ModelSource | None, wish: Wish, place: Block
    ) -> Source:
        """Without a `source` it is one of the zoo's."""
        from slosched.daemon.backends.cuda.cupy_program import CupyModel, CupyProgram
        from slosched.daemon.backends.cuda.cupy_zoo import CUPY_ZOO

        model = CUPY_ZOO[name]() if source is None else imported(source, source.cupy)()
        if not isinstance(model, CupyModel):
            named = "the zoo" if source is None else source.cupy
            raise InvalidConfig(
                f"model {name!r}: {named} returned a {type(model).__name__}, not a CupyModel"
            )
        streams, urgent = self._streams, self._urgent
        program = CupyProgram(name, model, self._driver, streams.capture_stream, place)
        twin: Callable[[], Preparable] | None = None
        if urgent is not None:
            twin = partial(CupyProgram, name, model, self._driver, urgent.capture_stream, place)
        weights = program.image().astype(np.uint8, copy=False)
        return Source(
            program=program,
            weights=weights,
            model=OneTensor(name, tuple(model.input_shape), model.input_dtype),
            random_weights=model.random_weights,
            labels=("cupy",),
            twin=twin,
            wish=wish,
        )
