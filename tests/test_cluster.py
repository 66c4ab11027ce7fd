"""Tuning on a Dask cluster: real workers in processes of their own, which pretend to be on several machines."""

import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest
from click.testing import CliRunner
from on_worker import FAILS, HANGS, KILLS, KILLS_THE_FIRST, QUARANTINES, RAISES, Part, Pretence, be_quiet

import convdispatch
from convdispatch import profile, profile_file, quarantine, settings
from convdispatch.cli import main
from convdispatch.errors import ArgumentError, ClusterError, ProfileError, UnknownBackendError
from convdispatch.problem import Problem
from convdispatch.tuning import cluster, gathering, roster
from convdispatch.tuning.cluster import ClusterReport
from convdispatch.tuning.layers import LayerReport
from convdispatch.tuning.workload import Layer, Workload

dask_distributed: Any = distributed  # its clusters have no type hints
SMALL = "1x9x9x4 * 3x3x4x8 SAME"


def problems(*batches: int) -> list[Problem]:
    return [Problem.parse(SMALL).replace(n=batch) for batch in batches]


@contextlib.contextmanager
def cluster_of(workers: int) -> Iterator[Any]:
    with (
        dask_distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
        ) as there,
        dask_distributed.Client(there, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def three() -> Iterator[Any]:
    with cluster_of(3) as client:
        yield client


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    with settings.options(profile=tmp_path / "profile.yaml") as options:
        assert options.profile is not None
        yield options.profile


@pytest.fixture
def two_kinds(three: Any, tmp_path: Path) -> Iterator[Any]:
    """Two hosts of one kind and one of another."""
    with stage(three, tmp_path, Part("alpha"), Part("beta"), Part("gamma", "Two (two)")):
        yield three


@contextlib.contextmanager
def stage(client: Any, folder: Path, *parts: Part, together: int = 1) -> Iterator[None]:
    client.register_plugin(Pretence(dict(enumerate(parts)), folder, together))
    yield
    # A race that was interrupted here goes on there; its worker has one thread, so this comes after it.
    for address in client.nthreads():
        client.submit(os.getpid, workers=[address], pure=False).result(timeout=30)
    client.unregister_worker_plugin("pretence")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_LOOK", 0.1)


def races(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "races").read_text().splitlines()]


def statuses(report: ClusterReport) -> dict[str, dict[int, str]]:
    """Return what became of each batch, by the kind's CPU."""
    return {
        kind.machine.cpu.split()[0]: {layer.layer.problem.n: layer.status for layer in kind.report.layers}
        for kind in report.kinds
    }


# What is done ---------------------------------------------------------------------------------------------------


def test_every_kind_gets_every_entry_in_one_profile(two_kinds: Any, file: Path, tmp_path: Path) -> None:
    told: list[tuple[str, LayerReport]] = []
    report = cluster.tune(problems(1, 2, 3), two_kinds, on_progress=lambda host, layer: told.append((host, layer)))
    assert report.complete
    assert report.left_out == ()
    first, second = sorted(report.kinds, key=lambda kind: kind.machine.cpu)
    assert first.hosts == ("alpha", "beta")
    assert second.hosts == ("gamma",)
    entries = profile_file.read(file).entries()
    wanted = Counter((kind.machine.id, n, way) for kind in report.kinds for n in (1, 2, 3) for way in ("plan", "call"))
    assert Counter((entry.key.machine, entry.key.problem.n, entry.key.deployment) for entry in entries) == wanted
    for kind in report.kinds:
        assert f"machine {kind.machine.id}:\n  cpu: {kind.machine.cpu}" in file.read_text()
        assert [layer.layer.problem.n for layer in kind.report.layers] == [1, 1, 2, 2, 3, 3]
    for entry in entries:
        hosts = first.hosts if entry.key.machine == first.machine.id else second.hosts
        assert entry.winner.backend.removeprefix("won-on-") in hosts
    assert Counter(tuple(race[1:4]) for race in races(tmp_path)) == {
        (cpu, str(n), way): 1 for cpu in ("One", "Two") for n in (1, 2, 3) for way in ("plan", "call")
    }
    assert len(told) == 12
    assert {host for host, _ in told} == {"alpha", "beta", "gamma"}


def test_workers_of_one_host_race_one_at_a_time_whatever_their_kind(three: Any, file: Path, tmp_path: Path) -> None:
    with stage(three, tmp_path, Part("alpha"), Part("alpha"), Part("alpha", "Two (two)")):
        report = cluster.tune(problems(*range(1, 7)), three, deployments=["plan"])
    assert report.complete
    assert len(races(tmp_path)) == 12
    assert not list(tmp_path.glob("overlap-*"))


