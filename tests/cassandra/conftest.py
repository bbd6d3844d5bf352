"""Fixtures: real Cassandra nodes, of which no more run at a time than a test needs.

cassandra     a node with incremental backups that tests share; each test runs on one with big, one with bti SSTables,
              and some on an older Cassandra
keyspace      a new keyspace in it
new_node      a function that starts a node of the test's own
three_nodes   three nodes of the test's own that are one cluster
scene         a bucket, and the program
score         what a scenario measures: a line of the table that ends the session
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from drill import Score
from jars import OLDER, NotHere, fetch, java
from nodes import Node, Setup, cluster
from scene import Scene
from servers import FileBucket

HERE = Path(__file__).parent
TIMEOUT_S = 600  # several starts of a node, on a machine with other work


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test here more time than tests have elsewhere."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Show with a failure how the logs of the nodes in use end, and where they are."""
    report = yield
    fleet = getattr(item, "funcargs", {}).get("fleet")
    if report.failed and fleet:
        report.sections += [(f"the log of {node}", node.log_end()) for node in fleet.nodes if node.is_wanted]
    return report


@pytest.fixture
def scene(tmp_path: Path, daemon: Any, run_cassbackup: Any, tmp_bucket: FileBucket) -> Scene:
    """Return a directory as the bucket, and the program that fills it."""
    return Scene(tmp_path, daemon, run_cassbackup, tmp_bucket)


SCORES = pytest.StashKey[list[Score]]()


@pytest.fixture
def score(request: pytest.FixtureRequest) -> Score:
    """Return what the table at the end of the session says of this test."""
    name = request.node.name.removeprefix("test_").replace("_", " ")
    request.config.stash.setdefault(SCORES, []).append(Score(name))
    return request.config.stash[SCORES][-1]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what the scenarios measured."""
    scores = config.stash.get(SCORES, [])
    if scores:
        terminalreporter.section("scenarios")
        terminalreporter.write_line(Score.HEAD)
        for one in scores:
            terminalreporter.write_line(one.line())


class Fleet:
    """All nodes of the session. Shared ones keep their data while they are stopped for others."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nodes: list[Node] = []

    def own(self, home: Path, setup: Setup) -> Node:
        """Return a node that is not started yet."""
        self.nodes.append(Node(home, setup))
        return self.nodes[-1]

    def shared(self, name: str, setup: Setup) -> Node:
        """Return the running node of that name; no other runs."""
        home = self.root / name
        node = next((node for node in self.nodes if node.home == home), None) or self.own(home, setup)
        self.stop(but=node)
        return node if node.is_running else node.start()

    def stop(self, but: Node | None = None) -> None:
        """Stop all nodes but one."""
        for node in self.nodes:
            if node is not but:
                node.stop()


@pytest.fixture(scope="session")
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Return the session's nodes; what they leave on the disk is kept if a test failed."""
    try:
        java(), fetch()
    except NotHere as reason:
        pytest.fail(str(reason), pytrace=False)
    found = Fleet(tmp_path_factory.mktemp("cassandra"))
    yield found
    found.stop()
    if not request.session.testsfailed:
        for node in found.nodes:
            shutil.rmtree(node.home, ignore_errors=True)


@pytest.fixture(scope="session", params=["big", "bti"])
def sstables(request: pytest.FixtureRequest) -> str:
    """Return the format of the shared node's SSTables; an older Cassandra is known by its version."""
    if request.param == OLDER:
        try:
            java(OLDER)
        except NotHere as reason:
            pytest.skip(str(reason))
    return str(request.param)


@pytest.fixture
def cassandra(fleet: Fleet, sstables: Any) -> Node:
    which = {"version": OLDER} if sstables == OLDER else {"sstables": sstables}
    return fleet.shared(sstables, Setup(**which, incremental_backups=True))


KEYSPACES = (f"ks{number}" for number in count(1))


@pytest.fixture
def keyspace(cassandra: Node) -> str:
    name = next(KEYSPACES)
    cassandra.create_keyspace(name)
    return name


@pytest.fixture
def new_node(fleet: Fleet, tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Return a function that starts a node, given a name and the fields of its Setup; stop it before the next one."""
    fleet.stop()
    yield lambda name="node", **setup: fleet.own(tmp_path / name, Setup(**setup)).start()
    fleet.stop()


@pytest.fixture
def three_nodes(fleet: Fleet, tmp_path: Path) -> Iterator[list[Node]]:
    fleet.stop()
    with cluster(tmp_path) as nodes:
        fleet.nodes += nodes
        yield nodes
