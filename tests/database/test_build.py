"""Builds: everything once, more levels later, nothing of other problems, damage repaired."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import resource
import threading
from dataclasses import replace

import pytest
import torch
from layer_problems import LEVELS, all_levels, contents, make_problem, network, places, same_bits

from obc_deploy.database import Database, build, building, outline_of_problem, plan_build
from obc_deploy.errors import DatabaseError, ProblemError, SchemeError
from obc_deploy.schemes import Scheme
from obc_deploy.solvers import METHODS, solve_levels
from obc_deploy.solvers.settings import compression_settings


def some(*texts):
    return lambda outline: [Scheme.parse(text) for text in texts]


@pytest.fixture(autouse=True, params=["in turn", "behind the solver"])
def finishing(request, monkeypatch):
    """Layers are written in turn, or while the next is solved, as with a GPU."""
    behind = request.param == "behind the solver"
    monkeypatch.setattr(building, "_solves_elsewhere", lambda device: behind)
    return request.param


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_database_gives_what_the_solver_gave(tmp_path, method, dtype):
    database = build(network(), all_levels, tmp_path / "db", method=method, dtype=dtype)
    assert database.layers == ("conv1", "block/conv2", "linear")
    for problem in network():
        database.check(problem)
        assert database.levels(problem.name) == LEVELS
        solved = solve_levels(problem, LEVELS, method=method, settings=compression_settings(dtype))
        for scheme, form in zip(LEVELS, solved, strict=True):
            assert same_bits(database.load(problem.name, scheme), form)
            assert database.errors(problem.name)[scheme] == form.error


def test_activations_share_weights(tmp_path, solved):
    database = build([make_problem()], some("w4", "w4a4", "w8a8"), tmp_path / "db")
    assert solved == [("layer", ["w4", "w8"])]
    assert str(database.load("layer", "w4a4").scheme) == "w4a4"
    assert torch.equal(database.load("layer", "w4a4").weight, database.load("layer", "w4").weight)
    before = places(tmp_path / "db")
    more = build([make_problem()], some("w4a8"), tmp_path / "db")
    assert len(solved) == 1
    assert places(tmp_path / "db") == before
    assert [str(level) for level in more.levels("layer")] == ["w4", "w4a4", "w8a8", "w4a8"]


def test_a_second_build_solves_nothing(tmp_path, solved):
    build(network(), all_levels, tmp_path / "db")
    assert [name for name, _ in solved] == ["conv1", "block/conv2", "linear"]
    before, files = contents(tmp_path / "db"), places(tmp_path / "db")
    build(network(), all_levels, tmp_path / "db")
    assert len(solved) == 3
    assert contents(tmp_path / "db") == before
    assert places(tmp_path / "db") == files


def test_more_levels_reuse_the_rest(tmp_path, solved):
    first = build(network(), some("dense", "2:4", "w4a4"), tmp_path / "db")
    kept = {s: first.load("linear", s) for s in first.levels("linear")}
    solved.clear()
    database = build(network(), some("w4", "unstructured@0.5", "2:4"), tmp_path / "db")
    assert solved == [(p.name, ["unstructured@0.5"]) for p in network()]
    assert len(database.levels("linear")) == 5
    for scheme, form in kept.items():
        assert same_bits(database.load("linear", scheme), form)
    # One file a layer, whatever came and went.
    assert len(contents(tmp_path / "db")) == 1 + len(network())


def test_more_layers_leave_the_others_alone(tmp_path, solved):
    build(network()[:2], all_levels, tmp_path / "db")
    files = places(tmp_path / "db")
    database = build(network()[2:], all_levels, tmp_path / "db")
    assert database.layers == ("conv1", "block/conv2", "linear")
    assert files.items() <= places(tmp_path / "db").items()


def test_progress_names_layers_and_grows_to_one(tmp_path):
    seen = []
    levels = some("unstructured@0.5", "w8")
    build(network(), levels, tmp_path / "db", progress=lambda *said: seen.append(said))
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[0] < 0.5
    assert shares[-1] == 1.0
    assert list(dict.fromkeys(name for name, _ in seen)) == ["conv1", "block/conv2", "linear"]


def test_with_a_plan_problems_are_taken_one_at_a_time(tmp_path, finishing):
    folder = tmp_path / "db"
    plan = plan_build([outline_of_problem(p) for p in network()], all_levels, folder)
    stored_when_asked = []

    def made_late():
        for problem in network():
            stored_when_asked.append(len(places(folder)))
            yield problem

    shares = []
    build(
        made_late(), all_levels, folder, plan=plan, progress=lambda _, share: shares.append(share)
    )
    late = int(finishing != "in turn")
    for place, stored in enumerate(stored_when_asked):
        assert place - late <= stored <= place
    assert len(stored_when_asked) == 3
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


CHANGES = {
    "other weights": {"weight": make_problem("conv1", 9, rows=4).weight},
    "another Hessian": {"hessian": make_problem("conv1", 9, rows=4).hessian},
    "damping 0.1 instead of 0.01": {"damping": 0.1},
    "channels 16 instead of 8": {"channels": None},
}


@pytest.mark.parametrize("said", CHANGES)
def test_other_problems_are_refused_by_name(tmp_path, said, solved):
    folder = tmp_path / "db"
    build(network(), some("dense", "2:4"), folder)
    before = contents(folder)
    other = replace(network()[0], **CHANGES[said])
    for use in (
        lambda: build([other], some("dense", "2:4", "w8"), folder),
        lambda: Database.open(folder, [other]),
        lambda: Database.open(folder).check(other),
    ):
        with pytest.raises(DatabaseError, match=f"does not fit layer 'conv1': it is given {said}"):
            use()
    assert len(solved) == 3
    assert contents(folder) == before
    database = build([other], some("w8"), folder, overwrite=True)
    assert solved[3:] == [("conv1", ["dense", "2:4", "w8"])]
    database.check(other)
    assert same_bits(database.load("conv1", "2:4"), solve_levels(other, ["dense", "2:4", "w8"])[1])


@pytest.mark.parametrize("changed", [{"method": "magnitude"}, {"dtype": "float64"}])
def test_other_settings_are_refused(tmp_path, changed):
    build(network(), some("2:4"), tmp_path / "db")
    with pytest.raises(DatabaseError, match=f"{next(iter(changed.values()))} instead of"):
        build(network(), some("2:4"), tmp_path / "db", **changed)


def test_another_version_of_the_solver_solves_again(tmp_path, solved, monkeypatch):
    build(network()[:1], some("dense", "2:4"), tmp_path / "db")
    for module in ("building", "plan"):
        monkeypatch.setattr(f"obc_deploy.database.{module}.SOLVER_VERSION", "newer")
    outlines = [outline_of_problem(problem) for problem in network()[:1]]
    assert plan_build(outlines, some("w8"), tmp_path / "db").missing == 3
    Database.open(tmp_path / "db", network()[:1])
    build(network()[:1], some("w8"), tmp_path / "db")
    assert solved[1:] == [("conv1", ["dense", "2:4", "w8"])]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, empty, remove])
def test_damaged_files_are_found_and_solved_again(tmp_path, damage, solved):
    folder = tmp_path / "db"
    database = build(network(), all_levels, folder)
    database.load("linear", "2:4")
    whole = contents(folder)
    files = places(folder)
    name = next(name for name in files if name.startswith("linear"))
    damage(folder / name)
    # Both who has the database open and who opens it now must notice.
    for reader in (database, Database.open(folder)):
        with pytest.raises(DatabaseError, match="of layer 'linear' is missing or is not what was"):
            reader.load("linear", "2:4")
        assert reader.errors("linear")
        reader.load("conv1", "2:4")
    solved.clear()
    build(network(), some("2:4"), folder)
    assert [layer for layer, _ in solved] == ["linear"]
    assert contents(folder) == whole
    del files[name]
    assert files.items() <= places(folder).items()


@pytest.mark.parametrize("damage", [truncate, empty])
def test_a_damaged_index_is_found_and_built_anew(tmp_path, damage, solved):
    folder = tmp_path / "db"
    build(network(), some("2:4"), folder)
    whole = contents(folder)
    damage(folder / "index.json")
    with pytest.raises(DatabaseError, match="is damaged"):
        Database.open(folder)
    build(network(), some("2:4"), folder)
    assert len(solved) == 6
    assert contents(folder) == whole


def test_an_altered_number_in_the_index_is_found(tmp_path):
    build(network(), some("2:4"), tmp_path / "db")
    path = tmp_path / "db" / "index.json"
    content = json.loads(path.read_text())
    content["layers"]["conv1"]["errors"]["2:4"] *= 0.5
    path.write_text(json.dumps(content))
    with pytest.raises(DatabaseError, match="checksum differs"):
        Database.open(tmp_path / "db")


def test_databases_of_newer_software_are_left_alone(tmp_path):
    build(network(), some("2:4"), tmp_path / "db")
    path = tmp_path / "db" / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    before = contents(tmp_path / "db")
    for use in (Database.open, lambda folder: build(network(), some("w8"), folder)):
        with pytest.raises(DatabaseError, match="schema version 2"):
            use(tmp_path / "db")
    assert contents(tmp_path / "db") == before


def test_an_infinite_error_is_kept(tmp_path):
    # The output is zero as long as nobody changes the weights.
    weight = torch.tensor([[1.0, -3.0, 1.0, 1.0]])
    problem = make_problem(weight=weight, hessian=torch.ones(4, 4, dtype=torch.float64))
    database = build([problem], some("2:4"), tmp_path / "db", method="magnitude")
    assert list(database.errors("layer").values()) == [math.inf]
    assert database.load("layer", "2:4").error == math.inf


@contextlib.contextmanager
def file_size_limit(size):
    """No file may grow beyond it: writing fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_valid(folder, problems, levels):
    database = Database.open(folder, problems)
    for problem in problems:
        for scheme in levels:
            assert database.load(problem.name, scheme).weight.shape == problem.weight.shape
    named = {record.file for record in database.index.layers.values()}
    assert set(contents(folder)) == {"index.json", *named}


