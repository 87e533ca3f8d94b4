"""The pool keeps order and never hangs, whatever is thrown at it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from copd_megatron.errors import ConfigError
from copd_megatron.rewards.pool import RewardPool
from copd_megatron.rewards.verdict import RewardError, Verdict

GOOD = ("digits", "12>3", "3")
WRONG = ("digits", "12>4", "3")


@pytest.fixture(scope="module")
def pool(plugins: Path) -> Iterator[RewardPool]:
    with RewardPool(workers=2, time_limit=2.0, memory=512 * 2**20) as running:
        running.score([GOOD, ("math", r"\boxed{1}", "1"), ("misbehave", "fine", "")])
        yield running


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An installed package that brings verifiers of its own: `misbehave` does what the response says."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "misbehaviour.py").write_text(
        textwrap.dedent(
            """
            import os, signal, sys, time
            from pathlib import Path

            def misbehave(response, answer):
                if response == "sleep": time.sleep(60)
                if response == "exit": sys.exit(3)
                if response == "die": os.kill(os.getpid(), signal.SIGKILL)
                if response == "die once" and not Path(answer).exists():
                    Path(answer).write_text("died")
                    os.kill(os.getpid(), signal.SIGKILL)
                if response == "memory": bytearray(2**30)
                if response == "raise": raise KeyError("lost")
                if response == "too much": return 2.0
                if response == "nan": return float("nan")
                if response == "pid": Path(answer).write_text(str(os.getpid()))
                if response == "spin":
                    Path(answer).write_text(str(os.getpid()))
                    10 ** 10 ** 9
                if response == "torch": return float("torch" in sys.modules)
                return 1.0
            """
        )
    )
    metadata = folder / "misbehaviour-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: misbehaviour\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[copd_megatron.verifiers]\nmisbehave = misbehaviour:misbehave\n"
        "broken = no_such_module:judge\nempty = misbehaviour:nothing\n"
    )
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def statuses(verdicts: list[Verdict]) -> list[str]:
    return [verdict.status for verdict in verdicts]


def test_order_is_preserved_across_verifiers_and_batches(pool: RewardPool) -> None:
    items = [
        item
        for value in range(150)
        for item in (
            ("digits", f"{value}>{value % 3}", "1"),
            ("choice", "ABC"[value % 3], "B"),
            ("misbehave", f"fine {value % 2}", ""),
        )
    ]
    verdicts = pool.score(items)
    assert [verdict.reward for verdict in verdicts] == [
        reward for value in range(150) for reward in (float(value % 3 == 1), float(value % 3 == 1), 1.0)
    ]
    assert set(statuses(verdicts)) == {"ok"}


def test_nothing_to_score(pool: RewardPool) -> None:
    assert pool.score([]) == []


def test_unparsable_response_gets_nothing_and_says_why(pool: RewardPool) -> None:
    verdicts = pool.score([("digits", "no answer", "3"), ("math", "dunno", "1"), GOOD])
    assert statuses(verdicts) == ["unparsable", "unparsable", "ok"]
    assert verdicts[0].reward == 0.0
    assert "expected one '>'" in verdicts[0].reason


@pytest.mark.parametrize(
    "hostile",
    [
        "the answer is 10**10**10",
        r"\boxed{9^{9^{9^9}}}",
        r"\[ " * 10_000,
        r"\boxed{" + r"\frac{1}{" * 300 + "2" + "}" * 300 + "}",
        "$" + "(" * 20_000 + "1" + ")" * 20_000 + "$",
        r"\boxed{" * 5_000,
        r"\boxed{100000000!}",
    ],
    ids=["tower", "latex tower", "regex", "nested fractions", "parentheses", "boxes", "factorial"],
)
def test_hostile_mathematics_costs_the_time_limit_and_spares_its_neighbours(pool: RewardPool, hostile: str) -> None:
    right = ("math", r"\boxed{\frac12}", "0.5")
    start = time.monotonic()
    verdicts = pool.score([right, GOOD, ("math", hostile, "1"), WRONG, ("math", r"\boxed{3}", "4"), GOOD])
    assert time.monotonic() - start < 60
    assert [verdict.reward for verdict in verdicts] == [1, 1, 0, 0, 0, 1]
    assert [status for index, status in enumerate(statuses(verdicts)) if index != 2] == ["ok"] * 5
    assert verdicts[2].status in ("timeout", "unparsable", "ok")


@pytest.mark.parametrize(
    ("deed", "status", "reason"),
    [
        ("sleep", "timeout", "took longer than 2 s"),
        ("exit", "error", "SystemExit"),
        ("die", "error", "died twice"),
        ("memory", "error", "MemoryError"),
        ("raise", "error", "KeyError: 'lost'"),
        ("too much", "error", "gave 2.0"),
        ("nan", "error", "gave nan"),
    ],
)
def test_misbehaving_verifier_harms_only_its_own_item(pool: RewardPool, deed: str, status: str, reason: str) -> None:
    verdicts = pool.score([("misbehave", "fine", ""), GOOD, ("misbehave", deed, ""), ("misbehave", "good", ""), WRONG])
    assert [verdict.reward for verdict in verdicts] == [1, 1, 0, 1, 0]
    assert statuses(verdicts) == ["ok", "ok", status, "ok", "ok"]
    assert reason in verdicts[2].reason


def test_item_whose_worker_is_killed_once_is_judged_again(pool: RewardPool, tmp_path: Path) -> None:
    verdicts = pool.score([("misbehave", "die once", str(tmp_path / "died")), GOOD])
    assert (tmp_path / "died").exists()
    assert statuses(verdicts) == ["ok", "ok"]


def test_idle_worker_that_is_killed_is_replaced(plugins: Path, tmp_path: Path) -> None:
    with RewardPool(time_limit=5.0) as pool:
        for delay in (0.0, 0.5):  # before and after the pool can have noticed
            pool.score([("misbehave", "pid", str(tmp_path / "pid"))])
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
            time.sleep(delay)
            assert statuses(pool.score([GOOD, WRONG])) == ["ok", "ok"]


def test_batch_that_times_out_is_judged_one_by_one(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("copd_megatron.rewards.pool.QUICK", frozenset({"misbehave", "digits"}))
    with RewardPool(time_limit=1.0) as pool:
        items = [GOOD, ("misbehave", "sleep", ""), WRONG, ("misbehave", "die", ""), ("misbehave", "fine", "")]
        verdicts = pool.score(items)
    assert statuses(verdicts) == ["ok", "timeout", "ok", "error", "ok"]
    assert [verdict.reward for verdict in verdicts] == [1, 0, 0, 0, 1]


def test_overlong_response_is_not_read(plugins: Path) -> None:
    with RewardPool(max_characters=100) as pool:
        verdicts = pool.score([("digits", "1" * 99 + ">3", "3"), GOOD])
    assert statuses(verdicts) == ["unparsable", "ok"]
    assert "longer than 100" in verdicts[0].reason


def test_unknown_verifier_is_refused_before_anything_starts() -> None:
    with RewardPool() as pool, pytest.raises(ConfigError, match="did you mean 'digits'"):
        pool.score([("digit", "1>1", "1")])


def test_verifier_that_cannot_be_loaded_stops_the_run(plugins: Path) -> None:
    with RewardPool() as pool:
        for name, message in [("broken", "no_such_module"), ("empty", "AttributeError")]:
            with pytest.raises(RewardError, match=message):
                pool.score([(name, "1", "1")])
        assert statuses(pool.score([GOOD])) == ["ok"]


def test_closed_pool_starts_again_when_used(plugins: Path, tmp_path: Path) -> None:
    pool = RewardPool()
    pool.score([("misbehave", "pid", str(tmp_path / "pid"))])
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert statuses(pool.score([GOOD])) == ["ok"]
    pool.close()
    pool.close()


@pytest.mark.parametrize("settings", [{"workers": 0}, {"time_limit": 0.0}, {"memory": 0}])
def test_impossible_limits_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must all be above 0"):
        RewardPool(**settings)


def test_workers_do_not_import_torch(plugins: Path) -> None:
    with RewardPool() as pool:
        (verdict,) = pool.score([("misbehave", "torch", "")])
    assert verdict == Verdict(0.0, "ok")


def test_worker_in_a_long_calculation_does_not_outlive_its_parent(plugins: Path, tmp_path: Path) -> None:
    program = f"""
from copd_megatron.rewards import pool
if __name__ == "__main__":
    pool.RewardPool(time_limit=1.0).score([("misbehave", "spin", {str(tmp_path / "pid")!r})])
"""
    script = tmp_path / "parent.py"
    script.write_text(program)
    parent = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        worker = int(_wait_for(tmp_path / "pid"))
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 20
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _alive(worker)


def _wait_for(file: Path) -> str:
    deadline = time.monotonic() + 30
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, f"{file} was not written"
        time.sleep(0.01)
    return file.read_text()


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
