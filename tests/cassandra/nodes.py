"""Real Apache Cassandra nodes on 127.0.0.1 and its neighbours.

A `Node` is one Cassandra process over a directory of its own, which survives the process: stop it, damage or replace
what lies there, start it again. `cluster()` makes several that know each other. A node's `bin/` holds nodetool,
sstableloader and cqlsh, made for that node: put `bin/` on the PATH or name the scripts, as an operator would.

    with Node(tmp_path / "node", Setup(incremental_backups=True)) as node:
        node.cql("CREATE KEYSPACE ks WITH replication = {'class': 'SimpleStrategy', 'replication_factor': 1}")
        node.nodetool("flush", "ks")
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jars import MODULES, VERSION, fetch, java
from servers import kill_group, tethered

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 90.0
TOOL_TIMEOUT_S = 240.0
LOCAL = "127.0.0.1"

DAEMON_FLAGS = (
    "-Xms512m", "-Xmx512m", "-Xss512k", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-ea", "-da:net.openhft...",
    "-Djdk.attach.allowAttachSelf=true", "-Dio.netty.tryReflectionSetAccessible=true",
    "-Dio.netty.allocator.maxOrder=11", "-Djava.net.preferIPv4Stack=true", "-Dchronicle.analytics.disable=true",
    "-Dcom.sun.management.jmxremote.authenticate=false", "-Dcassandra-foreground=yes",
    "-Dcassandra.skip_wait_for_gossip_to_settle=0", "-Dcassandra.ring_delay_ms=3000",
)  # fmt: skip
TOOL_FLAGS = ("-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
LOGBACK = """\
<configuration>
  <appender name="out" class="ch.qos.logback.core.{appender}">{target}
    <encoder><pattern>%-5level [%thread] %date %F:%L - %msg%n</pattern></encoder>
  </appender>
  <root level="{level}"><appender-ref ref="out"/></root>
</configuration>
"""


# ------------------------------------------------------------------------------------------------------------
# How a node is set up


class Ports(NamedTuple):
    """What a node listens on: other nodes, CQL, JMX. The last is always on 127.0.0.1."""

    storage: int
    native: int
    jmx: int


def free_ports(count: int, addresses: Sequence[str] = (LOCAL,)) -> list[int]:
    """Return ports that nobody uses, below those that the kernel gives to clients: a restart finds them free."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for address in addresses:
                stack.enter_context(socket.socket()).bind((address, port))
            found += [port] if port not in found else []
    return found


@dataclass(frozen=True)
class Setup:
    """What differs from node to node. `yaml` has the last word in cassandra.yaml; `files` are more of conf/."""

    address: str = LOCAL
    version: str = VERSION
    data_directories: int = 1
    incremental_backups: bool = False
    sstables: Literal["big", "bti"] = "big"  # nb-1-big, as 5.0 writes by default, or da-3gxx…-bti
    initial_token: str = ""  # several with commas between them
    auto_bootstrap: bool = True
    seed: str = ""  # the node's own address if empty
    cluster_name: str = "cassbackup's tests"
    jvm: tuple[str, ...] = ()
    yaml: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def cassandra_yaml(home: Path, ports: Ports, setup: Setup) -> dict[str, Any]:
    """Return a node's settings."""
    seeds = setup.seed or f"{setup.address}:{ports.storage}"
    provider = {"class_name": "org.apache.cassandra.locator.SimpleSeedProvider", "parameters": [{"seeds": seeds}]}
    settings: dict[str, Any] = {
        "cluster_name": setup.cluster_name,
        "num_tokens": len(setup.initial_token.split(",")) if setup.initial_token else 4,
        "partitioner": "org.apache.cassandra.dht.Murmur3Partitioner",
        "endpoint_snitch": "SimpleSnitch",
        "seed_provider": [provider],
        "listen_address": setup.address,
        "rpc_address": setup.address,
        "storage_port": ports.storage,
        "native_transport_port": ports.native,
        "data_file_directories": [str(path) for path in data_directories(home, setup)],
        "commitlog_directory": str(home / "commitlog"),
        "saved_caches_directory": str(home / "saved_caches"),
        "hints_directory": str(home / "hints"),
        "commitlog_sync": "periodic",
        "commitlog_sync_period": "10000ms",
        "commitlog_segment_size": "4MiB",
        "incremental_backups": setup.incremental_backups,
        "auto_snapshot": True,
        "auto_bootstrap": setup.auto_bootstrap,
        "materialized_views_enabled": True,
        "sasi_indexes_enabled": True,
        # A busy machine of two cores is no reason to fail a query.
        "read_request_timeout": "30s",
        "range_request_timeout": "30s",
        "write_request_timeout": "30s",
        "request_timeout": "60s",
        "truncate_request_timeout": "60s",
    }
    if setup.initial_token:
        settings["initial_token"] = setup.initial_token
    if setup.sstables == "bti":
        settings |= {
            "storage_compatibility_mode": "NONE",
            "uuid_sstable_identifiers_enabled": True,
            "sstable": {"selected_format": "bti"},
        }
    return {**settings, **setup.yaml}


