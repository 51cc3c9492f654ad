"""Weights and shares as options: files, command lines, hellos, mixes, and what status says of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from scheduler_rig import Rig
from slosched.cli.app import app
from slosched.cli.sim_options import SimOptions
from slosched.cli.status_text import status_text
from slosched.cli.values import weight_rules
from slosched.clients.aio import AsyncClient
from slosched.clients.run import run_workload
from slosched.command_line import weights_text
from slosched.config import ControllerConfig, SchedulerConfig, WeightRule
from slosched.config_file import load_controller_config, load_profile
from slosched.core.scheduler.interface import FromClient
from slosched.core.scheduler.policies import resolved
from slosched.core.scheduler.state import Client
from slosched.core.scheduler.weights import Weights
from slosched.daemon.status import status_report
from slosched.errors import InvalidConfig, UnknownName
from slosched.experiment.run import controller_words
from slosched.messages import PROTOCOL_VERSION, ClientHello, Refused, Welcome
from slosched.sim.faults import FaultPlan
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.base import ClientUse
from slosched.workloads.composed import Bounded, senders_of
from slosched.workloads.mix import MixEntry, mix
from slosched.workloads.spec_file import load_workload

MS = NS_PER_MS
RULES = (WeightRule(0.2, client="batch-*"), WeightRule(2.0, slo_max_ns=10 * MS))
ROOT = Path(__file__).parent.parent

# --------------------------------------------------------------------------------------- rules


def client(name: str, said: float, config: SchedulerConfig) -> float:
    return Weights(config).of_client(name, said)


def test_the_first_rule_that_matches_a_client_holds_else_its_word_up_to_the_limit() -> None:
    config = SchedulerConfig(weights=(*RULES, WeightRule(5.0, client="batch-7")))
    assert client("batch-7", 1.0, config) == 0.2
    assert client("batch", 1.0, config) == 1.0
    assert client("Batch-7", 50.0, config) == 1.0, (
        "names are told apart by case, and 1 is the limit"
    )
    assert client("other", 0.3, config) == 0.3
    assert client("other", 7.0, SchedulerConfig(max_client_weight=5.0)) == 5.0


def test_the_narrowest_class_of_slos_counts_and_multiplies() -> None:
    rules = (*RULES, WeightRule(0.5, slo_max_ns=50 * MS), WeightRule(100.0, slo_max_ns=MS))
    who = Client(b"c", 1, "c", weight=3.0)
    weights = Weights(SchedulerConfig(weights=rules))
    assert [weights.of_request(who, ms * MS) for ms in (1, 10, 11, 51)] == [100.0, 6.0, 1.5, 3.0]
    shares = Weights(SchedulerConfig(weights=rules, client_weights="shares"))
    assert [shares.of_request(who, ms * MS) for ms in (10, 51)] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WeightRule(1.0), "either client or slo_max"),
        (lambda: WeightRule(1.0, "a", 5), "either client or slo_max"),
        (lambda: WeightRule(0.001, "a"), "weight must be within 0.01..100, not 0.001"),
        (lambda: WeightRule(float("nan"), "a"), "not NaN"),
        (lambda: WeightRule(1.0, slo_max_ns=-1), "slo_max_ns must be above 0, not -1"),
        (lambda: SchedulerConfig(max_client_weight=0.0), "max_client_weight must be within"),
        (lambda: MixEntry("m", 1, 5.0, client="a", weight=101), "weight must be within"),
        (lambda: MixEntry("m", 1, 5.0, weight=2.0), "say client, too"),
    ],
)
def test_what_cannot_be_a_weight_says_so(make: Any, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words.replace(".", r"\.")):
        make()


def test_client_weights_are_values_or_shares() -> None:
    with pytest.raises(UnknownName, match=r"client_weights 'share'.*shares.*value"):
        SchedulerConfig(client_weights="share")


# ------------------------------------------------------------------------- files and commands


def test_a_controllers_file_has_weights(tmp_path: Path) -> None:
    path = tmp_path / "it.toml"
    path.write_text(
        'workers = ["a:1"]\n[scheduler]\nmax_client_weight = 2\nclient_weights = "shares"\n'
        '[[weights]]\nclient = "batch-*"\nweight = 0.2\n[[weights]]\nslo_max = "10ms"\nweight = 2\n'
    )
    expected = SchedulerConfig(weights=RULES, max_client_weight=2.0, client_weights="shares")
    assert load_controller_config(path) == ControllerConfig(expected, ("a:1",))


def test_the_example_of_a_controllers_file_has_the_defaults_and_its_comments_are_right(
    tmp_path: Path,
) -> None:
    example = ROOT / "daemon" / "controller.toml"
    plain = ControllerConfig(SchedulerConfig(), ("127.0.0.1:12345",))
    assert load_controller_config(example) == plain
    head, comments = example.read_text().split("# [[weights]]", 1)
    whole = head + ("# [[weights]]" + comments).replace("\n# ", "\n").replace("# [[", "[[")
    (tmp_path / "it.toml").write_text(whole)
    assert load_controller_config(tmp_path / "it.toml").scheduler.weights == RULES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("weights = 3", "weights must be tables of their own"),
        ("[[weights]]\nclient = 'a'", r"\[\[weights\]\] 1: weight must be given"),
        ("[[weights]]\nwho = 'a'\nweight = 1", "unknown key 'who'; known: client, slo_max, weight"),
        ("[[weights]]\nclient = 'a'\nweight = 0", r"\[\[weights\]\] 1: weight must be within"),
    ],
)
def test_wrong_weights_in_a_file_are_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "it.toml"
    path.write_text(f'workers = ["a:1"]\n{text}\n')
    with pytest.raises(InvalidConfig, match=f"(?s)it.toml.*{words}"):
        load_controller_config(path)


def test_rules_on_the_command_line_read_back() -> None:
    assert weight_rules("--weights", "batch-*=0.2, slo<=10ms=2") == RULES
    assert weight_rules("--weights", weights_text(RULES)) == RULES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch", "write it as NAME=WEIGHT"),
        ("=2", "write it as NAME=WEIGHT"),
        ("a=heavy", "'heavy' is not a number"),
        ("a=1000", "weight must be within"),
        ("slo<=soon=2", "the SLO"),
    ],
)
def test_wrong_rules_on_the_command_line_are_named(text: str, words: str) -> None:
    with pytest.raises(InvalidConfig, match=f"--weights.*{words}"):
        weight_rules("--weights", text)


def test_the_controllers_options_and_its_child_form_say_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[ControllerConfig] = []

    def run_controller(config: ControllerConfig, *, announce: Any) -> int:
        taken.append(config)
        return 0

    monkeypatch.setattr("slosched.daemon.controller.run_controller", run_controller)
    words = ["controller", "INFER5", "--workers", "a:1", "--weights", "batch-*=0.2,slo<=10ms=2"]
    words += ["--max-client-weight", "3", "--client-weights", "shares"]
    assert CliRunner().invoke(app, words).exit_code == 0
    scheduler = taken[0].scheduler
    assert scheduler.weights == RULES
    assert (scheduler.max_client_weight, scheduler.client_weights) == (3.0, "shares")
    words = controller_words(scheduler, ["127.0.0.1:7"], gpus=scheduler.max_gpus)
    assert CliRunner().invoke(app, words).exit_code == 0
    assert taken[1].scheduler == resolved(scheduler)


def test_simulations_take_the_options_and_believe_their_clients() -> None:
    sim = SimOptions().with_text("weights", "a=2").with_text("client-weights", "shares")
    scheduler = sim.scheduler("INFER5")
    assert scheduler.weights == (WeightRule(2.0, client="a"),)
    assert (scheduler.client_weights, scheduler.max_client_weight) == ("shares", 100.0)


def test_a_live_client_says_its_name_and_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, Any] = {}

    def run_live(address: str, workload: Any, **options: Any) -> int:
        taken.update(options)
        return 0

    monkeypatch.setattr("slosched.cli.run.run_live", run_live)
    words = ["client", "spam", "resnet50_v2", "--name", "batch-7", "--weight", "0.5"]
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 0, outcome.output
    assert (taken["name"], taken["weight"]) == ("batch-7", 0.5)


def test_a_client_with_a_weight_that_cannot_be_is_not_made() -> None:
    async def make() -> None:
        AsyncClient("127.0.0.1:1", weight=0.0)

    with pytest.raises(InvalidConfig, match="weight must be within"):
        asyncio.run(make())


# --------------------------------------------------------------------------------- controller


def test_a_hello_with_a_wrong_weight_is_refused_in_words() -> None:
    rig = Rig()
    for weight in (0.0, -1.0, 1e9, float("nan")):
        rig.handle(FromClient(b"x", ClientHello(PROTOCOL_VERSION, 5, "x", weight)))
    rig.step()
    refused = rig.to_client(Refused)
    assert len(refused) == 4 and not rig.to_client(Welcome)
    assert all("weight must be within 0.01..100" in each.reason for each in refused)


def test_status_tells_of_rules_and_weights() -> None:
    rig = Rig(SchedulerConfig(weights=RULES, client_weights="shares"))
    rig.handle(FromClient(b"x", ClientHello(PROTOCOL_VERSION, 5, "batch-1", 1.0)))
    rig.handle(FromClient(b"y", ClientHello(PROTOCOL_VERSION, 5, "plain", 1.0)))
    rig.step()
    report = status_report(rig.scheduler, now_ns=rig.now_ns)
    text = status_text("here:1", report)
    assert "weights (of clients: shares): batch-* 0.2, SLO to 10ms 2" in text
    assert "batch-1 (0 unanswered, weight 0.2)" in text and "plain (0 unanswered)" in text
    plain = Rig()
    plain.handle(FromClient(b"x", ClientHello(PROTOCOL_VERSION, 5, "x")))
    plain.step()
    assert "weight" not in status_text("a:1", status_report(plain.scheduler, now_ns=plain.now_ns))


# --------------------------------------------------------------------------------------- mixes


def test_a_mix_names_its_clients(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(
        'workload = "mix"\nduration = "1s"\n[[models]]\nname = "a"\nrate = 5\n'
        '[[models]]\nname = "a"\nrate = 6\nclient = "batch"\nweight = 0.5\n'
    )
    workload = load_workload(path)
    assert senders_of(workload) == (ClientUse(), ClientUse("batch", 0.5))
    assert senders_of(Bounded(workload, NS_PER_S // 2)) == senders_of(workload)
    assert "by batch (weight 0.5)" in workload.describe()
    assert senders_of(mix([MixEntry("a", 1, 5.0)], NS_PER_S)) == ()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("weight = 2", "line 4: model 1: weight is a client's"),
        ('client = "a"\nweight = 200', "line 5: model 1: weight must be within"),
        ('client = "a"\nweight = "much"', "line 5: model 1: weight must be a number"),
    ],
)
def test_a_wrong_weight_in_a_mix_is_named_with_its_line(
    tmp_path: Path, more: str, words: str
) -> None:
    path = tmp_path / "m.toml"
    path.write_text(f'workload = "mix"\n[[models]]\nname = "a"\n{more}\nrate = 5\n')
    with pytest.raises(InvalidConfig) as caught:
        load_workload(path)
    assert words in str(caught.value)


def test_a_client_has_one_weight() -> None:
    entries = [MixEntry("a", 1, 5.0, client="x", weight=2), MixEntry("b", 1, 5.0, client="x")]
    with pytest.raises(InvalidConfig, match="the client 'x' has the weights 2 and 1"):
        mix(entries, NS_PER_S)


def spec(**more: Any) -> SimSpec:
    entries = [
        MixEntry("resnet50_v2", 2, 4000.0, (0.0, 25 * MS), None, "flood"),
        MixEntry("resnet50_v2", 1, 100.0, (0.0, 25 * MS), None, "light", 2.0),
    ]
    return SimSpec(
        workload=mix(entries, NS_PER_S // 2), profiles=(load_profile("v100"),), gpus=1, **more
    )


def test_a_simulated_mix_has_its_clients(tmp_path: Path) -> None:
    scheduler = SchedulerConfig(client_weights="shares", max_client_weight=100.0)
    fair = simulate(spec(scheduler=scheduler, check=True), out=tmp_path / "run")
    unfair = simulate(spec(scheduler=SchedulerConfig()))
    assert fair.steps[1].satisfaction > 0.9 > 0.5 > unfair.steps[1].satisfaction
    assert fair.complete and fair.sent == unfair.sent


def test_named_clients_and_faults_exclude_each_other() -> None:
    plan = FaultPlan.random(1, [1], until_ns=NS_PER_S)
    with pytest.raises(InvalidConfig, match="cannot be simulated under faults"):
        simulate(spec(scheduler=SchedulerConfig(), faults=plan))


def test_a_live_client_is_one() -> None:
    workload = load_workload(ROOT / "workloads" / "mix-clients.toml")
    with pytest.raises(InvalidConfig, match=r"several \(flood, light\): give each a file"):
        asyncio.run(run_workload("127.0.0.1:1", workload))