def test_a_full_disk_leaves_the_database_valid(tmp_path, solved):
    folder = tmp_path / "db"
    small, large = make_problem("small"), make_problem("large", rows=512, cols=16)
    build([small], some("2:4"), folder)
    before = contents(folder)
    with file_size_limit(8192), pytest.raises(DatabaseError, match="make room"):
        build([small, large], some("2:4"), folder)
    assert contents(folder) == before
    assert_valid(folder, [small], ["2:4"])
    with file_size_limit(8192), pytest.raises(DatabaseError, match="make room"):
        build([replace(large, name="small")], some("2:4"), folder, overwrite=True)
    assert contents(folder) == before
    build([small, large], some("2:4"), folder)
    assert [name for name, _ in solved] == ["small", "large", "small", "large"]
    assert_valid(folder, [small, large], ["2:4"])


def test_a_disk_too_full_for_the_index_leaves_the_database_valid(tmp_path):
    folder = tmp_path / "db"
    layers = [make_problem(f"layer{i}", i) for i in range(12)]
    with file_size_limit(4096), pytest.raises(DatabaseError, match="make room"):
        build(layers, some("w2"), folder)
    done = Database.open(folder).layers
    assert 0 < len(done) < 12
    assert_valid(folder, layers[: len(done)], ["w2"])


