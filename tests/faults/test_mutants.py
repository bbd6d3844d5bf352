"""Test the tests: twenty defects are put into a copy of the program, one at a time; each must turn a row red.

A mutant is a search and a replacement, on the smallest text that says what goes wrong, and the tests that must see it.
Where the text is not there any more, the program was changed: find its new place, or what stands for it now.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import REPOSITORY

from faults.kit import ALL, score

pytestmark = [
    pytest.mark.skipif(not ALL, reason="twenty runs of pytest: only in make test-faults"),
    pytest.mark.timeout(600),
]


class Mutant(NamedTuple):
    """A defect: what is replaced, by what, and the file and words (pytest -k) of tests that must fail then."""

    before: str
    after: str
    file: str
    words: str


MUTANTS = {
    # The ten of the report.
    "drop fsync": Mutant(
        "                os.fsync(file.fileno())\n                yield None  # durable\n",
        "                yield None  # durable\n",
        "test_stores.py",
        "group_is_durable",
    ),
    "list before upload": Mutant(
        "    stored, gone = confirm(store, draft.files, view.doomed, asked)\n",
        "    stored, gone = [as_stored(one) for one in draft.files], list[Known]()\n",
        "test_publish.py",
        "deleted_behind_the_back or keys_pending",
    ),
    "trust the ledger": Mutant(
        "            if found and found.key == entry.key and self.ledger.is_fresh(found):\n",
        "            if found and found.key == entry.key:\n",
        "test_publish.py",
        "deleted_behind_the_back or bucket_that_was_emptied",
    ),
    "ignore the overflow": Mutant(
        "                yield from list(self._places.values())\n", "", "test_pinner.py", "overflow"
    ),
    "let go before the listing": Mutant(
        "            if self._adds(listing, before.listing):\n",
        "            await self._let_go(work)\n            if self._adds(listing, before.listing):\n",
        "faults/test_rows.py",
        "not_listed_yet",
    ),
    "bare prefix": Mutant(
        '((_EXPIRES, ".listings/"), (_GOES, "/"))',
        '((_EXPIRES, ".listings/"), (_GOES, ""))',
        "test_prune.py",
        "no_other_is_touched",
    ),
    "no grace": Mutant("DAY_S: Final = 24 * 3600.0", "DAY_S: Final = 0.0", "test_prune.py", "marked_by_one_run"),
    "follow symbolic links": Mutant(
        "_OPEN_DIRECTORY: Final = os.O_DIRECTORY | os.O_NOFOLLOW",
        "_OPEN_DIRECTORY: Final = os.O_DIRECTORY",
        "test_pinner.py",
        "becomes_a_symlink",
    ),
    "swallow 403": Mutant(
        '("^40[13]|ExpiredToken|InvalidToken|TokenRefresh", Denied,',
        '("^40[13]|ExpiredToken|InvalidToken|TokenRefresh", Missing,',
        "test_stores.py",
        "refusal_is_named",
    ),
    "no HEAD": Mutant(
        "        if is_large or not self._refuses:\n            self._check_free(key)\n",
        "",
        "test_stores.py",
        "p3_a_taken_key",
    ),
    # Ten of version 1's own edges.
    "a pin let go by its name alone": Mutant(
        "        if Fingerprint.of(info) != fingerprint:\n            return  # it changed",
        "        if False:\n            return  # it changed",
        "test_pinner.py",
        "changed_or_came_meanwhile",
    ),
    "the life rule without the inode": Mutant(
        "        if entries.replaced:\n            return False\n",
        "",
        "test_pinner.py",
        "begins_another_life or another_life",
    ),
    "Known taken for Stored": Mutant(
        "if entry.key in certain or check_object(", "if True or check_object(", "test_judge.py", "p1_what_is_absent"
    ),
    "a retry that holds its thread": Mutant(
        "                await asyncio.sleep(wait)\n            else:\n                self.note(",
        "                time.sleep(wait)\n            else:\n                self.note(",
        "test_stores.py",
        "retry_asks_again",
    ),
    "a page shortened": Mutant(
        '            if about.get("IsTruncated") != "true":\n                return\n',
        "            return\n",
        "test_stores.py",
        "list_has_as_many_pages and moto",
    ),
    "released before the reply to the listing": Mutant(
        "                listing = await self._publish(listing, work)\n",
        "                asyncio.ensure_future(self._publish(listing, work))\n",
        "faults/test_rows.py",
        "not_listed_yet",
    ),
    "two loops": Mutant(
        "            self._loop.call_soon_threadsafe(self._news.put_nowait, message)",
        "            asyncio.run_coroutine_threadsafe(self._news.put(message), asyncio.new_event_loop())",
        "test_daemon.py",
        "sigterm_ends_the_daemon_in_good_order",
    ),
    "no reader before the put": Mutant(
        "    check_listing(draft.node, key, body)", "    ()", "test_judge.py", "could_not_read_again"
    ),
    "a heartbeat before the scan": Mutant(
        "        await self._backup.scanned.wait()\n        await self._backup.view(0.0)",
        "        await self._backup.view(0.0)",
        "faults/test_rows.py",
        "no_heartbeat",
    ),
    "a signature cached over midnight": Mutant(
        "key = _signing_key(who.secret_key, day, region)",
        'key = _signing_key(who.secret_key, "20260101", region)',
        "test_stores.py",
        "signing_key or signature",
    ),
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the repository."""
    target = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist")
    shutil.copytree(REPOSITORY, target, ignore=ignored)
    return target


def run(copy: Path, mutant: Mutant) -> subprocess.CompletedProcess[str]:
    """Run the tests that must see a mutant, on what the copy is now."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout", "150"]
    command += ["-m", "not by_hand and not real_server", "-k", mutant.words, f"tests/{mutant.file}"]
    # A root of its own: pytest locks the one that it finds to its user, and other tests become somebody else below it.
    with tempfile.TemporaryDirectory(prefix="cb-") as root:
        environ = {**os.environ, "PYTHONPATH": str(copy), "FAULTS": "", "SCORE": "", "PYTEST_DEBUG_TEMPROOT": root}
        return subprocess.run(command, check=False, capture_output=True, text=True, cwd=copy, env=environ)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_a_row_red(copy: Path, name: str) -> None:
    mutant, program = MUTANTS[name], copy / "cassbackup.py"
    text = program.read_text()
    assert text.count(mutant.before) == 1, "the program has changed: find where this is now"
    sound = run(copy, mutant)
    assert sound.returncode == 0, f"red without the mutant, too: {sound.stdout[-3000:]}"
    program.write_text(text.replace(mutant.before, mutant.after))
    done = run(copy, mutant)
    assert done.returncode == 1, done.stdout[-3000:]
    score(mutants=1)
