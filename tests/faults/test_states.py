"""States, in memory and on disk: what was saved comes back, and what is damaged is named and never used."""

import errno
import random
import shutil

import pytest
import torch

from puna.errors import ArtifactError
from puna.train.resilience import image, inject, memory
from puna.train.resilience.durable import DurableTier
from puna.train.resilience.image import Seal, Snapshot
from puna.train.resilience.memory import MemoryTier
from puna.train.resilience.peers import Peers
from puna.train.resilience.restore import newest


def tensors(step: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(step)
    return {
        "weights": torch.randn(17, 5),
        "half": torch.randn(7).bfloat16(),
        "step": torch.tensor(float(step)),
        "odd": torch.arange(3, dtype=torch.uint8),
        "moments": torch.randn(33),
    }


def snapshot(step: int, **more) -> Snapshot:
    return Snapshot(step=step, tensors=tensors(step), record={"consumed": step * 8}, **more)


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


class Disk:
    """A durable tier that is fed as the saver does."""

    def __init__(self, folder, kept=2):
        self.tier = DurableTier(folder / "work", kept=kept)
        self.memory = MemoryTier(folder / "memory")

    def save(self, step: int, **more) -> None:
        slot, seal = self.memory.save(snapshot(step, **more))
        assert self.tier.save(seal, self.memory.image_path(slot))

    def newest(self, nothing, most=None):
        return newest(Peers(), nothing, self.tier, layout="", most=most)


@pytest.fixture
def disk(tmp_path):
    return Disk(tmp_path)


@pytest.fixture
def nothing(tmp_path):
    """A node without memory of the run."""
    (tmp_path / "nothing").mkdir()
    return tmp_path / "nothing"


def test_an_image_holds_every_tensor_and_is_a_safetensors_file(tmp_path):
    from safetensors.torch import load_file

    tier = MemoryTier(tmp_path)
    slot, seal = tier.save(snapshot(3))
    assert equal(dict(image.tensors(memory.read(seal, tier.image_path(slot)))), tensors(3))
    assert equal(load_file(tier.image_path(slot)), tensors(3))


def test_a_witness_hashes_what_the_holder_writes(tmp_path):
    _, held = MemoryTier(tmp_path / "a").save(snapshot(3))
    _, seen = MemoryTier(tmp_path / "b", holds=False).save(snapshot(3))
    assert held.hash == seen.hash


def test_the_newest_states_stay_in_memory_and_the_verified_one_is_never_written_over(tmp_path):
    tier = MemoryTier(tmp_path)
    for step in range(1, 9):
        tier.save(snapshot(step))
        if step == 3:
            tier.verify((0, 3))
    assert sorted(seal.step for seal in tier.sealed().values()) == [3, 7, 8]


def test_a_slot_that_goes_to_disk_is_not_written_over(tmp_path):
    tier = MemoryTier(tmp_path)
    slot, _ = tier.save(snapshot(1))
    tier.busy.add(slot)
    for step in range(2, 9):
        tier.save(snapshot(step))
    assert tier.sealed()[slot].step == 1


def test_a_copy_that_was_cut_short_has_no_seal(tmp_path, monkeypatch):
    tier = MemoryTier(tmp_path)
    for step in (1, 2, 3):
        tier.save(snapshot(step))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(image, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        tier.save(snapshot(4))
    assert sorted(seal.step for seal in tier.sealed().values()) == [2, 3]


def test_a_step_on_which_replicas_disagree_is_not_available(tmp_path):
    holder, witness = MemoryTier(tmp_path, replica=0), MemoryTier(tmp_path, replica=1, holds=False)
    for step in (1, 2):
        holder.save(snapshot(step))
    witness.save(snapshot(1))
    wrong = tensors(2)
    wrong["weights"][0, 0] += 1
    witness.save(Snapshot(step=2, tensors=wrong))
    assert list(memory.available(tmp_path)[0]) == [(0, 1)]


def test_a_state_comes_back_from_disk(disk, nothing):
    disk.save(10)
    found = disk.newest(nothing)
    assert found.key == (0, 10) and equal(found.tensors, tensors(10))
    assert found.record["consumed"] == 80 and found.tier == "disk"


def test_pieces_of_another_layout_in_memory_are_not_taken_for_this_one_s(disk, tmp_path):
    disk.save(10)
    node = tmp_path / "node"
    for part in range(2):
        left = Snapshot(step=12, tensors=tensors(12), record={"layout": "tensor=2"})
        MemoryTier(node, part=part, parts=2).save(left)
    found = disk.newest(node)
    assert found.key == (0, 10) and found.tier == "disk"
    assert newest(Peers(), node, disk.tier, layout="tensor=2").key == (0, 12)


def test_old_states_are_removed_and_half_written_ones_too(disk):
    (disk.tier.folder / "state-00-00000005").mkdir()
    for step in (10, 20, 30):
        disk.save(step)
    assert [s.step for s in disk.tier.states()] == [20, 30]
    assert not (disk.tier.folder / "state-00-00000005").exists()


def test_memory_is_used_where_it_is_newer(disk, tmp_path):
    disk.save(10)
    tier = MemoryTier(tmp_path / "node")
    tier.save(snapshot(13))
    found = disk.newest(tmp_path / "node")
    assert found.key == (0, 13) and found.tier == "memory"


def test_a_rolled_back_run_goes_on_from_where_it_was_rolled_back_to(disk, nothing):
    disk.save(30)
    disk.save(10, generation=1)
    assert disk.newest(nothing).key == (1, 10)


def damage(kind: str, state, draw: random.Random) -> None:
    image_file = state.path / "part-0000.safetensors"
    if kind == "flipped bit":
        inject.flip_file_bit(image_file, draw)
    elif kind == "truncated":
        inject.truncate_file(image_file, draw)
    elif kind == "missing part":
        image_file.unlink()
    elif kind == "missing seal":
        (state.path / "part-0000.seal").unlink()
    elif kind == "flipped seal":
        inject.flip_file_bit(state.path / "part-0000.seal", draw)
    elif kind == "flipped list":
        inject.flip_file_bit(state.path / "state.json", draw)


DAMAGES = ["flipped bit", "truncated", "missing part", "missing seal", "flipped seal", "flipped list"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_state_is_set_aside_and_named_and_the_one_before_is_used(disk, nothing, kind, capsys):
    disk.save(10)
    disk.save(20)
    damage(kind, disk.tier.states()[-1], random.Random(1))
    found = disk.newest(nothing)
    assert found.key == (0, 10) and equal(found.tensors, tensors(10))
    assert (disk.tier.folder / "damaged-state-00-00000020").is_dir()
    assert "damaged" in capsys.readouterr().err


def test_200_of_200_flipped_bits_are_found(disk):
    disk.save(10)
    state, draw, found = disk.tier.states()[0], random.Random(0), 0
    files = sorted(p for p in state.path.iterdir())
    kept = {p: p.read_bytes() for p in files}
    for _ in range(200):
        file = draw.choices(files, weights=[len(kept[p]) for p in files])[0]
        inject.flip_file_bit(file, draw)
        found += bool(state.check(0))
        file.write_bytes(kept[file])
    assert found == 200 and state.check(0) == ""


def test_a_folder_whose_states_are_all_damaged_stops_the_run(disk, nothing):
    disk.save(10)
    damage("truncated", disk.tier.states()[0], random.Random(1))
    assert disk.newest(nothing) is None
    with pytest.raises(ArtifactError, match="none of them is valid") as error:
        disk.tier.refuse_to_start_over()
    assert "damaged-state-00-00000010" in str(error.value)


def test_a_folder_whose_states_vanished_stops_the_run(disk, nothing):
    disk.save(10)
    shutil.rmtree(disk.tier.states()[0].path)
    assert disk.newest(nothing) is None
    with pytest.raises(ArtifactError, match="state-00-00000010"):
        disk.tier.refuse_to_start_over()


def test_a_fresh_folder_may_start(disk):
    disk.tier.refuse_to_start_over()


def test_a_state_of_several_parts_is_there_when_the_last_part_is(tmp_path):
    tier = DurableTier(tmp_path / "work")
    whole = torch.arange(12.0).reshape(6, 2)
    for part in (1, 0):
        node = MemoryTier(tmp_path / "memory", part=part, parts=2)
        cut = {"w": ((6, 2), (3 * part, 0))}
        piece = Snapshot(step=5, tensors={"w": whole[3 * part : 3 * part + 3].clone(), "b": torch.ones(2)}, cut=cut)
        slot, seal = node.save(piece)
        assert tier.save(seal, node.image_path(slot)) is (part == 0)
        assert len(tier.states()) == (part == 0)
    joined = tier.states()[0].whole()
    assert torch.equal(joined["w"], whole) and torch.equal(joined["b"], torch.ones(2))


def test_a_full_disk_gives_up_the_oldest_state_and_then_says_so(disk, monkeypatch):
    from puna.train.resilience import durable

    disk.save(10)
    disk.save(20)
    slot, seal = disk.memory.save(snapshot(30))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    copy = durable.shutil.copyfileobj
    monkeypatch.setattr(durable.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        disk.tier.save(seal, disk.memory.image_path(slot))
    assert [s.step for s in disk.tier.states()] == [20]  # never the last one
    assert not list(disk.tier.folder.glob("**/*.tmp"))
    monkeypatch.setattr(durable.shutil, "copyfileobj", copy)
    assert disk.tier.save(seal, disk.memory.image_path(slot))


def test_a_seal_notices_any_change(tmp_path):
    seal = Seal(step=1, generation=0, size=9, hash="0" * 32, record={"a": 1.5})
    seal.write(tmp_path / "s")
    assert Seal.read(tmp_path / "s") == seal
    content, draw = (tmp_path / "s").read_bytes(), random.Random(0)
    for _ in range(100):
        inject.flip_file_bit(tmp_path / "s", draw)
        with pytest.raises(ValueError):
            Seal.read(tmp_path / "s")
        (tmp_path / "s").write_bytes(content)


def test_a_save_holds_the_training_up_for_a_moment_only_and_starts_no_thread(tmp_path, monkeypatch):
    """A thread that is started for a save takes Python's lock at once, and the training waits 5 ms for it."""
    import threading
    import time

    from puna.train.resilience.saver import Saver

    saver = Saver(MemoryTier(tmp_path / "memory"), DurableTier(tmp_path / "work"), lambda *_, **__: None)
    saver.start(snapshot(1))
    saver.settle()
    before, released, keep = threading.active_count(), threading.Event(), saver.memory.save
    monkeypatch.setattr(saver.memory, "save", lambda s: (released.wait(10), keep(s))[1])
    began = time.perf_counter()
    saver.start(snapshot(2))
    assert time.perf_counter() - began < 5 and threading.active_count() == before
    assert saver.newest[1].step == 1
    released.set()
    saver.settle()
    assert saver.newest[1].step == 2
