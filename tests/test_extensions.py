"""Names of other packages: what is found, what is said of what cannot be used, and what is not imported."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slosched.cli.app import app
from slosched.config import SchedulerConfig, WorkerConfig
from slosched.core.scheduler.policies import (
    POLICY_TYPES,
    about,
    policy_class,
    summaries,
    type_and_fidelity,
)
from slosched.core.scheduler.policies.baselines.fifo import Fifo
from slosched.daemon.backends.opening import DEVICES, device_kind, device_name, open_backend
from slosched.errors import ExtensionError, InvalidConfig, UnknownName
from slosched.extensions import forget_installed, origin_of
from slosched.sim.spec import SimSpec
from slosched.telemetry.manifest import read_manifest
from slosched.workloads import WORKLOAD_KINDS, parse_workload, workload_from_table
from slosched.workloads.base import Workload
from slosched.workloads.composed import Bounded
from slosched.workloads.registry import origins

POLICY = """
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.baselines.fifo import Fifo

class Mine(Fifo):
    about = About(type="MINE", summary="mine", interface=1, fidelities=("best",))

class Undated(Fifo):
    about = About(type="UNDATED", summary="says no version")

class Newer(Fifo):
    about = About(type="NEWER", summary="of a later slosched", interface=2)

class Heir(Fifo):
    pass

class OnlyPaper(Fifo):
    about = About(type="X", summary="", interface=1, fidelities=("paper",))

class Bare:
    about = About(type="BARE", summary="", interface=1)
    def enqueue(self): ...

instance = Mine
number = 3
"""
WORKLOAD = """
from slosched.workloads.kinds import Kind, Parameter
from slosched.workloads.mix import *
from slosched.workloads.shapes import KINDS
from dataclasses import dataclass

@dataclass(frozen=True)
class Few:
    path: str
    name = "few"
    duration_ns = 10**9
    groups = ("",)
    def models(self): return ()
    def steps(self): return ()
    def streams(self, seed): return ()
    def describe(self): return "few: " + self.path

FEW = Kind("few", "few", (Parameter("FILE", "a file", is_path=True),), lambda args: Few(*args), interface=1)
UNDATED = Kind("undated", "no version", (), lambda args: Few(""))
"""
BACKEND = """
from slosched.daemon.backends.emulated import EmulatedBackend

class Npu(EmulatedBackend):
    interface = 1

class Half:
    interface = 1
    def __init__(self, config): pass
    def describe(self): return ""
