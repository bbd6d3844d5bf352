"""The 51 rows: each fault, and the tests that hold the program to what must be observed.

A row is its number and the fault; then tests, as file::beginning of the name, both without test_, or a file alone; and
after = what the row means now, where the design and the report that the rows come from differ. `make scorecard` runs
the tests, and says of each row whether it holds, fails, or could not be run here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

TABLE = """
1 killed at a boundary of the store
    matrix::a_daemon_killed_at_any_request
2 killed at a local boundary
    matrix::a_daemon_killed_at_any_boundary pinner::a_kill_at_any_unlink
3 killed at random under churn
    kill::kills_at_random model
4 SIGTERM, SIGINT amid an upload
    rows::a_signal_amid daemon::sigterm_ends
5 no memory
    rows::without_memory
6 ledger damaged
    ledger::p4_flipped_bits ledger::p4_a_damaged_file ledger::p4_a_lost_wal model
7 ledger deleted or rolled back
    daemon::local_memory_that_is_gone ledger::p4_a_ledger_that_was_rolled_back model
    = a row without its checksum is not there; TOC.txt, manifest.json and schema.cql are always sent again
8 ledger of another bucket
    rows::a_ledger_of_another_bucket ledger::p4_a_ledger_of_another
9 ledger on a full or failing disk
    rows::a_local_disk_that_fails ledger::p4_a_disk
10 two daemons
    daemon::a_second_daemon pinner::two_daemons
11 two hosts of one name
    daemon::a_daemon_whose_name_was_taken
    = owner.json is written once; another machine is refused with exit 2, and --adopt takes over
12 inotify queue overflow
    pinner::an_overflow storm::a_storm_with_a_queue_of_64
13 inotify watch limit
    pinner::without_room_for_watches
14 directories that come, move and go
    pinner::directories_moved_in pinner::a_directory_made_again pinner::watches_and_descriptors
    storm::a_storm_into_new
15 no inotify
    soak::a_flush_is_listed
16 a file that is still written
    publish::a_listing_is_completed daemon::a_manifest_that_was_too_young pinner::archived_files
    = files linked in are complete; manifest.json and schema.cql are when they have stood still for 0.3 s
17 cleared after the pin
    matrix::a_daemon_killed_at_any_request pinner::pinned_bytes_outlive storm::a_snapshot_that_is_cleared
18 cleared before the pin
    pinner::what_vanishes
19 replaced under the same name
    publish::statistics_that_are_replaced publish::a_generation_that_comes_again model
    = write-once keys by path, @crc32 on another content
20 changed while it is read
    upload::a_file_that_changed upload::a_file_that_grows judge::p1_a_file_that_changes
21 same size and mtime, or the inode again
    publish::an_inode_number publish::toc_that_grows
    = a fingerprint is inode, size, mtime_ns on one disk; what keeps all three is a documented limit
22 no link can be made
    rows::a_local_disk_that_fails rows::an_sstable_of_which pinner::what_cannot_be_linked pinner::where_no_link
    = no held descriptor instead: what can never work is exit 2 with the cure, all else red and tried again
23 store down until pins fill the disk
    daemon::pins_give_way daemon::a_store_that_is_down
24 500, 503, 408 in bursts
    product[500] product[503] product[408] stores::every_store_survives
25 refused, reset, cut
    product[reset] product[cut-request] product[cut-reply]
26 black hole
    product[black-hole] stores::a_black_hole
27 lost acknowledgement
    product[lost-ack] stores::a_lost_reply
28 200 that is an error or a portal
    product[portal] stores::a_burst_of_faults
29 a bit flipped on the wire
    product[flip] product[flip-reply] stores::p1_a_byte_flipped
    = bodies of files and listings; a list over plain http carries no checksum, so use TLS
30 TLS that cannot be trusted
    stores::a_certificate_that_is_not stores::what_the_environment_trusts stores::a_wrong_scheme
31 credentials wrong, rights missing
    product[403] stores::a_refusal_is_named daemon::a_bucket_that_refuses cli::wrong_credentials
32 bucket missing, elsewhere, made anew
    cli::a_bucket_that_is_not_there stores::a_bucket_in_another_region daemon::a_bucket_made_anew model
33 object deleted behind our back
    publish::an_object_deleted verify::every_damage
34 clock wrong
    rows::a_clock ledger::p1_a_clock prune::snapshots_dated
35 multipart cut short
    kill::a_killed_upload_in_parts stores::another_process_goes_on stores::uploads_are_abandoned product[500]
    = goes on where it was; unfinished uploads end after 7 days
36 slow network
    rows::a_slow_network stores::all_threads_share
37 metadata service absent, slow, hostile
    cloud
    = off cloud is what DMI says, never a timeout; on a cloud the daemon pins and waits
38 odd names
    names pinner::every_name stores::every_key
    = a name too long for the store gets a hashed key: nothing is unrepresentable
39 symbolic links
    pinner::a_directory_that_becomes pinner::a_linked_keyspace
40 fifo, socket, device, directory, empty file
    pinner::what_is_no_regular stores::an_empty_file
41 permission denied, then granted
    rows::what_may_not_be_read
42 100,000 files in a directory
    rows::a_hundred_thousand
43 odd host names
    cloud::a_host_name_that_names cloud::a_name_that_cannot cloud::another_host_name
44 bucket damaged
    verify restore::a_damaged_object choose::a_listing_larger
45 hostile listing
    restore::a_hostile_listing choose::whatever_an_entry_says choose::an_entry_that_would_leave
46 restore killed, full, twice at once
    matrix::a_restore restore::a_restore_that_is_killed restore::a_disk_that_is_too_small restore::of_two_restores
    restore::what_is_there_already
47 prune racing everything
    matrix::a_prune prune::no_listing_that_is_there
48 prune in doubt
    prune::any_document prune::nothing_is_deleted_without prune::snapshots_dated product[portal]
49 secrets
    rows::a_secret cli::a_secret
    = core dumps are the machine's affair
50 log lines forged, log gone
    cli::each_event_is_one_line rows::a_log_that_nobody_reads
    = a stderr that is open and never read blocks, as it does for any program; journald reads
51 soak
    soak::a_soak
"""
ENGINES = ("matrix", "product", "model", "soak", "rows")


class Row(NamedTuple):
    """A fault, the tests that hold it, and what it means now."""

    fault: str
    tests: list[str]
    now: list[str]


def read(table: str) -> dict[int, Row]:
    """Read the table."""
    rows: dict[int, Row] = {}
    for line in table.strip().splitlines():
        first, _, rest = line.strip().partition(" ")
        if not line.startswith(" "):
            rows[int(first)] = row = Row(rest, [], [])
        elif first == "=":
            row.now.append(rest)
        else:
            row.tests.extend(line.split())
    return rows


ROWS = read(TABLE)


def is_of(pattern: str, test: str) -> bool:
    """Tell whether a test, as tests/x.py::test_name[parameter] or as one of a class, is one that a row names."""
    path, _, name = test.partition("::")
    name = re.sub("^Test[A-Za-z]+::", "", name)
    before, _, parameter = pattern.partition("[")
    file, _, begins = before.partition("::")
    folder = "tests/faults" if file in ENGINES else "tests"
    is_meant = path == f"{folder}/test_{file}.py" and name.startswith(f"test_{begins}")
    return is_meant and (not parameter or "[" not in name or name.endswith(f"[{parameter}"))