def data_directories(home: Path, setup: Setup) -> list[Path]:
    """Return the data directories below a node's home: data, data2, …"""
    return [home / ("data" if number == 1 else f"data{number}") for number in range(1, setup.data_directories + 1)]


# ------------------------------------------------------------------------------------------------------------
# A node


class Node:
    """One Cassandra over the directory `home`: conf/, bin/, log/, data/ … It may be stopped and started at will."""

    def __init__(self, home: Path, setup: Setup | None = None, ports: Ports | None = None) -> None:
        self.home = home
        self.setup = setup or Setup()  # may be exchanged while the node is down
        self.ports = ports or Ports(*free_ports(3, sorted({LOCAL, self.setup.address})))
        self._process: subprocess.Popen[bytes] | None = None
        self._driver: Any = None
        self._session: Any = None

    def __enter__(self) -> Node:
        return self.start()

    def __exit__(self, *unused: object) -> None:
        self.stop()

    # Where things are

    @property
    def address(self) -> str:
        """Return the address of CQL and of the other nodes."""
        return self.setup.address

    @property
    def data(self) -> list[Path]:
        """Return the data directories."""
        return data_directories(self.home, self.setup)

    @property
    def bin(self) -> Path:
        """Return the directory with this node's nodetool, sstableloader and cqlsh."""
        return self.home / "bin"

    def table_directories(self, keyspace: str, table: str) -> list[Path]:
        """Return the directories of a table, and of tables of that name dropped before, in all data directories."""
        pattern = re.compile(re.escape(table) + "-[0-9a-f]{32}")
        found = [path for data in self.data for path in (data / keyspace).glob(f"{table}-*")]
        return sorted(path for path in found if pattern.fullmatch(path.name))

    def table_directory(self, keyspace: str, table: str) -> Path:
        """Return a table's only directory."""
        (found,) = self.table_directories(keyspace, table)
        return found

    # The process

    def start(self) -> Node:
        """Start the node and wait until it answers."""
        self.launch()
        return self.until_up()

    def launch(self) -> None:
        """Write the configuration and start the process, without waiting."""
        assert not self.is_running, "it runs already"
        for name in ("conf", "bin", "log"):
            (self.home / name).mkdir(parents=True, exist_ok=True)
        self._write_configuration()
        self._write_scripts()
        arguments = [
            *MODULES,
            f"-javaagent:{next(fetch(self.setup.version).glob('jamm-*.jar'))}",
            *DAEMON_FLAGS,
            *self.setup.jvm,
            f"-Dcassandra.jmx.local.port={self.ports.jmx}",
            *self._own_flags("logback.xml"),
            "org.apache.cassandra.service.CassandraDaemon",
        ]
        with (self.home / "log" / "stdout.log").open("ab") as out:
            self._process = subprocess.Popen(
                tethered([java(self.setup.version), *arguments]),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=self.home,
                start_new_session=True,
            )

    def until_up(self) -> Node:
        """Wait until the node takes CQL; if it ends or takes too long, fail with the end of its log."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._takes_cql():
            assert self.is_running, f"{self} ended while it started:\n{self.log_end()}"
            assert time.monotonic() < deadline, f"{self} is not up after {START_TIMEOUT_S:.0f} s:\n{self.log_end()}"
            time.sleep(0.2)
        return self

    @property
    def is_running(self) -> bool:
        """Tell whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def is_wanted(self) -> bool:
        """Tell whether the node was started and not stopped; it may have died by itself."""
        return self._process is not None

    def stop(self) -> None:
        """End the node as an init system does: SIGTERM, upon which it drains, and SIGKILL if that takes too long.

        Five seconds for a node alone; one whose neighbours are down waits for them a minute: see `kill`.
        """
        self.close_session()
        if self._process is not None and self.is_running:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End the node at once; the commit log keeps what was not flushed."""
        self.close_session()
        if self._process is not None:
            kill_group(self._process)
            self._process = None

    def restart(self) -> Node:
        """Stop the node and start it on the same directories."""
        self.stop()
        return self.start()

    def log_end(self, lines: int = 25) -> str:
        """Return the last lines of the node's log and of what it printed."""
        texts = []
        for path in (self.home / "log" / "system.log", self.home / "log" / "stdout.log"):
            if path.exists():
                texts += [f"--- the end of {path}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(texts)

    def __repr__(self) -> str:
        return f"the node {self.address}:{self.ports.native} in {self.home}"

    # What can be asked of it

    @property
    def session(self) -> Any:
        """Return a session of the Python driver that speaks with this node alone; rows are named tuples."""
        if self._session is None:
            self._driver, self._session = connect(self.address, self.ports.native)
        return self._session

    def cql(self, query: str, values: Sequence[Any] | None = None) -> list[Any]:
        """Run one CQL statement and return its rows."""
        return list(self.session.execute(query, values))

    def create_keyspace(self, name: str, replication: int = 1) -> None:
        """Create a keyspace."""
        how = {"class": "SimpleStrategy", "replication_factor": replication}
        self.cql(f"CREATE KEYSPACE {name} WITH replication = {how}")

    def table_ids(self, keyspace: str) -> dict[str, str]:
        """Return table name -> id, as text."""
        found = self.cql("SELECT table_name, id FROM system_schema.tables WHERE keyspace_name = %s", (keyspace,))
        return {row.table_name: str(row.id) for row in found}

    def local(self) -> Any:
        """Return what the node says of itself: host_id, tokens, data_center, rack, cluster_name …"""
        (found,) = self.cql("SELECT * FROM system.local")
        return found

    def close_session(self) -> None:
        """Close the driver's connections, if there are any."""
        if self._driver is not None:
            self._driver.shutdown()
        self._driver = self._session = None

    def nodetool(self, *args: object, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run nodetool on this node; `check` is the exit code it must have, if any."""
        return self.tool("nodetool", *args, check=check)

    def tool(self, name: str, *args: object, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a script of bin/."""
        command = [str(self.bin / name), *map(str, args)]
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S
        )
        said = f"{name} {args}: exit {done.returncode}, not {check}\n{done.stdout}\n{done.stderr}"
        assert check is None or done.returncode == check, said
        return done

    # Its files

    def _own_flags(self, logback: str) -> list[str]:
        """Return the flags that tie a JVM to this node's directories."""
        conf = self.home / "conf"
        return [
            f"-Dcassandra.config=file://{conf}/cassandra.yaml",
            f"-Dcassandra.storagedir={self.home}",
            f"-Dcassandra.logdir={self.home}/log",
            f"-Dlogback.configurationFile=file:{conf}/{logback}",
            f"-Duser.home={self.home}",
            "-cp",
            f"{conf}:{fetch(self.setup.version)}/*",
        ]

    def _write_configuration(self) -> None:
        # JSON is YAML.
        settings = json.dumps(cassandra_yaml(self.home, self.ports, self.setup), indent=1)
        target = f"<file>{self.home}/log/system.log</file>"
        files = {
            "cassandra.yaml": settings,
            "logback.xml": LOGBACK.format(appender="FileAppender", target=target, level="INFO"),
            "logback-tools.xml": LOGBACK.format(
                appender="ConsoleAppender", target="<target>System.err</target>", level="WARN"
            ),
            **self.setup.files,
        }
        for name, text in files.items():
            (self.home / "conf" / name).write_text(text)

    def _write_scripts(self) -> None:
        """Write bin/: each script is a program of Cassandra's with this node's address filled in."""
        conf = self.home / "conf" / "cassandra.yaml"
        loader = f"-f {conf} -d {self.address} -p {self.ports.native} -sp {self.ports.storage}"
        tools = {
            "nodetool": f"NodeTool -h {LOCAL} -p {self.ports.jmx}",
            "sstableloader": f"BulkLoader {loader}",
            "sstabledump": "SSTableExport",
            "sstablemetadata": "SSTableMetadataViewer",
            "sstablerepairedset": "SSTableRepairedAtSetter",
        }
        flags = [*MODULES, *TOOL_FLAGS, *self._own_flags("logback-tools.xml")]
        (self.home / "conf" / "tools.flags").write_text("\n".join(flags))
        # An older Java may be one without jdk.naming.rmi, which nodetool connects by.
        runs = {**dict.fromkeys(tools, java(self.setup.version)), "nodetool": java()}
        scripts = {
            name: f'{runs[name]} @{self.home}/conf/tools.flags org.apache.cassandra.tools.{tool} "$@"'
            for name, tool in tools.items()
        }
        where = f"CQLSH_HOST={self.address} CQLSH_PORT={self.ports.native} CQL_HISTORY={self.home}/cqlsh_history"
        scripts["cqlsh"] = f'env {where} {Path(sys.executable).with_name("cqlsh")} "$@"'
        for name, command in scripts.items():
            path = self.bin / name
            path.write_text(f"#!/bin/sh\nexec {command}\n")
            path.chmod(0o755)

    def _takes_cql(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self.address, self.ports.native), timeout=1):
            return True
        return False