def test_hosts_race_side_by_side(three: Any, file: Path, tmp_path: Path) -> None:
    # Each race waits for another host's; were they one after the other, all would wait in vain.
    with stage(three, tmp_path, Part("alpha"), Part("alpha"), Part("beta"), together=2):
        report = cluster.tune(problems(1, 2), three, deployments=["plan"])
    assert report.complete
    assert {race[0] for race in races(tmp_path)} == {"alpha", "beta"}
    assert not list(tmp_path.glob("overlap-*"))


def test_what_is_known_of_a_kind_is_not_raced_again(
    two_kinds: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.tune(problems(1), two_kinds, deployments=["plan"])
    # What a worker thinks of an old entry is the tuner's affair; its backends must be there for that.
    text = file.read_text().replace("won-on-alpha", "direct").replace("won-on-beta", "direct")
    file.write_text(text.replace("won-on-gamma", "direct"))
    again = cluster.tune(problems(1, 2), two_kinds, deployments=["plan"], backends=["direct"])
    assert statuses(again) == {"One": {1: "known", 2: "tuned"}, "Two": {1: "known", 2: "tuned"}}
    afresh = cluster.tune(problems(1), two_kinds, deployments=["plan"], backends=["direct"], retune=True)
    assert statuses(afresh) == {"One": {1: "tuned"}, "Two": {1: "tuned"}}


def test_an_interrupted_run_keeps_what_it_has(two_kinds: Any, file: Path) -> None:
    told = []

    def interrupt(host: str, layer: LayerReport) -> None:
        told.append(layer)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cluster.tune(problems(1, 2, 3, 4), two_kinds, on_progress=interrupt)
    assert {entry.key for entry in profile_file.read(file).entries()} == {
        layer.entry.key for layer in told if layer.entry
    }
    assert len(told) == 2


def test_the_time_limit_leaves_the_rest_but_knows_what_is_known(two_kinds: Any, file: Path, tmp_path: Path) -> None:
    cluster.tune(problems(1), two_kinds, deployments=["plan"])
    file.write_text(file.read_text().replace("won-on-alpha", "direct").replace("won-on-beta", "direct"))
    report = cluster.tune(problems(1, 2), two_kinds, deployments=["plan"], backends=["direct"], time_limit=0)
    assert statuses(report) == {"One": {1: "known", 2: "left"}, "Two": {1: "left", 2: "left"}}
    assert not report.complete
    assert len(races(tmp_path)) == 2


def test_a_race_gets_its_share_of_the_time(two_kinds: Any, file: Path, tmp_path: Path) -> None:
    cluster.tune(problems(1, 2, 3, 4), two_kinds, deployments=["plan"], time_limit=1000)
    given = [(cpu, float(seconds)) for _, cpu, _, _, seconds in races(tmp_path)]
    assert max(seconds for cpu, seconds in given if cpu == "Two") <= 1000
    assert min(seconds for cpu, seconds in given if cpu == "Two") == pytest.approx(250, rel=0.1)
    assert min(seconds for cpu, seconds in given if cpu == "One") == pytest.approx(500, rel=0.1)


def test_what_was_recorded_is_tuned_as_it_was_called_the_most_seconds_first(
    three: Any, file: Path, tmp_path: Path
) -> None:
    first, second, third = problems(1, 2, 3)
    layers = (
        Layer(first, seconds=1.0, deployment="plan", threads=7), Layer(second, seconds=3.0, deployment="call"),
        Layer(third, seconds=2.0),
    )  # fmt: skip
    with stage(three, tmp_path, Part("alpha"), Part("alpha"), Part("alpha")):
        report = cluster.tune(Workload("recorded", layers), three, threads=1)
    assert report.complete
    assert [race[2:4] for race in races(tmp_path)] == [["2", "call"], ["3", "plan"], ["3", "call"], ["1", "plan"]]
    assert {entry.key.threads for entry in profile_file.read(file).entries()} == {1}


def test_quarantines_travel_with_the_races_and_back(two_kinds: Any, file: Path, tmp_path: Path) -> None:
    def tune(**how: Any) -> Counter[str]:
        (tmp_path / "tried").unlink(missing_ok=True)
        profile.forget()
        kinds = cluster.tune(problems(QUARANTINES), two_kinds, deployments=["plan"], retune=True, **how).kinds
        held, broken = quarantine.written(profile_file.read(file))
        assert ({one.machine for one in held}, broken) == ({kind.machine.id for kind in kinds}, {})
        assert {one.reason for one in held} == {"crashed"}
        tried = (tmp_path / "tried").read_text().split() if (tmp_path / "tried").exists() else []
        return Counter("One" if host in {"alpha", "beta"} else "Two" for host in tried)

    once = Counter({"One": 1, "Two": 1})
    assert tune() == once  # and no worker writes a profile
    assert tune() == Counter()
    file.write_text(file.read_text().replace("origin: convdispatch.", "origin: elsewhere."))
    assert tune() == once  # what was held is other code of this name; what is held now takes its place
    assert tune() == Counter()
    assert tune(retry_quarantined=True) == once
    assert tune(retry_quarantined=True, backends=["im2col"]) == Counter()


# What goes wrong ------------------------------------------------------------------------------------------------


def test_workers_that_cannot_tune_are_left_out_with_the_reason(three: Any, file: Path, tmp_path: Path) -> None:
    with stage(three, tmp_path, Part("alpha"), Part("beta", version="0.0.9"), Part("gamma", bare=True)):
        report = cluster.tune(problems(1), three)
    assert report.complete
    (kind,) = report.kinds
    assert kind.hosts == ("alpha",)
    halted, old = sorted(left.reason for left in report.left_out)
    assert (
        halted
        == f"it needs convdispatch {convdispatch.__version__}: import of convdispatch halted; None in sys.modules"
    )
    assert old == f"it needs convdispatch {convdispatch.__version__}: it has 0.0.9"
    assert len({left.address for left in report.left_out}) == 2


def test_without_any_worker_that_can_tune_the_error_names_them_all(three: Any, file: Path, tmp_path: Path) -> None:
    old = Part(version="0.0.9")
    with stage(three, tmp_path, old, old, old), pytest.raises(ClusterError, match=r"no worker.*tcp.*it has 0\.0\.9"):
        cluster.tune(problems(1), three)
    assert not file.exists()


def test_a_race_that_raises_is_reported_and_the_others_go_on(two_kinds: Any, file: Path) -> None:
    report = cluster.tune(problems(1, FAILS, RAISES, 2), two_kinds, deployments=["plan"])
    for kind in report.kinds:
        layers = {layer.layer.problem.n: layer for layer in kind.report.layers}
        assert (layers[1].status, layers[2].status) == ("tuned", "tuned")
        assert (layers[FAILS].status, layers[FAILS].reason) == ("failed", "no candidate could do it")
        assert (layers[RAISES].status, layers[RAISES].reason) == ("failed", "MemoryError: not enough for this")


def test_a_race_whose_worker_dies_is_run_again_on_another_host(file: Path, tmp_path: Path, quick: None) -> None:
    with cluster_of(2) as client, stage(client, tmp_path, Part("alpha"), Part("beta")):
        report = cluster.tune(problems(KILLS_THE_FIRST, 1, 2), client, deployments=["plan"])
        assert report.complete
        ran = [race[0] for race in races(tmp_path) if race[2] == str(KILLS_THE_FIRST)]
        assert sorted(ran) == ["alpha", "beta"]


def test_what_kills_two_workers_has_failed_and_restarted_workers_do_the_rest(
    file: Path, tmp_path: Path, quick: None
) -> None:
    with cluster_of(1) as client, stage(client, tmp_path, Part("alpha")):
        report = cluster.tune(problems(KILLS, 1, 2), client, deployments=["plan"])
        killer, *others = report.kinds[0].report.layers
        assert killer.status == "failed"
        assert killer.reason.startswith("the worker was lost: alpha (tcp://")
        assert killer.reason.count("alpha") == 2
        assert [layer.status for layer in others] == ["tuned", "tuned"]
        assert [race[2] for race in races(tmp_path)] == [str(KILLS), str(KILLS), "1", "2"]


def test_jobs_without_a_worker_have_failed_when_patience_ends(
    file: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "_PATIENCE", 0.0)
    with cluster_of(1) as client, stage(client, tmp_path, Part("alpha")):

        def send_home(host: str, layer: LayerReport) -> None:
            if layer.status == "tuned":
                client.cluster.scale(0)
                for _ in range(1000):
                    if not client.nthreads():
                        break
                    time.sleep(0.01)

        report = cluster.tune(problems(1, 2, 3), client, deployments=["plan"], on_progress=send_home)
    done, *rest = report.kinds[0].report.layers
    assert done.status == "tuned"
    assert [layer.status for layer in rest] == ["failed", "failed"]
    assert all(layer.reason.endswith("no worker of this kind is left") for layer in rest)
    assert len(profile_file.read(file).entries()) == 1


def test_who_hangs_is_given_up_after_the_time_limit(
    two_kinds: Any, file: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "_GRACE", 0.0)
    try:
        report = cluster.tune(problems(HANGS, 1), two_kinds, deployments=["plan"], time_limit=2)
    finally:
        (tmp_path / "released").touch()
    for kind in report.kinds:
        hung = kind.report.layers[0]
        assert (hung.status, hung.reason) == ("failed", "no answer 0 s after the time limit")
    assert statuses(report)["Two"][1] == "left"


def test_a_scheduler_that_goes_away_is_an_error_and_what_was_measured_is_kept(
    file: Path, tmp_path: Path, quick: None
) -> None:
    timeout = dask.config.set({"distributed.comm.timeouts.connect": "200ms"})
    with cluster_of(1) as client, timeout:
        client.register_plugin(Pretence({0: Part()}, tmp_path))
        address = client.scheduler.address

        def stop(host: str, layer: LayerReport) -> None:
            client.cluster.close()

        with pytest.raises(ClusterError, match="what was measured is kept"):
            cluster.tune(problems(1, 2), address, deployments=["plan"], on_progress=stop)
    assert len(profile_file.read(file).entries()) == 1


def test_without_distributed_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ClusterError, match=r"pip install 'convdispatch\[dask\]'"):
        cluster.tune(SMALL, "tcp://127.0.0.1:1")


