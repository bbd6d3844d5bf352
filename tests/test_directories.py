"""Which directories are backed up where nobody names one: what cassandra.yaml says, as Cassandra reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tree import Node

import cassbackup
from cassbackup import DoctorOptions, StoreOptions, Usage, data_directories, yaml_texts


@pytest.fixture
def yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of the cassandra.yaml of this machine."""
    path = tmp_path / "cassandra.yaml"
    monkeypatch.setattr(cassbackup, "_YAMLS", (str(path),))
    return path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("data_file_directories:\n    - /d1\n    - /d2\nother: x\n", ["/d1", "/d2"]),
        ("data_file_directories:\n- /d1 # a disk\n# - /d2\n- '/d 3'\n", ["/d1", "/d 3"]),
        ('data_file_directories: [/d1, "/d2"]\n', ["/d1", "/d2"]),
        ("data_file_directories: /d1\nhints_directory: /h\n", ["/d1"]),
        ("# data_file_directories:\n#     - /d1\n", []),
        ("data_file_directories:\nhints_directory: /h\n", []),
    ],
)
def test_directories_are_read_as_yaml_spells_them(text: str, found: list[str]) -> None:
    assert yaml_texts(text, "data_file_directories") == found


def test_the_disk_of_cassandras_own_tables_is_a_data_directory_too(yaml: Path) -> None:
    """Without it no host id, no tokens and no schema would be in the backup (CASSANDRA-14793)."""
    yaml.write_text("data_file_directories: [/d1]\nlocal_system_data_file_directory: /system-disk\n")
    assert data_directories() == ["/d1", "/system-disk"]
    assert data_directories(["/mine"]) == ["/mine"]


def test_a_yaml_that_names_the_disk_of_cassandras_own_tables_alone_is_refused(yaml: Path) -> None:
    """The others are then below Cassandra's home, wherever that is."""
    yaml.write_text("# data_file_directories: [/d1]\nlocal_system_data_file_directory: /system-disk\n")
    with pytest.raises(Usage, match="names no data_file_directories"):
        data_directories()
    assert data_directories(["/mine"]) == ["/mine"]


def test_a_data_directory_inside_another_is_refused(yaml: Path) -> None:
    yaml.write_text("data_file_directories: [/d1, /d1/more]\n")
    with pytest.raises(Usage, match="inside another"):
        data_directories()


def test_doctor_is_red_where_a_path_leaves_out_what_cassandra_names(yaml: Path, tmp_path: Path, node: Node) -> None:
    node.table("ks1", "users").flush()
    [data] = node.data_dirs
    options = DoctorOptions({}, str(tmp_path), StoreOptions(), bucket=f"file://{tmp_path}/bucket", paths=(str(data),))

    def check() -> tuple[str, str]:
        [found] = [one for one in cassbackup.doctor(options).document["checks"] if one["name"] == "data"]
        return found["result"], found["detail"]

    yaml.write_text(f"data_file_directories: [{data}]\n")
    assert check() == ("ok", "1 tables")
    yaml.write_text(f"data_file_directories: [{data}]\nlocal_system_data_file_directory: /system-disk\n")
    assert check() == ("bad", "/system-disk of cassandra.yaml is not backed up")
