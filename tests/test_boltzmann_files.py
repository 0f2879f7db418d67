r"""Tests of the files of image machines."""

import pytest
import torch
from torch import nn

from probnets.backend import checkpoints
from probnets.boltzmann import FreeCoupling, GramCoupling
from probnets.boltzmann.files import load_machine, save_machine
from probnets.boltzmann.images import ImageMachine, dense_machine, tier_machine
from probnets.boltzmann.machine import BoltzmannMachine
from probnets.boltzmann.tiers import Tier, TierCoupling

pytestmark = pytest.mark.usefixtures("one_thread")


def machine_of(kind="dense", **options):
    if kind == "dense":
        made = dense_machine((4, 2), 3, 2, features=5, latents=3, latent_states=4, **options)
    elif kind == "tiers":
        made = tier_machine((4, 2), 3, 2, hidden=[(2, 3, 2)], **options)
    elif kind == "features":
        tiers = [Tier(3, 1, 4, 2), Tier(2, 2, 2, 1), Tier(2)]
        links = {(0, 0): 2, (1, 0): 3, (2, 1): 1}
        core = BoltzmannMachine(TierCoupling(tiers, links, features=[4, 7, 5], **options))
        made = ImageMachine(core, shape=(4, 2), levels=3, classes=2)
    else:
        core = BoltzmannMachine(FreeCoupling([3] * 8 + [5, 2], **options))
        made = ImageMachine(core, shape=(4, 2), levels=3, classes=2)
    made.machine.bias.data.normal_()
    made.centres.uniform_()
    return made


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dense", {}),
        ("dense", {"cap": "paper", "margin": 0.01, "dtype": torch.float64}),
        ("dense", {"learn_temperature": True}),
        ("tiers", {"margin": 0.3}),
        ("tiers", {"cap": "paper", "learn_temperature": True}),
        ("features", {"dtype": torch.float64}),
        ("free", {}),
        ("free", {"cap": None}),
    ],
)
def test_machines_come_back(tmp_path, kind, options):
    made, path = machine_of(kind, **options), tmp_path / "machine.safetensors"
    if made.log_temperatures is not None:
        made.log_temperatures.data.normal_()
    save_machine(path, made)
    torch.manual_seed(1)
    found = load_machine(path)
    assert found.state_dict().keys() == made.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    for name in ("shape", "levels", "classes", "pixels", "latents"):
        assert getattr(found, name) == getattr(made, name)
    assert repr(found) == repr(made)
    assert found.machine.coupling.limit == made.machine.coupling.limit
    x, seen = torch.rand(3, 4, 2), torch.rand(3, 4, 2) < 0.5
    before, after = (m.complete(x, seen) for m in (made, found))
    assert torch.equal(after.images, before.images)
    assert torch.equal(after.labels, before.labels)
    save_machine(tmp_path / "again", found)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_the_size_is_that_of_the_weights(tmp_path):
    made, path = machine_of(), tmp_path / "machine.safetensors"
    save_machine(str(path), made)
    assert path.stat().st_size < 4 * sum(x.numel() for x in made.state_dict().values()) + 1000


def test_what_cannot_be_written(tmp_path):
    class Other(GramCoupling):
        pass

    core = BoltzmannMachine(Other([2, 2], 3))
    other = ImageMachine(core, shape=(1, 1), levels=2, classes=2)
    with pytest.raises(TypeError, match=r"expected a GramCoupling.* got Other; save the state_"):
        save_machine(tmp_path / "m", other)
    made = machine_of()
    made.machine.field = nn.Identity()
    with pytest.raises(TypeError, match=r"without a field network, got Identity; save its state_"):
        save_machine(tmp_path / "m", made)
    assert not list(tmp_path.iterdir())


def test_foreign_files(tmp_path):
    path = tmp_path / "machine.safetensors"
    with pytest.raises(FileNotFoundError, match="expected a file of arrays"):
        load_machine(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="expected a file that probnets wrote"):
        load_machine(path)
    checkpoints.write(path, {}, {"what": "backbone", "format": 1})
    with pytest.raises(ValueError, match=r"expected a Boltzmann machine in .*, got 'backbone'"):
        load_machine(path)
    checkpoints.write(path, {}, {"what": "Boltzmann machine", "format": 2})
    with pytest.raises(ValueError, match="a newer probnets may read it"):
        load_machine(path)


def test_truncated_files(tmp_path):
    path = tmp_path / "machine.safetensors"
    save_machine(path, machine_of())
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="expected a file that probnets wrote"):
            load_machine(path)


@pytest.mark.parametrize(
    "change",
    [
        {"levels": 4},
        {"levels": "3"},
        {"shape": [4]},
        {"shape": None},
        {"classes": 7},
        {"coupling": {"kind": "sparse"}},
        {"coupling": {"kind": "gram"}},
        {"coupling": {"kind": "gram", "groups": [3], "features": 5, "cap": "none", "margin": 1}},
        {"coupling": {"kind": "tiers", "tiers": [], "links": []}},
        {"coupling": {}},
        {"coupling": 3},
        {"learn_temperature": True},
    ],
)
@pytest.mark.parametrize("kind", ["dense", "tiers"])
def test_facts_that_do_not_fit(tmp_path, change, kind):
    path = tmp_path / "machine.safetensors"
    save_machine(path, machine_of(kind))
    arrays, facts = checkpoints.read(path)
    checkpoints.write(path, arrays, {**facts, **change})
    with pytest.raises(ValueError, match="expected a machine in"):
        load_machine(path)
    checkpoints.write(path, arrays, {k: v for k, v in facts.items() if k not in change})
    with pytest.raises(ValueError, match=r"expected a machine in .*: there is no"):
        load_machine(path)


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "machine.safetensors"
    save_machine(path, machine_of())
    arrays, facts = checkpoints.read(path)
    name = "machine.coupling.weight"
    for wrong in (arrays[name][1:], arrays[name].astype("float64")):
        checkpoints.write(path, {**arrays, name: wrong}, facts)
        with pytest.raises(ValueError, match=f"expected a machine in .*: expected {name} of"):
            load_machine(path)
    checkpoints.write(path, {**arrays, name: arrays[name] * float("nan")}, facts)
    with pytest.raises(ValueError, match=f"finite weights in .* in {name}"):
        load_machine(path)