def test_wrong_arguments_are_refused_before_anything_is_measured(two_kinds: Any, file: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownBackendError, match="im2col"):
        cluster.tune(SMALL, two_kinds, backends=["imcol"])
    with pytest.raises(ArgumentError, match="effort"):
        cluster.tune(SMALL, two_kinds, effort="huge")
    with pytest.raises(ArgumentError, match="deployments"):
        cluster.tune(SMALL, two_kinds, deployments=["later"])
    file.write_text("shopping: [milk]\n")
    with pytest.raises(ProfileError, match="format"):
        cluster.tune(SMALL, two_kinds)
    assert not (tmp_path / "races").exists()


def test_a_host_is_the_kernel_it_runs_or_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(roster, "_BOOT_ID", tmp_path / "boot_id")
    monkeypatch.setattr("platform.node", lambda: "pod-1")
    assert roster.host() == "pod-1"
    (tmp_path / "boot_id").write_text("6ed2\n")
    assert roster.host() == "6ed2"


# The command ----------------------------------------------------------------------------------------------------


def run(*words: object) -> Any:
    profile.forget()
    return CliRunner().invoke(main, ["tune", *(str(word) for word in words)])


def test_the_command_tunes_on_real_workers_with_real_backends(three: Any, tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    lead = tmp_path / "scheduler.json"
    # Dask's own way to write it fails where a worker has sent metrics, whose keys are tuples.
    lead.write_text(json.dumps({"address": three.scheduler.address}))
    three.run(be_quiet)
    words = (SMALL, "--backends", "direct,im2col", "--profile", file)
    done = run(*words, "--dask", lead)
    assert done.exit_code == 0, done.output
    assert "2 measured now" in done.stdout
    assert "[2/2]" in done.stderr
    assert {entry.key.deployment for entry in profile_file.read(file).entries()} == {"plan", "call"}
    data = json.loads(run(*words, "--dask", three.scheduler.address, "--json").stdout)
    (kind,) = data["kinds"]
    assert data["complete"]
    assert [layer["status"] for layer in kind["layers"]] == ["known", "known"]
    assert set(kind["layers"][0]["backends"]) == {"direct", "im2col"}
    assert len(kind["hosts"]) == 1
    # The profile is this machine's too: what the workers learnt is known here.
    assert "2 known from the profile" in run(*words).stdout


def test_the_command_names_each_kind_and_who_is_left_out(three: Any, tmp_path: Path) -> None:
    with stage(three, tmp_path, Part("alpha"), Part("beta", "Two (two)"), Part("gamma", version="0.0.9")):
        done = run(SMALL, "--dask", three.scheduler.address, "--profile", tmp_path / "profile.yaml")
    assert done.exit_code == 0, done.output
    assert "One (one)" in done.stdout
    assert "(alpha)" in done.stdout
    assert "Two (two)" in done.stdout
    assert "it has 0.0.9" in done.stderr
    assert "beta: 1x9x9x4" in done.stderr


@pytest.mark.parametrize(
    ("batch", "more", "code"), [(FAILS, (), 4), (1, ("--time-limit", "0"), 3)], ids=["failed", "left"]
)
def test_the_command_ends_as_tune_does(
    two_kinds: Any, tmp_path: Path, batch: int, more: tuple[str, ...], code: int
) -> None:
    words = (SMALL, "--batch", str(batch), "--profile", tmp_path / "profile.yaml", *more)
    assert run(*words, "--dask", two_kinds.scheduler.address).exit_code == code


@pytest.mark.parametrize("scheduler", ["tcp://127.0.0.1:1", "nowhere.json", "not an address"])
def test_a_scheduler_that_is_not_there_is_one_line(scheduler: str, tmp_path: Path) -> None:
    with dask.config.set({"distributed.comm.timeouts.connect": "200ms"}):
        done = run(SMALL, "--dask", scheduler, "--profile", tmp_path / "profile.yaml")
    assert done.exit_code == 1
    assert f"no Dask scheduler can be reached at '{scheduler}'" in done.stderr
    assert "Traceback" not in done.output