def test_what_killed_builds_left_is_removed(tmp_path):
    folder = tmp_path / "db"
    build(network(), some("2:4"), folder)
    whole = contents(folder)
    (folder / ".conv1.4711.partial").write_bytes(b"half")
    (folder / f"conv1-{'0' * 16}.safetensors").write_bytes(b"never recorded")
    (folder / "notes.txt").write_text("the user's own")
    build(network(), some("2:4"), folder)
    assert contents(folder) == {**whole, "notes.txt": b"the user's own"}


def test_one_build_at_a_time(tmp_path):
    build(network(), some("2:4"), tmp_path / "db")
    with (tmp_path / "db" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DatabaseError, match="another build is writing"):
            build(network(), some("w8"), tmp_path / "db")
        assert Database.open(tmp_path / "db").layers
    build(network(), some("w8"), tmp_path / "db")


def test_folders_of_other_things_are_left_alone(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(DatabaseError, match="holds other files"):
        build(network(), some("2:4"), tmp_path)
    with pytest.raises(DatabaseError, match="cannot write"):
        build(network(), some("2:4"), tmp_path / "photo.jpg")
    with pytest.raises(DatabaseError, match=r"it has no index\.json"):
        Database.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_two_layers_of_one_name_are_refused(tmp_path):
    with pytest.raises(DatabaseError, match="two layers are called 'layer'"):
        build([make_problem(seed=1), make_problem(seed=2)], some("2:4"), tmp_path / "db")


def test_schemes_that_do_not_fit_stop_before_any_work(tmp_path, solved):
    layers = [make_problem("fits"), make_problem("odd", cols=18)]
    with pytest.raises(SchemeError, match="'odd'"):
        build(layers, some("2:4"), tmp_path / "db")
    assert solved == []
    assert not (tmp_path / "db").exists()


def test_bad_problems_keep_what_was_finished(tmp_path):
    bad = make_problem("bad", hessian=None)
    with pytest.raises(ProblemError, match="'bad'"):
        build([make_problem("good"), bad], some("2:4"), tmp_path / "db")
    assert_valid(tmp_path / "db", [make_problem("good")], ["2:4"])
    with pytest.raises(ProblemError, match="is no"):
        build([make_problem(weight=torch.zeros(4))], some("2:4"), tmp_path / "db")


def test_an_interrupted_build_is_valid_and_goes_on(tmp_path, finishing):
    folder = tmp_path / "db"

    def interrupt(layer, share):
        if layer == "linear":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(network(), all_levels, folder, progress=interrupt)
    done = Database.open(folder).layers
    assert done[:1] == ("conv1",)
    assert set(done) <= {"conv1", "block/conv2"}
    assert finishing != "in turn" or len(done) == 2
    named = {record.file for record in Database.open(folder).index.layers.values()}
    assert set(contents(folder)) == {"index.json", *named}
    build(network(), all_levels, folder)
    build(network(), all_levels, tmp_path / "uninterrupted")
    assert contents(folder) == contents(tmp_path / "uninterrupted")


def test_a_layer_is_written_while_the_next_is_solved(tmp_path, finishing, monkeypatch):
    events, real_write, real_solve = [], building.write_layer, building.solve_levels
    solving = threading.Event()

    def write(folder, layer, packed):
        # Behind the solver the first layer is held up until the second is being solved.
        if finishing == "behind the solver" and layer == "conv1":
            assert solving.wait(30)
        events.append(("written", layer))
        return real_write(folder, layer, packed)

    def solve(problem, *others, **settings):
        events.append(("solved", problem.name))
        if problem.name != "conv1":
            solving.set()
        return real_solve(problem, *others, **settings)

    monkeypatch.setattr(building, "write_layer", write)
    monkeypatch.setattr(building, "solve_levels", solve)
    build(network(), some("2:4"), tmp_path / "db")
    names = [problem.name for problem in network()]
    if finishing == "in turn":
        wanted = [(what, name) for name in names for what in ("solved", "written")]
        assert events == wanted
    else:
        assert events.index(("solved", names[1])) < events.index(("written", names[0]))
        assert [name for what, name in events if what == "written"] == names
    assert_valid(tmp_path / "db", network(), ["2:4"])


def test_unknown_layers_and_levels_are_named(tmp_path):
    database = build(network(), some("2:4"), tmp_path / "db")
    with pytest.raises(DatabaseError, match="no layer 'conv9'; it has 3: conv1"):
        database.errors("conv9")
    with pytest.raises(DatabaseError, match="no level 'w8a8' of layer 'conv1'"):
        database.load("conv1", "w8a8")


def test_layers_without_levels_and_no_layers(tmp_path):
    assert build([], some("2:4"), tmp_path / "db").layers == ()
    assert build(network(), some(), tmp_path / "db").layers == ()
    assert build(network()[:1], some("2:4"), tmp_path / "db").layers == ("conv1",)
