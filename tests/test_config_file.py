"""TOML in, configuration out, and errors that say what to change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slosched.config import (
    ControllerConfig,
    EmulationNoise,
    ModelProfile,
    ModelSource,
    SchedulerConfig,
    WorkerConfig,
)
from slosched.config_file import (
    builtin_profiles,
    dump_profile,
    load_controller_config,
    load_profile,
    load_worker_config,
)
from slosched.core.scheduler.policies import resolved
from slosched.errors import InvalidConfig, UnknownName
from slosched.signature import Tensor

REPOSITORY = Path(__file__).parent.parent


def write(folder: Path, text: str) -> Path:
    path = folder / "it.toml"
    path.write_text(text)
    return path


def test_the_builtin_profiles_are_there_and_right() -> None:
    assert {"v100", "fig7"} <= set(builtin_profiles())
    v100 = load_profile("v100")
    model = v100.model("resnet50_v2")
    assert (v100.pages, model.pages(v100.page_bytes)) == (1376, 7)
    assert model.exec_ns == {1: 2_600_000, 2: 3_800_000, 4: 5_600_000, 8: 9_100_000, 16: 15_700_000}
    assert model.weights_ns == 8_330_000


@pytest.mark.parametrize("name", ["v100", "fig7"])
def test_a_dumped_profile_reads_back_equal(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    assert load_profile(write(tmp_path, dump_profile(profile))) == profile


def test_a_dumped_profile_keeps_awkward_names(tmp_path: Path) -> None:
    text = dump_profile(load_profile("v100")).replace("[models.resnet50]", '[models."a/b \\"c\\""]')
    profile = load_profile(write(tmp_path, text))
    assert list(profile.models) == ['a/b "c"']
    assert load_profile(write(tmp_path, dump_profile(profile))) == profile


def test_a_profile_of_signatures_and_times_by_length_reads_back_equal(tmp_path: Path) -> None:
    ids, text = Tensor("input ids", "int64", (-1,)), Tensor("text", "BYTES", (2,), 100)
    model = ModelProfile(
        name="a b",
        exec_ns={},
        weights_ns=1_000,
        weights_bytes=2_000,
        inputs=(ids, text),
        outputs=(Tensor("states", "float32", (-1, 3)), Tensor("sizes", "int64", ())),
        exec_ns_at={128: {1: 900}, 64: {1: 500, 2: 600}},
    )
    v100 = load_profile("v100")
    steps = ModelProfile("steps", {1: 50, 2: 90}, 1, 1, steps=4, step_ns={1: 10, 2: 20})
    profile = replace(v100, models={**v100.models, model.name: model, "steps": steps})
    path = write(tmp_path, dump_profile(profile))
    assert load_profile(path) == profile and model.lengths == (64, 128)
    text_file = path.read_text()
    assert (
        '[models."a b".exec_at]' in text_file and '[models."a b".inputs."input ids"]' in text_file
    )


@pytest.mark.parametrize(
    "table, words",
    [
        ('exec = { 1 = "2ms" }\nexec_at = { 64 = { 1 = "1ms" } }', "exec or exec_at"),
        ("exec_at = { 64 = { 1 = 1.5 } }", "exec_at, length 64: must be a table of times by batch"),
        (
            'exec_at = { 64 = { 2 = "1ms" } }\n[models.a.inputs.ids]\nshape = [-1]',
            "no batch size 1",
        ),
        ('exec_at = { 64 = { 1 = "1ms" } }', "no input has a dimension of -1"),
        ("exec_at = 3", "exec_at must be a table of times by length"),
    ],
)
def test_times_by_length_that_are_wrong(table: str, words: str, tmp_path: Path) -> None:
    text = 'name = "x"\nweights_cache = "1GiB"\n[models.a]\nweights_ns = 1\nweights_bytes = 1\n'
    with pytest.raises(InvalidConfig, match=words):
        load_profile(write(tmp_path, text + table))


def test_an_unknown_profile_names_the_known() -> None:
    with pytest.raises(UnknownName, match=r"unknown profile 'v1000'.*fig7.*v100"):
        load_profile("v1000")
    with pytest.raises(InvalidConfig, match=r"cannot read .*none\.toml"):
        load_profile("none.toml")


@pytest.mark.parametrize(
    "text, words",
    [
        ("name = 'x'", "weights_cache_bytes|models"),
        (
            "weights_cache_bytes = '1GiB'\n[models.a]\nweights_ns = 1\nweights_bytes = 1",
            "'a'.*exec_ns",
        ),
        (
            "name='x'\nweights_cache_bytes = 1\n[models.a]\nexec_ns={1='1ms'}\nweights_ns=1\nweights_bytes=1",
            "one page",
        ),
        ("[models.a]\nexec_ns = { x = 1 }", "'x'"),
        ("[models.a]\nexec_ns = { 2 = 1 }\nweights_ns=1\nweights_bytes=1", "batch size 1"),
        ("[models.a]\nexec_ms = 3", "unknown key 'exec_ms'.*exec_ns"),
        ("[models.a]\nweights_ns = '5 parsecs'", "weights_ns"),
        ("= 3", "not a TOML"),
    ],
)
def test_profiles_that_are_none(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=f"(?s)it.toml.*({words})"):
        load_profile(write(tmp_path, text))


def test_the_example_file_says_the_defaults() -> None:
    assert load_worker_config(REPOSITORY / "daemon" / "worker.toml") == WorkerConfig()


def test_the_examples_models_are_valid_when_uncommented(tmp_path: Path) -> None:
    lines = (REPOSITORY / "daemon" / "worker.toml").read_text().splitlines()
    begin = lines.index("# [models.my_resnet]")
    text = "\n".join(lines[:begin] + [line.removeprefix("# ").strip("#") for line in lines[begin:]])
    config = load_worker_config(write(tmp_path, text))
    names = ["my_resnet", "light", "exported", "sentences", "two_inputs", "texts"]
    assert [source.name for source in config.models] == [
        *names,
        "classifier",
        "kernels",
        "resnet50",
    ]
    by_name = {source.name: source for source in config.models}
    assert by_name["light"].score == "score"
    assert by_name["exported"].pt2 == str(tmp_path / "models" / "exported.pt2")
    assert by_name["sentences"].transformers == str(tmp_path / "models" / "minilm")
    two = by_name["two_inputs"]
    assert [str(each) for each in two.inputs] == ["ids int64[-1]", "mask int64[-1]"]
    assert (two.lengths, two.pads) == ((64, 128, 256), {"ids": 1.0})
    assert [str(each) for each in two.outputs] == ["scores float32[-1, 2]"]
    assert by_name["texts"].inputs[0].max_bytes == 64 * 1024
    classifier = by_name["classifier"]
    assert (classifier.input_dtype, classifier.dtype) == ("int64", "float16")
    assert by_name["kernels"].cupy == "my_package.kernels:make_chain"
    resnet = ModelSource("resnet50", dtype="float16", channels_last=True)
    assert by_name["resnet50"] == resnet


def test_sizes_and_durations_with_units_and_a_base_below(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'weights_cache = "21.5GiB"\npage_bytes = 1024\ngpus = 4\nprofile = "mine.toml"\n'
        '[noise]\nexec_sigma = 0.01\nstall = "5ms"\n',
    )
    config = load_worker_config(path, WorkerConfig(device="emulated", port=1))
    assert config == WorkerConfig(
        device="emulated",
        port=1,
        gpus=4,
        page_bytes=1024,
        profile=str(tmp_path / "mine.toml"),
        weights_cache_bytes=23_085_449_216,
        noise=EmulationNoise(exec_sigma=0.01, stall_ns=5_000_000),
    )


def test_noise_may_be_measured_and_copies_take_time(tmp_path: Path) -> None:
    text = (
        '[noise]\nexec_quantiles = [0.9, 1, 1.5]\npcie_bytes_per_s = "12.3GB"\npcie_shared = true\n'
    )
    assert load_worker_config(write(tmp_path, text)).noise == EmulationNoise(
        exec_quantiles=(0.9, 1.0, 1.5), pcie_bytes_per_s=12_300_000_000, pcie_shared=True
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("[noise]\nexec_quantiles = 1", "must be a list of numbers"),
        ("[noise]\npcie_shared = true", "needs pcie_bytes_per_s"),
        ("gpu = 2", r"unknown key 'gpu' \(did you mean gpus\?\); known: .*gpus"),
        ("gpus = 0", "at least 1"),
        ("gpus = 1.5", "gpus must be a whole number"),
        ("gpus = true", "gpus must be a whole number"),
        ("port = 70000", "65535"),
        ("device = 3", "device must be a text"),
        ("weights_cache = '3 apples'", "apples"),
        ("weights_cache = '1GiB'\nweights_cache_bytes = 3", "second time"),
        ("[noise]\nsigma = 1", r"\[noise\]: unknown key 'sigma'"),
        ("[noise]\nexec_sigma = 2", r"\[noise\].*exec_sigma"),
        ("noise = 3", "noise must be a table"),
        ("[models.a]\nfactory='x:y'\npt2='z'\ninput_shape=[1]", "'a'.*factory and pt2"),
        (
            "[models.a]\nfactory='x:y'\ncupy='x:y'\ninput_shape=[1]",
            "exactly one .*factory and cupy",
        ),
        (
            "[models.a]\ncupy='x'\ninput_shape=[1]",
            "'a': cupy must be package.module:function, not 'x'",
        ),
        (
            "[models.a]\nfactory='x:'\ninput_shape=[1]",
            "'a': factory must be package.module:function",
        ),
        ("[models.a]\ncupy='x:y'", "'a': input_shape must be given"),
        ("[models.a]\nfactory='x:y'\ninput_shape=[1]\ndtype='float8'", "'a'.*'float8' is none of"),
        ("[models.resnet50]\nchannels_last=1", "'resnet50': channels_last must be true or false"),
        ("libraries = 'timm'", "libraries must be a list"),
        ("[models.a]\nsafetensors='z'\ninput_shape=[1]", "'a'.*needs config"),
        ("[models.a]\nfactory='x:y'", "input_shape must be given"),
        ("[models.a]\nfactory='x:y'\ninput_shape=[0]", "at least 1"),
    ],
)
def test_worker_files_that_are_wrong(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=f"(?s)it.toml.*{words}"):
        load_worker_config(write(tmp_path, text))


def test_precision_and_libraries_of_a_worker(tmp_path: Path) -> None:
    path = write(
        tmp_path, 'dtype = "bfloat16"\nchannels_last = true\nlibraries = ["timm", "torchvision"]\n'
    )
    assert load_worker_config(path) == WorkerConfig(
        dtype="bfloat16", channels_last=True, libraries=("timm", "torchvision")
    )
    with pytest.raises(UnknownName, match=r"unknown dtype 'float8' .*; known: bfloat16, float16"):
        load_worker_config(write(tmp_path, 'dtype = "float8"'))
    with pytest.raises(
        UnknownName, match="unknown library 'keras'; known: diffusion, originals, timm, torchvision"
    ):
        load_worker_config(write(tmp_path, 'libraries = ["keras"]'))


def test_a_model_of_a_library_needs_only_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, '[models."torchvision/resnet50"]\ninput_shape = [3, 224, 224]')
    source = ModelSource("torchvision/resnet50", input_shape=(3, 224, 224))
    assert load_worker_config(path).models == (source,)


def test_a_controllers_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'workers = ["a:1", "b:2"]\nport = 7\n[scheduler]\npolicy = "FIFO"\nschedule_ahead = "5ms"\n'
        "max_exec_ns = 25_000_000\n",
    )
    scheduler = SchedulerConfig(policy="FIFO", schedule_ahead_ns=5_000_000, max_exec_ns=25_000_000)
    assert load_controller_config(path) == ControllerConfig(scheduler, ("a:1", "b:2"), port=7)
    base = ControllerConfig(SchedulerConfig(policy="ECHO", max_batch=4), ("c:3",), http_port=-1)
    merged = load_controller_config(path, base)
    assert (merged.http_port, merged.scheduler.max_batch) == (-1, 4)
    assert (merged.workers, merged.scheduler.policy) == (("a:1", "b:2"), "FIFO")


@pytest.mark.parametrize(
    "text, words",
    [
        ("port = 70000", "port must be within"),
        ("workers = 'a:1'", "workers must be a list"),
        ("workers = []\n[scheduler]\nslo = 3", r"\[scheduler\]: unknown key 'slo'.*default_slo, "),
        ("workers = []\n[scheduler]\nmax_batch = 0", r"\[scheduler\].*max_batch"),
    ],
)
def test_controller_files_that_are_wrong(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=f"(?s)it.toml.*{words}"):
        load_controller_config(write(tmp_path, text))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(InvalidConfig, match=r"cannot read nowhere\.toml: No such file"):
        load_worker_config("nowhere.toml")


def test_a_profile_may_run_any_batch_size_in_linear_times() -> None:
    exec_ns = load_profile("v100-linear").models["resnet50"].exec_ns
    assert sorted(exec_ns) == list(range(1, 17))
    assert (exec_ns[2], exec_ns[3], exec_ns[4]) == (3_800_000, 4_700_000, 5_600_000)
    assert exec_ns[6] == 7_350_000 and exec_ns[16] == 15_700_000
    assert load_profile("v100").models["resnet50"].exec_ns.items() <= exec_ns.items()


def test_a_schedule_ahead_with_which_nothing_is_ever_sent_is_refused() -> None:
    for policy, fidelity in (("INFER4", "best"), ("INFER4", "paper"), ("INFER5", "paper")):
        for ahead_ns in (1, 1_000_000):
            with pytest.raises(InvalidConfig, match=r"above 1ms .* nothing would ever be sent"):
                resolved(SchedulerConfig(policy, schedule_ahead_ns=ahead_ns, fidelity=fidelity))
        assert resolved(SchedulerConfig(policy, schedule_ahead_ns=1_000_001, fidelity=fidelity))
    assert resolved(SchedulerConfig("INFER5", schedule_ahead_ns=1))


def test_a_placement_rule_is_refused_where_it_would_change_nothing() -> None:
    for policy, fidelity in (("INFER4", "best"), ("SMART", "best"), ("INFER5", "paper")):
        with pytest.raises(InvalidConfig, match=f"'lru' has no effect under {policy}"):
            resolved(SchedulerConfig(policy, fidelity=fidelity, placement="lru"))
        assert resolved(SchedulerConfig(policy, fidelity=fidelity))
    assert resolved(SchedulerConfig("FIFO", placement="demand"))


def test_an_error_names_a_key_as_the_file_does(tmp_path: Path) -> None:
    path = tmp_path / "it.toml"
    for key in ("default_slo", "default_slo_ns"):
        path.write_text(f'workers = ["a:1"]\n[scheduler]\n{key} = 0\n')
        with pytest.raises(InvalidConfig, match=rf"\[scheduler\]: {key} must be at least 1"):
            load_controller_config(path)
    path.write_text('host_cache = "1GiB"\nhost_cache_bytes = 5\n')
    with pytest.raises(InvalidConfig, match="'host_cache_bytes' says 'host_cache' a second time"):
        load_worker_config(path)
    path.write_text("nonesuch = 1\n")
    with pytest.raises(
        InvalidConfig, match=r"known: .*, host_cache, .*, page_bytes, .*weights_cache$"
    ):
        load_worker_config(path)
