"""Tokens and quotas: the file, who is who, and what is over."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from slosched.errors import InvalidConfig
from slosched.fronts import callers
from slosched.fronts.callers import Caller, Callers, Parted, Quota, read_tokens
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.sessions import Session
from slosched.gpu_profile import canonical_model

TOKEN = "correct-horse"


def opened(caller: Caller) -> Session:
    raise AssertionError(f"{caller.name} needs no session here")


def file(folder: Path, text: str) -> Path:
    path = folder / "tokens.toml"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return path


def status_of(call: Any, *args: Any, **named: Any) -> Status:
    with pytest.raises(FrontError) as caught:
        call(*args, **named)
    return caught.value.status


def test_a_token_is_found_by_itself_or_by_its_digest(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"battery-staple").hexdigest().upper()
    path = file(
        tmp_path, f'[tokens.a]\ntoken = "{TOKEN}"\n[tokens.b]\nsha256 = "{digest}"\nweight = 2\n'
    )
    who = Callers(str(path), opened)
    assert who.caller(f"Bearer {TOKEN}").name == "a"
    assert who.caller("bearer battery-staple").row.weight == 2.0
    wrong = (
        "",
        "Bearer",
        "Bearer ",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        f"Bearer {digest}",
    )
    for header in (*wrong, "Bearer \udcff\udc00", "Bearer " + "x" * 10_000):
        assert status_of(who.caller, header) is Status.UNAUTHENTICATED


def test_without_a_file_everyone_is_one_caller() -> None:
    who = Callers("", opened)
    assert who.caller("") is who.caller("Bearer anything") is who.everyone


BAD = {
    "": "has a table",
    "x = 1": "has a table",
    "tokens = 3": "has a table",
    "[tokens]": "has a table",
    "[tokens.a]": "needs token or sha256",
    '[tokens.a]\ntoken = "correct-horse"\nsha256 = "00"': "and not both",
    '[tokens.a]\ntoken = "short"': "8 to 512",
    '[tokens.a]\ntoken = "with a space"': "8 to 512",
    '[tokens.a]\nsha256 = "zz"': "64 hexadecimal",
    '[tokens.a]\ntoken = "correct-horse"\nweight = 1000': "weight",
    '[tokens.a]\ntoken = "correct-horse"\nweight = nan': "weight",
    '[tokens.a]\ntoken = "correct-horse"\nrequests_per_s = 0': "requests_per_s",
    '[tokens.a]\ntoken = "correct-horse"\nin_flight = 0': "in_flight",
    '[tokens.a]\ntoken = "correct-horse"\nbytes_in_flight = "many"': "bytes_in_flight",
    '[tokens.a]\ntoken = "correct-horse"\nbytes_in_flight = "0MiB"': "bytes_in_flight",
    '[tokens.a]\ntoken = "correct-horse"\ncolour = "red"': "colour",
    "[tokens.a]\ntoken = 5": "token",
    'tokens.a = "correct-horse"': "tokens.a",
    '[tokens."a b"]\ntoken = "correct-horse"': "letters, digits",
    '[tokens.a]\ntoken = "correct-horse"\n[tokens.b]\ntoken = "correct-horse"': "same token",
    "[tokens.a": "not a TOML file",
}


@pytest.mark.parametrize(("text", "words"), BAD.items(), ids=list(BAD.values()))
def test_a_faulty_file_is_refused_with_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        read_tokens(file(tmp_path, text))


def test_more_tokens_than_sessions_are_refused_and_a_file_that_all_can_read_is_told(
    tmp_path: Path,
) -> None:
    many = "".join(f'[tokens.t{i}]\ntoken = "correct-{i:05}"\n' for i in range(257))
    with pytest.raises(InvalidConfig, match="at most 256"):
        read_tokens(file(tmp_path, many))
    path = file(tmp_path, f'[tokens.a]\ntoken = "{TOKEN}"\n')
    assert read_tokens(path)[1] == ""
    path.chmod(0o644)
    assert "chmod 600" in read_tokens(path)[1]
    with pytest.raises(InvalidConfig, match="No such file"):
        read_tokens(tmp_path / "none.toml")


def test_the_file_is_read_again_and_a_faulty_one_changes_nothing(tmp_path: Path) -> None:
    path = file(tmp_path, f'[tokens.a]\ntoken = "{TOKEN}"\nin_flight = 2\n')
    who = Callers(str(path), opened)
    before = who.caller(f"Bearer {TOKEN}")
    before.quota.take(1, 0)
    file(tmp_path, "nonsense")
    with pytest.raises(InvalidConfig):
        who.read()
    assert who.caller(f"Bearer {TOKEN}") is before
    file(
        tmp_path,
        '[tokens.a]\ntoken = "another-one"\nin_flight = 1\n[tokens.b]\ntoken = "third-one"\n',
    )
    assert who.read() == []
    assert status_of(who.caller, f"Bearer {TOKEN}") is Status.UNAUTHENTICATED
    assert who.caller("Bearer another-one") is before  # with what it has in flight
    assert status_of(before.quota.take, 1, 0) is Status.RESOURCE_EXHAUSTED
    file(tmp_path, '[tokens.b]\ntoken = "third-one"\nweight = 3\n')
    heavier = who.caller("Bearer third-one")
    assert who.read() == [Parted(None, None), Parted(None, before.regions)]  # none has a session
    assert before.gone and status_of(before.check) is Status.UNAUTHENTICATED
    assert who.caller("Bearer third-one") is heavier and heavier.row.weight == 3
    heavier.check()


def test_a_new_token_may_use_its_first_second_at_once(tmp_path: Path) -> None:
    path = file(tmp_path, f'[tokens.a]\ntoken = "{TOKEN}"\nrequests_per_s = 3\n')
    quota = Callers(str(path), opened).caller(f"Bearer {TOKEN}").quota
    for _ in range(3):
        quota.take(1, 0)


def test_a_quota_counts_rows_and_bytes_and_gives_them_back() -> None:
    quota = Quota("token 'a'", most_rows=4, most_bytes=100)
    quota.take(3, 60)
    assert status_of(quota.take, 2, 0) is Status.RESOURCE_EXHAUSTED
    assert status_of(quota.take, 1, 41) is Status.RESOURCE_EXHAUSTED
    quota.take(1, 40)
    quota.give(4, 100)
    assert (quota.rows_now, quota.bytes_now) == (0, 0)
    quota.take(4, 100)


def test_what_is_over_a_quota_alone_is_not_told_to_come_again() -> None:
    quota = Quota("token 'a'", most_rows=4, most_bytes=100)
    quota.take(1, 0)
    for rows, size, before, waits in ((1, 101, 0, False), (4, 0, 1, False), (4, 0, 0, True)):
        with pytest.raises(FrontError) as caught:
            quota.take(rows, size, before=before)
        assert (caught.value.retry_after_s > 0) is waits
        assert ("this request alone" in caught.value.text) is not waits
    assert (quota.rows_now, quota.bytes_now) == (1, 0)


def test_requests_per_second_fill_again_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10**18]
    monkeypatch.setattr(callers, "now_ns", lambda: now[0])
    quota = Quota("token 'a'", per_s=4.0)
    for _ in range(4):
        quota.take(1, 0)
    with pytest.raises(FrontError) as caught:
        quota.take(1, 0)
    assert caught.value.retry_after_s == 0.25 and "4 requests/s" in caught.value.text
    assert quota.rows_now == 4  # what was refused took nothing
    now[0] += 250_000_000
    quota.take(1, 0)
    now[0] += 3600 * 10**9
    quota.take(
        12, 0
    )  # a batch larger than the bucket takes all of it, and is paid for by what follows
    now[0] += 10**9
    assert status_of(quota.take, 1, 0) is Status.RESOURCE_EXHAUSTED
    now[0] += 2 * 10**9
    quota.take(1, 0)


def test_a_batch_whose_first_row_was_taken_before_its_size_was_known_gets_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [10**18]
    monkeypatch.setattr(callers, "now_ns", lambda: now[0])
    for batch, per_s in ((4, 4.0), (8, 4.0), (2, 0.5)):
        quota = Quota("token 'a'", per_s=per_s)
        quota.take(1, 0)
        quota.take(batch - 1, 0, before=1)
        now[0] += int((batch - min(batch, max(1.0, per_s))) / per_s * 10**9)  # what it owes
        assert status_of(quota.take, 1, 0) is Status.RESOURCE_EXHAUSTED
        now[0] += int(10**9 / per_s)
        quota.take(1, 0)


def test_a_batch_that_is_refused_takes_nothing_of_a_quota_and_comes_through_when_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [10**18]
    monkeypatch.setattr(callers, "now_ns", lambda: now[0])
    quota = Quota("token 'a'", per_s=8.0)
    quota.take(3, 0)
    for _ in range(5):  # a client that tries again at once
        quota.take(1, 0)
        assert status_of(quota.take, 7, 0, before=1) is Status.RESOURCE_EXHAUSTED
        quota.give(1, 0)
    quota.take(1, 0)
    with pytest.raises(FrontError) as caught:
        quota.take(7, 0, before=1)
    quota.give(1, 0)
    assert caught.value.retry_after_s == 3 / 8
    now[0] += int(caught.value.retry_after_s * 10**9)
    quota.take(1, 0)
    quota.take(7, 0, before=1)


def test_a_slow_quota_lets_one_request_through_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10**18]
    monkeypatch.setattr(callers, "now_ns", lambda: now[0])
    quota = Quota("token 'a'", per_s=0.5)
    quota.take(1, 0)
    now[0] += 10**9
    with pytest.raises(FrontError) as caught:
        quota.take(1, 0)
    assert caught.value.retry_after_s == 1.0
    now[0] += 10**9
    quota.take(1, 0)


def test_a_token_may_be_for_some_models_and_not_manage_them(tmp_path: Path) -> None:
    path = file(tmp_path, f'[tokens.a]\ntoken = "{TOKEN}"\nmodels = ["toy", "resnet50"]\n')
    who = Callers(str(path), opened)
    caller = who.caller(f"Bearer {TOKEN}")
    assert caller.may_use("toy") and not caller.may_use("other") and not caller.may_use("")
    assert caller.may_use(canonical_model("resnet50"))
    assert status_of(caller.check_operator) is Status.PERMISSION_DENIED
    file(tmp_path, f'[tokens.a]\ntoken = "{TOKEN}"\nmodels = []\noperator = true\n')
    who.read()
    assert not caller.may_use("toy")
    caller.check_operator()
    Callers("", opened).everyone.check_operator()
