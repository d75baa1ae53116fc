"""Files of checkpoints: complete or not there, damage is named, nothing good is removed."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from torchtitan.checkpoint import storage
from torchtitan.checkpoint.find import find_checkpoint, what_is_left
from torchtitan.config.faults import ConfigError
from torchtitan.config.schema import Checkpoint, Debug, Job, JobConfig, Metrics, Optimizer, Training

SIZE = 3 * 2**10
ASSETS = Path("tests/assets/tokenizer")


def save(folder, step, content=b"x", origin=None):
    temporary = storage.temporary_path(folder, step)
    storage.new_folder(temporary)
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        (temporary / name).write_bytes(content * SIZE)
    files = {path.name: storage.fingerprint(path) for path in temporary.iterdir()}
    return storage.publish(temporary, {"progress": {"step": step}, "origin": origin or {}, "files": files})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_published_is_whole(tmp_path):
    checkpoint = save(tmp_path, 3)
    assert names(tmp_path) == ["step-3"]
    assert not storage.damage(checkpoint)
    assert not storage.altered_files(checkpoint)
    assert storage.read_manifest(checkpoint)["progress"] == {"step": 3}
    assert storage.total_bytes(storage.read_manifest(checkpoint)["files"].values()) == 3 * SIZE


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 5])
def test_every_byte_of_a_file_counts(tmp_path, monkeypatch, num_blocks):
    monkeypatch.setattr(storage, "BLOCK_BYTES", 100)
    for size in {max(0, 100 * num_blocks - 1), 100 * num_blocks, 100 * num_blocks + 1}:
        data = os.urandom(size)
        (tmp_path / "file").write_bytes(data)
        before = storage.fingerprint(tmp_path / "file")
        assert (before["bytes"], len(before["crc32"])) == (size, -(-size // 100))
        for place in {0, size // 2, size - 1} if size else ():
            altered = bytearray(data)
            altered[place] ^= 1
            (tmp_path / "file").write_bytes(altered)
            assert storage.fingerprint(tmp_path / "file") != before


DAMAGES = {
    "missing": (lambda path: path.unlink(), "__1_0.distcp is missing"),
    "short": (lambda path: os.truncate(path, SIZE - 1), "__1_0.distcp has 3,071 bytes in place of"),
    "no manifest": (lambda path: path.with_name("manifest.json").unlink(), "manifest.json is missing"),
    "torn manifest": (
        lambda path: os.truncate(path.with_name("manifest.json"), 50),
        "manifest.json cannot be read",
    ),
    "altered manifest": (
        lambda path: path.with_name("manifest.json").write_text(
            path.with_name("manifest.json").read_text().replace('"step": 2', '"step": 3')
        ),
        "manifest.json cannot be read (does not match its checksum)",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, caplog, name):
    damage, words = DAMAGES[name]
    folder = tmp_path / "checkpoint"
    save(folder, 1)
    newest = save(folder, 2)
    damage(newest / "__1_0.distcp")
    assert find_checkpoint(Checkpoint(enable=True), tmp_path, ASSETS) == folder / "step-1"
    assert words in caplog.text and "step-2" in caplog.text
    assert storage.saved_steps(folder) == [1]
    with pytest.raises(ConfigError, match="no checkpoint there is whole"):
        find_checkpoint(Checkpoint(enable=True, load_step=2), tmp_path, ASSETS)
    damage(folder / "step-1" / "__1_0.distcp")
    if name != "altered manifest":  # which step-1 is not by the same words
        with pytest.raises(ConfigError, match=r"no checkpoint there is whole.*step-2.*step-1"):
            find_checkpoint(Checkpoint(enable=True), tmp_path, ASSETS)


def going_back(folder, **sections):
    load = Checkpoint(enable=True, load_step=2)
    return JobConfig(job=Job(dump_folder=str(folder)), checkpoint=load, **sections)


def start(config):
    folder = Path(config.job.dump_folder)
    return find_checkpoint(config.checkpoint, folder, ASSETS, None, config).name


def test_a_run_that_went_back_goes_on_from_what_it_has_saved_since(tmp_path, caplog):
    """The same command again, as of a cluster that queues it again: nothing trained since is lost."""
    caplog.set_level("INFO")
    folder, command = tmp_path / "checkpoint", going_back(tmp_path)
    for step in (2, 4, 6):
        save(folder, step, origin={"config": asdict(JobConfig())})  # of the run that is left behind
    assert start(command) == "step-2"
    assert what_is_left(command) == f"the same command goes on from {folder}/step-2"
    settled = replace(command, debug=Debug(seed=7), training=Training(global_batch_size=8))
    for step in (4, 5):
        save(folder, step, origin={"config": asdict(settled)})
    storage.remove_leftovers(folder)
    assert start(command) == start(settled) == "step-5"
    assert "load_step = 2: goes on from" in caplog.text
    assert what_is_left(command) == f"the same command goes on from {folder}/step-5"
    assert start(replace(command, metrics=Metrics(log_freq=1))) == "step-5"  # trains the same
    assert start(going_back(tmp_path, optimizer=Optimizer(lr=1.0))) == "step-2"  # does not
    storage.shutil.rmtree(folder / "step-2")  # as keep_latest_k does in time
    assert start(command) == "step-5"


def test_an_altered_file_is_named_by_the_rank_that_reads_it(tmp_path):
    checkpoint = save(tmp_path, 1)
    path = checkpoint / "__1_0.distcp"
    path.write_bytes(b"y" * SIZE)
    assert not storage.damage(checkpoint)  # of the same size
    parts = [storage.altered_files(checkpoint, part, 2) for part in range(2)]
    assert sorted(parts) == [[], ["__1_0.distcp"]]


def test_a_newer_format_is_refused_and_not_skipped(tmp_path):
    checkpoint = save(tmp_path / "checkpoint", 1)
    content = storage.read_manifest(checkpoint) | {"format": storage.FORMAT + 1}
    content["crc32"] = storage._crc32(json.dumps(content).encode())
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="has format 2; this version knows 1"):
        find_checkpoint(Checkpoint(enable=True), tmp_path, ASSETS)


def test_saving_a_step_again_never_leaves_a_moment_without_it(tmp_path, monkeypatch):
    """The run may end before any of the renames and removals; a whole checkpoint is always found."""
    config = Checkpoint(enable=True)
    folder = tmp_path / "checkpoint"

    class Ended(BaseException):
        pass

    for end_at in range(20):
        save(folder, 5, b"a")
        calls = 0

        def step(original, *args, **kwargs):
            nonlocal calls
            found = find_checkpoint(config, tmp_path, ASSETS)
            assert not storage.altered_files(found)
            if calls == end_at:
                raise Ended
            calls += 1
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            for owner, name in ((storage.Path, "rename"), (storage.shutil, "rmtree"), (os, "fsync")):
                original = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, _o=original, **k: step(_o, *a, **k))
            try:
                save(folder, 5, b"b")
                storage.remove_leftovers(folder)
                ended = False
            except Ended:
                ended = True
        found = find_checkpoint(config, tmp_path, ASSETS)
        assert found is not None and not storage.altered_files(found)
        save(folder, 6)  # the next save cleans up, and nothing else is needed
        storage.remove_leftovers(folder)
        assert {"step-6"} <= set(names(folder)) <= {"step-5", "step-5.replaced", "step-6"}
        storage.shutil.rmtree(folder)
        if not ended:
            assert end_at > 5
            return
    raise AssertionError("more steps than tried")


@pytest.mark.parametrize(
    ("keep", "left"),
    [(2, [4, 5]), (3, [3, 4, 5]), (0, [1, 2, 3, 4, 5]), (5, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])],
)
def test_the_newest_are_kept(tmp_path, keep, left):
    saved = [save(tmp_path, step) for step in range(1, 6)][-1]
    storage.remove_old(tmp_path, keep, saved)
    assert storage.saved_steps(tmp_path) == left


def test_where_all_are_kept_none_is_read(tmp_path, monkeypatch):
    saved = save(tmp_path, 1)
    monkeypatch.setattr(storage, "read_manifest", lambda path: pytest.fail(f"{path} was read"))
    storage.remove_old(tmp_path, 0, saved)


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    saved = [save(tmp_path, step) for step in range(1, 6)]
    for checkpoint in saved[2:]:
        (checkpoint / ".metadata").unlink()
    storage.remove_old(tmp_path, 2, saved[-1])
    assert storage.saved_steps(tmp_path) == [1, 2]


def test_what_was_just_saved_is_kept_even_if_later_steps_are_there(tmp_path):
    for step in (8, 9, 10):
        save(tmp_path, step)
    saved = save(tmp_path, 4)  # a run that went back to an earlier step
    storage.remove_old(tmp_path, 2, saved)
    assert storage.saved_steps(tmp_path) == [4, 9, 10]


def test_leftovers_are_removed(tmp_path):
    save(tmp_path, 1)
    for name in ("step-2.tmp", "step-0.old.tmp", "step-1.replaced"):
        (tmp_path / name).mkdir()
    storage.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-1"]


def test_checkpoints_of_a_run_that_was_gone_back_behind_are_set_aside(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    aside = storage.set_aside_newer(tmp_path, 3)
    assert sorted(path.name for path in aside) == ["aside-step-4-1", "aside-step-6-1"]
    assert storage.saved_steps(tmp_path) == [2] and not storage.damage(aside[0])
    save(tmp_path, 4)
    storage.set_aside_newer(tmp_path, 3)
    assert (tmp_path / "aside-step-4-2").exists()


def test_a_path_to_begin_with_that_is_none_is_answered_with_one_that_works(tmp_path):
    def reason_of(path):
        config = Checkpoint(enable=True, initial_load_path=str(path))
        with pytest.raises(ConfigError) as error:
            find_checkpoint(config, tmp_path / "run", ASSETS)
        (fault,) = error.value.faults
        return f"{fault.reason} {fault.remedy}"

    for step in (2, 10, 11):
        save(tmp_path, step)
    (tmp_path / "step-11" / ".metadata").unlink()
    assert reason_of(tmp_path / "step-9").startswith("no such folder. Give a folder like")
    whole = f"Use its newest checkpoint, {tmp_path / 'step-10'}."
    assert reason_of(tmp_path) == f"is not a whole checkpoint: manifest.json is missing. {whole}"


def test_a_hugging_face_folder_that_was_altered_is_refused(tmp_path):
    config = Checkpoint(enable=True, initial_load_in_hf=True, initial_load_path=str(tmp_path))
    with pytest.raises(ConfigError, match="config.json does not match.*Move .*manifest.json away"):
        altered = {tmp_path: "config.json does not match its checksum"}
        find_checkpoint(config, tmp_path / "run", ASSETS, altered)
