"""A real run that is killed without warning and resumed ends as the run that was never killed.

`python tests/kill_and_resume.py` kills more often, and tells of each kill.
"""

import shutil

import pytest

from .kill_and_resume import FLAVOURS, Starter, kill_and_resume, run_whole, write_text


@pytest.mark.slow
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_run_that_is_killed_at_random_moments_ends_as_the_one_that_was_not(tmp_path, flavour):
    text, flags = write_text(tmp_path), FLAVOURS[flavour]
    with Starter() as starter:
        whole = run_whole(starter, tmp_path / "whole", text, flags)
        killed = tmp_path / "killed"
        # One is killed and gone on with as a user does, in an interpreter that begins anew.
        fresh = [6] if flavour == "worker" else []
        kills = kill_and_resume(
            starter, whole, killed, text, flags, kills=12, seed=0, command_line=fresh
        )  # and raises if anything differs
        assert starter.survivors() == []
    assert len(kills) == 12
    assert sum(bool(kill.unfinished) for kill in kills) >= 2  # was killed inside a save
    grown = {size: whole.sizes.index(size) for size in whole.sizes}
    assert len(grown) >= 3
    # Some sizes were reached in a stretch that was killed.
    assert any(kill.resumed_from < step < kill.step for kill in kills for step in grown.values())
    shutil.rmtree(whole.folder)  # 30 MB, which pytest would keep