"""


class Site:
    """A folder that packages are installed into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(
        self, package: str, entry_points: str, version: str = "1.0", **modules: str
    ) -> None:
        """Write what pip leaves of a package: its modules, and its .dist-info."""
        info = self.folder / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(entry_points)
        for name, text in modules.items():
            (self.folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        forget_installed()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    known = set(sys.modules)
    for registry in (POLICY_TYPES, WORKLOAD_KINDS, DEVICES):
        monkeypatch.setattr(registry, "_loaded", {})
    forget_installed()
    yield Site(folder)
    forget_installed()
    for name in set(sys.modules) - known:
        if str(folder.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


GROUPS = """
[slosched.policies]
MINE = ext_policy:Mine
[slosched.workloads]
few = ext_workload:FEW
[slosched.backends]
npu = ext_backend:Npu
"""


@pytest.fixture
def mine(site: Site) -> Site:
    site.install(
        "my-package", GROUPS, ext_policy=POLICY, ext_workload=WORKLOAD, ext_backend=BACKEND
    )
    return site


def said(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.stdout, " ".join(done.stderr.split())


# --------------------------------------------------------------------------- what is found


def test_names_of_a_package_stand_behind_the_built_in_ones(mine: Site) -> None:
    assert POLICY_TYPES.names()[-1] == "MINE" and "INFER5" in POLICY_TYPES.names()
    assert WORKLOAD_KINDS.names()[-1] == "few" and DEVICES.names()[-1] == "npu"
    assert policy_class("MINE").__name__ == "Mine" and about("MINE").summary == "mine"
    workload = parse_workload("few", ["a"])
    assert workload.describe() == "few: a"
    table = {"workload": "few", "file": "b", "duration": "1ms"}
    assert isinstance(workload_from_table(table), Bounded)
    backend = open_backend(WorkerConfig(device="npu:1"))
    assert type(backend).__name__ == "Npu"
    backend.close()


def test_asking_for_a_built_in_name_reads_and_imports_nothing(
    mine: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as nothing:
        nothing.setattr("slosched.extensions._installed", None)
        assert about("INFER5") and WORKLOAD_KINDS.get("spam") and type_and_fidelity("INFER5:paper")
        assert all(device_kind(each) for each in ("auto", "cpu", "cuda", "cuda:3", "emulated"))
        assert POLICY_TYPES.origin("FIFO") is None and DEVICES.origin("cuda:N") is None


def test_one_name_imports_its_package_alone(site: Site) -> None:
    site.install("good", "[slosched.policies]\nMINE = ext_policy:Mine\n", ext_policy=POLICY)
    bad = "raise SystemExit('no other package may import this')"
    site.install("bad", "[slosched.policies]\nOTHER = ext_bad:X\n", ext_bad=bad)
    assert "OTHER" in POLICY_TYPES and "OTHER" in POLICY_TYPES.names()
    assert about("MINE")
    with pytest.raises(UnknownName, match=r"'MIN' \(did you mean MINE\?\); known: AIMD.*OTHER"):
        about("MIN")
    assert "ext_bad" not in sys.modules
    with pytest.raises(
        ExtensionError,
        match=r"scheduler TYPE 'OTHER' of the package bad 1.0 cannot be used: ext_bad:X cannot be imported "
        r"\(SystemExit: no other package",
    ):
        about("OTHER")


def test_lists_show_what_came_from_which_package_and_what_is_wrong(mine: Site) -> None:
    broken = "[slosched.policies]\nSAD = ext_sad:X\nINFER5 = ext_policy:Mine\n"
    site_problems = f"{broken}[slosched.workloads]\nsad = ext_sad:Y\n"
    mine.install("sad-package", site_problems, "0.3", ext_sad="import torch_of_nowhere")
    lines = dict(summaries())
    assert lines["MINE"] == "mine (from my-package 1.0)"
    assert (
        "No module named 'torch_of_nowhere'" in lines["SAD"] and "sad-package 0.3" in lines["SAD"]
    )
    assert summaries()[0][0] == "INFER5" and about("INFER5").interface is None
    code, out, _ = said("controller", "--help")
    assert code == 0 and "mine (from my-package 1.0)" in out and "torch_of_nowhere" in out
    code, out, _ = said("client", "--help")
    assert code == 0 and "few (from my-package 1.0)" in " ".join(out.split())
    assert "CANNOT BE USED" in out
    code, out, _ = said("doctor", "--seconds", "0.1", "--json")
    checks = [each for each in json.loads(out)["checks"] if each["name"] == "extension"]
    assert [each["ok"] for each in checks] == [False, True, False, True, False, True]
    assert "slosched has a scheduler TYPE of its own with this name" in checks[0]["value"]
    assert checks[0]["advice"] == "mend or uninstall sad-package"
    assert said("simulate", "SAD", "spam")[0] == 2


# ----------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("ext_policy:Undated", r"does not state its interface; give it interface=1"),
        ("ext_policy:Newer", r"is written for version 2 of the interface, and this slosched has 1"),
        ("ext_policy:Heir", r"has no `about` of its own"),
        ("ext_policy:Bare", r"lacks the methods forget, plan, next_wakeup_ns"),
        ("ext_policy:OnlyPaper", r"names the fidelities \('paper',\); write \('best',\)"),
        ("ext_policy:number", r"is not a class"),
        ("ext_policy:nothing", r"cannot be imported \(AttributeError"),
        ("ext_policy:Mine", r"calls itself 'MINE'; name the entry point after it"),
    ],
)
def test_a_policy_that_cannot_be_used(site: Site, target: str, problem: str) -> None:
    site.install("bad", f"[slosched.policies]\nX = {target}\n", ext_policy=POLICY)
    with pytest.raises(
        ExtensionError, match=rf"'X' of the package bad 1.0 cannot be used: {target} {problem}"
    ):
        about("X")
    assert len([each for each in POLICY_TYPES.outside() if each.problem]) == 1


def test_a_workload_or_device_that_cannot_be_used(site: Site) -> None:
    site.install(
        "bad",
        "[slosched.workloads]\nundated = ext_workload:UNDATED\nother = ext_workload:FEW\n"
        "no = ext_workload:Few\n"
        "two words = ext_workload:FEW\nfile.toml = ext_workload:FEW\n"
        "[slosched.backends]\nhalf = ext_backend:Half\nabsent = ext_backend:BACKEND\n",
        ext_workload=WORKLOAD,
        ext_backend=BACKEND,
    )
    for name, problem in {
        "undated": "does not state its interface",
        "other": "calls itself 'few'",
        "no": "is not a Kind",
        "two words": "its name must be",
        "file.toml": "its name must be",
    }.items():
        with pytest.raises(ExtensionError, match=problem):
            parse_workload(name, [])
    with pytest.raises(
        ExtensionError, match=r"'half' lacks loadable, prepare|lacks .*prepare.*Plain"
    ):
        open_backend(WorkerConfig(device="half"))
    with pytest.raises(ExtensionError, match=r"cannot be imported"):
        open_backend(WorkerConfig(device="absent"))


def test_a_name_that_two_packages_offer_needs_one_of_them_named(mine: Site) -> None:
    mine.install("rival", "[slosched.policies]\nMINE = ext_rival:Mine\n", "2.5", ext_rival=POLICY)
    with pytest.raises(
        ExtensionError,
        match=r"offered by my-package 1.0 and by rival 2.5; uninstall all but one, or name the one you mean: "
        "ext_policy:Mine, ext_rival:Mine",
    ):
        about("MINE")
    assert about("ext_rival:Mine").summary == "mine"
    assert {each.problem != "" for each in POLICY_TYPES.outside()} == {True}


@pytest.mark.parametrize(
    "target", ["ext_policy", "ext policy!:", "ext_policy:Odd", ":X", "ext_policy:Mine.x"]
)
def test_an_entry_point_that_names_nothing_usable(site: Site, target: str) -> None:
    odd = """
class Odd(type):
    @property
    def about(cls): raise RuntimeError("not now")
    def __getattr__(cls, name): raise RuntimeError("never")
class Odd(metaclass=Odd):
    pass
"""
    site.install("odd", f"[slosched.policies]\nX = {target}\n", ext_policy=POLICY + odd)
    with pytest.raises(ExtensionError, match=r"'X' of the package odd 1.0 cannot be used"):
        about("X")
    assert [each.name for each in POLICY_TYPES.outside() if each.problem] == ["X"]
    assert about("INFER5") and dict(summaries())["X"].startswith("CANNOT BE USED")


def test_a_current_folder_that_is_gone(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ExtensionError, match="cannot be imported"):
        about("no_such_module:X")


def test_a_package_whose_entry_points_cannot_be_read_costs_only_itself(mine: Site) -> None:
    mine.install("torn", "[console_scripts]\nno equals sign\n")
    found = list(POLICY_TYPES.outside())
    assert about("MINE")
    assert [each.name for each in found if not each.problem] == ["MINE"]


# ------------------------------------------------------------------- module:attribute


@pytest.fixture
def here(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_module.py").write_text(POLICY)
    (tmp_path / "my_workload.py").write_text(WORKLOAD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_class_of_a_module_in_the_current_folder(here: Path) -> None:
    assert policy_class("my_module:Mine").__name__ == "Mine"
    origin = POLICY_TYPES.origin("my_module:Mine")
    assert origin is not None and (origin.text, origin.version) == ("my_module", "")
    assert type_and_fidelity("my_module:Mine") == ("my_module:Mine", "")
    assert type_and_fidelity("my_module:Mine:paper") == ("my_module:Mine", "paper")
    with pytest.raises(InvalidConfig, match="has no fidelity 'paper'; it has best"):
        policy_class("my_module:Mine", "paper")
    with pytest.raises(ExtensionError, match="'my_module:Newer' is written for version 2"):
        about("my_module:Newer")
    with pytest.raises(
        ExtensionError, match=f"No module named 'missing_module'.*current folder.*{here}"
    ):
        about("missing_module:X")
    with pytest.raises(UnknownName):
        about("my_module:3")
    assert parse_workload("my_workload:FEW", ["x"]).describe() == "few: x"


def test_a_module_that_another_one_hides(here: Path) -> None:
    (here / "json.py").write_text(POLICY)
    with pytest.raises(ExtensionError, match=r"the module 'json' was taken from .*: rename yours"):
        about("json:Mine")


def test_commands_take_it(here: Path) -> None:
    waves = ("gamma", "resnet50_v2", "1", "50", "1", "1s", "100ms")
    code, out, error = said("simulate", "my_module:Mine", *waves, "--gpus", "1", "--out", "one")
    assert (code, error) == (0, error) and "my_module:Mine on 1 GPU" in out, error
    outside = read_manifest(here / "one")["config"]["from_outside"]
    assert [each["target"] for each in outside] == ["my_module:Mine"] and outside[0]["sha256"]
    assert said("simulate", "my_module:Heir", *waves)[0] == 2
    code, _, error = said("controller", "my_module:Heir", "127.0.0.1:1")
    assert code == 2 and "has no `about` of its own" in error
    code, _, error = said("fuzz", "--seeds", "2", "--policy", "my_module:Mine")
    assert (code, error) == (0, "")
    code, _, error = said("worker", "--device", "my_module:Mine")
    assert code == 2 and "device 'my_module:Mine' does not state its interface" in error
    code, _, error = said("client", "my_workload:UNDATED")
    assert code == 2 and "workload 'my_workload:UNDATED' does not state its interface" in error


# ------------------------------------------------------------------------ where it is from


def test_a_run_with_other_code_is_another_run(here: Path) -> None:
    from slosched.config_file import load_profile
    from slosched.sim.run import spec_digest
    from slosched.telemetry import source

    def digest() -> str:
        source._source_sha256.cache_clear()
        config = SchedulerConfig(policy="my_module:Mine")
        workload = parse_workload("gamma", ["resnet50_v2", "1", "50", "1"])
        return spec_digest(SimSpec(workload, config, (load_profile("v100"),)))

    first = digest()
    assert digest() == first
    (here / "my_module.py").write_text(f"{POLICY}\n# mended\n")
    assert digest() != first


def test_the_origin_of_a_workload_and_of_its_parts(mine: Site) -> None:
    workload: Workload = Bounded(parse_workload("few", ["a"]), 10**6)
    assert [(each.text, each.target) for each in origins(workload)] == [
        ("my-package 1.0", "ext_workload:Few")
    ]
    assert origins(parse_workload("gamma", ["resnet50_v2", "1", "50", "1"])) == []
    assert origin_of(f"{Fifo.__module__}:Fifo") is None and origin_of("builtins:int") is None


def test_device_names(mine: Site) -> None:
    assert [device_name(each) for each in ("cuda", "cuda:0", "npu", "npu:7", "emulated")] == [
        "cuda:N",
        "cuda:N",
        "npu",
        "npu",
        "emulated",
    ]
    for wrong in ("cuda:x", "cpu:1", "emulated:2", "auto:0", "npu:x:y", "tpu"):
        with pytest.raises(InvalidConfig, match="unknown device"):
            device_kind(wrong)
    code, _, error = said("profile", "resnet50", "--device", "npu")
    assert code == 2 and "cannot measure the device 'npu' of my-package 1.0" in error