def connect(address: str, port: int) -> tuple[Any, Any]:
    """Return a driver and its session with one node."""
    from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile  # not needed to fetch
    from cassandra.policies import WhiteListRoundRobinPolicy

    profile = ExecutionProfile(load_balancing_policy=WhiteListRoundRobinPolicy([address]), request_timeout=90)
    driver = Cluster(
        [address],
        port=port,
        protocol_version=5,
        execution_profiles={EXEC_PROFILE_DEFAULT: profile},
        connect_timeout=60,
        control_connection_timeout=60,
    )
    return driver, driver.connect()


# ------------------------------------------------------------------------------------------------------------
# Several nodes


def even_tokens(count: int) -> list[str]:
    """Return tokens that divide the ring evenly."""
    return [str(-(2**63) + number * 2**64 // count) for number in range(count)]


@contextlib.contextmanager
def cluster(home: Path, count: int = 3, **more: Any) -> Iterator[list[Node]]:
    """Run nodes on 127.0.0.1, 127.0.0.2, … with one token each; `more` are further fields of their Setup."""
    addresses = [f"127.0.0.{number}" for number in range(1, count + 1)]
    storage, native = free_ports(2, addresses)
    nodes = [
        Node(
            home / f"node{number}",
            Setup(address=address, initial_token=token, auto_bootstrap=False, seed=f"{LOCAL}:{storage}", **more),
            Ports(storage, native, jmx),
        )
        for number, (address, token, jmx) in enumerate(
            zip(addresses, even_tokens(count), free_ports(count), strict=True), start=1
        )
    ]
    try:
        for node in nodes:
            node.start()
        until_all_see_all(nodes)
        yield nodes
    finally:
        for node in nodes:
            node.kill()


def until_all_see_all(nodes: Sequence[Node]) -> None:
    """Wait until each node says of each that it is up and normal."""
    deadline = time.monotonic() + START_TIMEOUT_S
    for node in nodes:
        while len(re.findall(r"^UN ", node.nodetool("status").stdout, re.MULTILINE)) < len(nodes):
            assert time.monotonic() < deadline, f"{node} does not see all nodes:\n{node.log_end()}"
            time.sleep(1)
