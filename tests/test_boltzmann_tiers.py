r"""Tests for the probnets.boltzmann.tiers module."""

import copy
import io
import itertools

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.testing import assert_close

from probnets.backend import grouped_softmax, project_tangent
from probnets.boltzmann.meanfield import mean_field
from probnets.boltzmann.tiers import DenseLink, Tier, TierCoupling, paper_architecture

FLOAT = torch.float64

# Tiers, their links, and features if they are not the channels.
MODELS = {
    "stride 1": ([Tier(3, 1, 4, 5)], {(0, 0): 3}, None),
    "kernel 1": ([Tier(3, 2, 2, 2)], {(0, 0): 1}, None),
    "kernel 5 beyond the map": ([Tier(2, 3, 2, 3)], {(0, 0): 5}, [4]),
    "even kernels": ([Tier(3, 1, 4, 4), Tier(2, 2, 2, 2)], {(0, 0): 4, (1, 0): 2}, None),
    "stride 2": ([Tier(2, 2, 6, 4), Tier(2, 3, 3, 2)], {(1, 0): 3, (1, 1): 3}, [1, 5]),
    "stride 4": ([Tier(2, 1, 8, 4), Tier(3, 2, 2, 1)], {(0, 0): 2, (1, 0): 5}, None),
    "holes": ([Tier(3, 1, 8, 4), Tier(2, 2, 2, 1)], {(1, 0): 3}, None),
    "mixed kernels": (
        [Tier(2, 1, 8, 8), Tier(2, 2, 4, 4), Tier(3, 1, 2, 2)],
        {(0, 0): 3, (1, 0): 4, (1, 1): 3, (2, 0): 5, (2, 1): 2, (2, 2): 1},
        None,
    ),
    "dense head": (
        [Tier(3, 1, 4, 4), Tier(2, 2, 2, 2), Tier(5)],
        {(0, 0): 3, (1, 0): 3, (1, 1): 3, (2, 0): 1, (2, 1): 1, (2, 2): 1},
        None,
    ),
    "dense alone": ([Tier(2, 3), Tier(4)], {(0, 0): 1, (1, 0): 1, (1, 1): 1}, [4, 6]),
}


def build(name, *, scale=1.0, **settings):
    tiers, links, features = MODELS[name]
    coupling = TierCoupling(tiers, links, features=features, dtype=FLOAT, **settings)
    with torch.no_grad():
        for n, weight in enumerate(coupling.parameters()):
            weight.mul_(scale * (1 + n))  # links of different norms
    return coupling


def dense(coupling):
    with torch.no_grad():
        return coupling.dense()


def own_blocks(coupling):
    return coupling.groups.index[:, None] == coupling.groups.index


def matrix(coupling):
    r"""Returns all features A as a matrix, without factors and centring."""
    maps = coupling.to_maps(torch.eye(coupling.states, dtype=FLOAT))
    rows = sorted({row for row, _ in coupling.kernels})
    with torch.no_grad():
        return torch.cat([coupling.features(row, maps).flatten(1) for row in rows], dim=1).T


def one_hot(coupling, batch):
    values = torch.zeros(batch, coupling.states, dtype=FLOAT)
    states = (torch.rand(batch, coupling.variables) * coupling.groups.sizes).long()
    return values.scatter(1, coupling.groups.starts + states, 1.0)


def test_by_hand():
    coupling = TierCoupling(
        [Tier(1, 1, 1, 2)], {(0, 0): 2}, features=[1], cap="paper", dtype=FLOAT
    )
    link = coupling.link(0, 0)
    # The two pixels meet side by side, in either row of the kernel.
    link.weight.data = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]], dtype=FLOAT)
    assert_close(dense(coupling), torch.tensor([[0.0, -0.14], [-0.14, 0.0]], dtype=FLOAT))
    # The squared norm of each column is 30, of which 0.9 are left.
    link.weight.data *= 10
    assert_close(dense(coupling), torch.tensor([[0.0, -0.42], [-0.42, 0.0]], dtype=FLOAT))


def test_dense_link_reads_vectors():
    link = DenseLink(4, 3, size=(2, 5), dtype=FLOAT)
    x = torch.randn(2, 4, 2, 5, dtype=FLOAT)
    assert_close(link(x)[:, :, 0, 0], x.permute(0, 2, 3, 1).reshape(2, -1) @ link.weight.T)
    matrix = link.dense((2, 5))
    y = torch.randn(1, 3, 1, 1, dtype=FLOAT)
    assert_close(link.adjoint(y, (2, 5)).flatten(), matrix.T @ y.flatten())
    # The block of variable 1 of the pixel in row 1 and column 3.
    columns = matrix.view(3, 2, 2, 2, 5)[:, 1, :, 1, 3]
    assert_close(link.block_gram(2)[1, 3, 1], columns.T @ columns)
    assert link.fan_in("weight") == 40


def test_layout():
    coupling = build("dense head")
    maps = coupling.to_maps(torch.arange(2.0 * coupling.states).view(2, -1))
    assert [m.shape for m in maps] == [(2, 3, 4, 4), (2, 4, 2, 2), (2, 5, 1, 1)]
    assert_close(coupling.from_maps(maps), torch.arange(2.0 * coupling.states).view(2, -1))

    # State 1 of variable 0 of the pixel in row 1 and column 0 of the second tier.
    state = coupling.states_of(1).start + (1 * 2 + 0) * 4 + 0 * 2 + 1
    assert maps[1][0, 1, 1, 0] == state
    assert coupling.groups.index[state] == coupling.variables_of(1).start + (1 * 2 + 0) * 2
    assert coupling.variables_of(2) == slice(24, 25)
    assert coupling.states_of(2) == slice(64, 69)


@pytest.mark.parametrize("cap", ["paper", "extended"])
@pytest.mark.parametrize("scale", [0.2, 10.0])
@pytest.mark.parametrize("name", MODELS)
def test_matches_the_definition(name, scale, cap):
    coupling = build(name, scale=scale, cap=cap)
    A, groups = matrix(coupling), coupling.groups
    if cap == "extended":
        A = project_tangent(A, groups)
    columns = list(A.split(groups.sizes.tolist(), dim=1))
    for v, column in enumerate(columns):
        norm = torch.linalg.matrix_norm(column, 2).item()
        columns[v] = column * min(coupling.limit**0.5 / max(norm, 1e-30), 1)
    A = torch.cat(columns, dim=1)
    expected = -(A.T @ A).masked_fill(own_blocks(coupling), 0.0)
    assert_close(dense(coupling), expected)


@pytest.mark.parametrize("cap", ["paper", "extended"])
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("name", MODELS)
def test_is_symmetric_hollow_and_capped(name, scale, cap):
    coupling = build(name, scale=scale, cap=cap, margin=0.05)
    phi = dense(coupling)
    assert (phi - phi.T).abs().max() <= 1e-12
    assert phi[own_blocks(coupling)].abs().max() <= 1e-12
    assert torch.linalg.eigvalsh((phi + phi.T) / 2)[-1] <= coupling.limit + 1e-12
    assert coupling.limit == {"paper": 0.95, "extended": 1.95}[cap]
    if name != "kernel 1":
        assert phi.abs().max() > 1e-3


def test_factors_are_those_of_the_norms():
    coupling = build("dense head", scale=10.0, cap="paper")
    factors = torch.cat([f.flatten() for f in coupling.factors()])
    assert len(factors) == coupling.variables
    columns = matrix(coupling).split(coupling.groups.sizes.tolist(), dim=1)
    norms = torch.stack([torch.linalg.matrix_norm(column, 2) for column in columns])
    assert_close(factors, (0.9**0.5 / norms).clamp(max=1.0))
    assert (factors < 1).any()


def test_scaling_of_one_side_is_not_symmetric():
    coupling = build("dense head", scale=3.0)
    phi = dense(coupling)
    factors = torch.cat([f.flatten() for f in coupling.factors()])[coupling.groups.index]
    one_sided = factors[:, None] * phi / factors
    assert (one_sided - one_sided.T).norm() > 0.1 * one_sided.norm()
    assert (phi - phi.T).norm() < 1e-14 * phi.norm()


def test_kernels_of_one_row_share_their_centre():
    tiers = [Tier(2, 1, 6, 6), Tier(3, 1, 6, 6)]
    narrow = TierCoupling(tiers, {(1, 0): 3, (1, 1): 5}, dtype=FLOAT)
    wide = TierCoupling(tiers, {(1, 0): 5, (1, 1): 5}, dtype=FLOAT)
    wide.link(1, 1).weight.data.copy_(narrow.link(1, 1).weight)
    inner = torch.nn.functional.pad(narrow.link(1, 0).weight, (1, 1, 1, 1))
    wide.link(1, 0).weight.data.copy_(inner)
    assert_close(dense(narrow), dense(wide))


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_matrix(name):
    coupling = build(name)
    q = torch.randn(3, coupling.states, dtype=FLOAT)
    assert_close(coupling(q), q @ dense(coupling))
    assert coupling(q[:0]).shape == (0, coupling.states)


def test_columns_start_with_a_length_of_about_one():
    coupling = paper_architecture(generator=torch.Generator().manual_seed(1))
    for j, tier in enumerate(coupling.tiers):
        lengths = 0
        for row, column in coupling.kernels:
            if column == j:
                blocks = coupling.link(row, j).block_gram(tier.variables)
                lengths += blocks.diagonal(dim1=-1, dim2=-2).mean().item()
        assert 0.8 < lengths < 1.2, j


@pytest.mark.parametrize("cap", ["paper", "extended"])
@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_products_have_gradients(scale, cap):
    tiers = [Tier(2, 1, 2, 4), Tier(2, 2, 1, 2), Tier(3)]
    links = {(0, 0): 2, (1, 0): 3, (2, 1): 1, (2, 2): 1}
    coupling = TierCoupling(tiers, links, features=[2, 2, 3], cap=cap, dtype=FLOAT)
    q = torch.randn(2, coupling.states, dtype=FLOAT, requires_grad=True)
    names = [name for name, _ in coupling.named_parameters()]
    weights = [scale * p.detach() for p in coupling.parameters()]

    def product(q, *weights):
        return functional_call(coupling, dict(zip(names, weights, strict=True)), (q,))

    assert torch.autograd.gradcheck(product, (q, *(w.requires_grad_() for w in weights)))


# Torch's own import of what it transforms by warns.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_transformations_see_the_weights():
    coupling = build("even kernels", scale=3.0)
    q = torch.rand(2, coupling.states, dtype=FLOAT)
    with torch.no_grad():
        coupling(q)  # what is kept must not stand in
    weights = {name: p.detach() for name, p in coupling.named_parameters()}

    def product(weights):
        return functional_call(coupling, weights, (q,))

    stacked = {name: torch.stack([w, 2 * w, 0.1 * w]) for name, w in weights.items()}
    with torch.no_grad():
        found = vmap(product)(stacked)
        for row, factor in zip(found, [1.0, 2.0, 0.1], strict=True):
            assert_close(row, product({name: factor * w for name, w in weights.items()}))

    slope = grad(lambda weights: product(weights).square().sum())(weights)
    tangents = {name: torch.randn_like(w) for name, w in weights.items()}
    with torch.no_grad():
        push = jvp(lambda weights: product(weights).square().sum(), (weights,), (tangents,))[1]
    assert_close(push, sum((slope[name] * tangents[name]).sum() for name in weights))
    assert push.abs() > 1e-3


@pytest.mark.parametrize("cap", ["paper", "extended"])
def test_mean_field_converges_with_a_certificate(cap):
    coupling = build("dense head", scale=3.0, cap=cap)
    pixels, label = coupling.variables_of(0), coupling.variables_of(2)
    observed = torch.zeros(4, coupling.variables, dtype=torch.bool)
    observed[:, pixels] = torch.rand(4, pixels.stop) < 0.4
    assert not observed[:, label].any()
    values = one_hot(coupling, 4)
    bias = torch.randn(coupling.states, dtype=FLOAT)

    found = mean_field(coupling, bias, observed=observed, values=values, tolerance=1e-9)
    assert found.converged.all()
    assert (found.error <= 1e-9).all()
    seen = observed[:, coupling.groups.index]
    step = grouped_softmax(found.marginals @ dense(coupling) + bias, coupling.groups)
    assert_close(found.marginals, torch.where(seen, values, step), rtol=0, atol=1e-8)

    # From other logits, the same solution.
    initial = 5 * torch.randn(4, coupling.states, dtype=FLOAT)
    other = mean_field(
        coupling, bias, observed=observed, values=values, tolerance=1e-9, initial=initial
    )
    distance = (other.marginals - found.marginals).norm(dim=1)
    assert (distance <= other.error + found.error).all()


def test_mean_field_has_gradients_in_the_weights():
    coupling = build("dense head", scale=2.0)
    observed = torch.arange(coupling.variables) < 7
    values = one_hot(coupling, 1)
    bias, head = torch.randn(2, coupling.states, dtype=FLOAT)
    weight = coupling.link(1, 0).weight
    direction = torch.randn_like(weight)

    def loss():
        found = mean_field(
            coupling,
            bias,
            observed=observed,
            values=values,
            tolerance=1e-12,
            adjoint_tolerance=1e-10,
            strict=True,
        )
        return (found.marginals @ head).sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    losses = []
    for sign in (1, -2):
        with torch.no_grad():
            weight += sign * 1e-5 * direction
            losses.append(loss())
    slope = (losses[0] - losses[1]) / 2e-5
    assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=0)
    assert slope.abs() > 1e-3


def test_state_dict_goes_round():
    first, second = build("mixed kernels"), build("mixed kernels", scale=2.0)
    assert (dense(first) - dense(second)).abs().max() > 1e-3
    second.load_state_dict(first.state_dict())
    assert_close(dense(second), dense(first), rtol=0, atol=0)
    assert set(first.state_dict()) == {f"links.{i}_{j}.weight" for i, j in first.kernels}


def test_copies_and_pickles():
    coupling = build("dense head")
    expected = dense(coupling)
    assert_close(dense(copy.deepcopy(coupling)), expected, rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(coupling, file)
    file.seek(0)
    assert_close(dense(torch.load(file, weights_only=False)), expected, rtol=0, atol=0)


def _in_place(coupling):
    with torch.no_grad():
        coupling.link(1, 0).weight.mul_(1.5)


def _data_in_place(coupling):
    coupling.link(1, 0).weight.data.mul_(1.5)


def _data(coupling):
    coupling.link(1, 0).weight.data = 1.5 * coupling.link(1, 0).weight.data


def _loaded(coupling):
    state = coupling.state_dict()
    state["links.1_0.weight"] = 1.5 * state["links.1_0.weight"]
    coupling.load_state_dict(state)


@pytest.mark.parametrize("change", [_in_place, _data_in_place, _data, _loaded])
def test_changed_weights_are_noticed(change):
    coupling = build("dense head")
    before = dense(coupling)
    change(coupling)
    after = dense(coupling)
    assert (after - before).abs().max() > 1e-3

    # With gradients, nothing is kept.
    assert_close(coupling.dense().detach(), after, rtol=0, atol=1e-14)


def test_other_weights_are_noticed():
    coupling = build("dense head", scale=0.1)
    q = torch.rand(2, coupling.states, dtype=FLOAT)
    weights = {name: p.detach() for name, p in coupling.named_parameters()}
    found = []
    with torch.no_grad():
        for scale in (1.0, 2.0, 0.5, 1.0):
            other = {name: scale * w for name, w in weights.items()}
            found.append(functional_call(coupling, other, (q,)))
            assert_close(coupling(q), found[0], rtol=0, atol=0)
    assert_close(found[0], found[3], rtol=0, atol=0)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(found))


def test_types_and_inference_are_noticed():
    coupling = build("dense head")
    expected = dense(coupling)
    with torch.inference_mode():
        copy.deepcopy(coupling)(torch.rand(1, coupling.states, dtype=FLOAT))
    single = coupling.float()
    assert dense(single).dtype == torch.float32
    assert_close(dense(single), expected.float(), rtol=0, atol=1e-5)

    frozen = build("dense head").requires_grad_(requires_grad=False)
    q = torch.rand(1, frozen.states, dtype=FLOAT)
    with torch.inference_mode():
        frozen(q)
    q.requires_grad_()
    (slope,) = torch.autograd.grad(frozen(q).sum(), q)
    assert_close(slope[0], dense(frozen).sum(0))


def test_norms_are_kept_between_products(monkeypatch):
    coupling = build("dense head")
    calls = []
    eigvalsh = torch.linalg.eigvalsh

    def spy(*arguments):
        calls.append(1)
        return eigvalsh(*arguments)

    monkeypatch.setattr(torch.linalg, "eigvalsh", spy)
    mean_field(coupling.requires_grad_(requires_grad=False), torch.randn(coupling.states).double())
    assert len(calls) == len(coupling.tiers)


def test_variables_without_links_stay_alone():
    coupling = TierCoupling([Tier(2, 1, 2, 2), Tier(3)], {(0, 0): 3, (1, 1): 0}, dtype=FLOAT)
    phi = dense(coupling)
    assert not phi[8:].any()
    assert not phi[:, 8:].any()
    assert phi.any()


def test_one_state_and_zero_weights():
    for tiers in ([Tier(1, 2, 2, 2)], [Tier(3, 1, 2, 2)]):
        coupling = TierCoupling(tiers, {(0, 0): 3})
        with torch.no_grad():
            coupling.link(0, 0).weight.mul_(0.0)
        phi = coupling.dense()
        assert not phi.any()
        (slope,) = torch.autograd.grad(phi.sum(), coupling.link(0, 0).weight)
        assert slope.isfinite().all()


def test_generators_make_weights_repeat():
    first, second = (
        TierCoupling(*MODELS["holes"][:2], generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert_close(first.link(1, 0).weight, second.link(1, 0).weight, rtol=0, atol=0)
    state = torch.get_rng_state()
    TierCoupling(*MODELS["holes"][:2], generator=torch.Generator())
    assert torch.equal(state, torch.get_rng_state())


def test_builds_without_memory():
    coupling = paper_architecture(device="meta", dtype=FLOAT)
    assert {p.device.type for p in coupling.parameters()} == {"meta"}
    assert {p.dtype for p in coupling.parameters()} == {FLOAT}


def test_paper_architecture():
    coupling = paper_architecture(dtype=torch.float64)
    assert (coupling.variables, coupling.states) == (3725, 27450)
    counts = {name: p.numel() for name, p in coupling.named_parameters()}
    label = counts.pop("links.3_2.weight") + counts.pop("links.3_3.weight")
    assert (label, sum(counts.values())) == (39_300, 126_000)
    q = grouped_softmax(torch.randn(2, 27450, dtype=torch.float64), coupling.groups)
    with torch.no_grad():
        left, right = coupling(q)[0] @ q[1], coupling(q)[1] @ q[0]
    assert_close(left, right)


@pytest.mark.parametrize(
    ("tiers", "links", "settings", "sentence"),
    [
        ([], {}, {}, "expected one tier or more, got none"),
        ([Tier(0)], {(0, 0): 1}, {}, "expected tier 0 with positive numbers, got Tier"),
        ([Tier(2)], {}, {}, "expected one link or more, got none"),
        ([Tier(2)], {(0, 0): 0}, {}, "expected one link or more, got none"),
        ([Tier(2), Tier(2)], {(0, 1): 1}, {}, r"expected links \(i, j\) with 0 <= j <= i < 2"),
        ([Tier(2, 1, 2, 2)], {(0, 0): -1}, {}, r"expected a kernel >= 0 for the link \(0, 0\)"),
        ([Tier(2, 1, 3, 3), Tier(2)], {(1, 0): 3}, {}, "to a tier of one pixel are dense"),
        (
            [Tier(2, 1, 5, 4), Tier(2, 1, 2, 2)],
            {(1, 0): 3},
            {},
            "expected tier 0 to be a whole number of times as high and wide as tier 1, got",
        ),
        (
            [Tier(2, 1, 2, 8), Tier(2, 1, 2, 4)],
            {(1, 0): 3},
            {},
            r"as high and wide as tier 1, got \(2, 8\) and \(2, 4\)",
        ),
        ([Tier(2, 1), Tier(2, 1, 2, 2)], {(1, 0): 3}, {}, r"got \(1, 1\) and \(2, 2\)"),
        ([Tier(2)], {(0, 0): 1}, {"features": [0]}, "expected features >= 1 for each of 1 tiers"),
        ([Tier(2)], {(0, 0): 1}, {"features": [1, 1]}, "expected features >= 1 for each of 1"),
        ([Tier(2)], {(0, 0): 1}, {"margin": 2.0}, r"expected a margin in \(0, 2\)"),
    ],
)
def test_wrong_options(tiers, links, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TierCoupling(tiers, links, **settings)


def test_wrong_inputs():
    coupling = build("dense head")
    with pytest.raises(ValueError, match=r"expected vectors with shape \(B, 69\), got \(69,\)"):
        coupling(torch.zeros(69))
    with pytest.raises(ValueError, match=r"expected maps with shapes \(B, C, H, W\)"):
        coupling.from_maps([torch.zeros(1, 3, 4, 4)])
    with pytest.raises(ValueError, match=r"expected maps of size \(2, 2\), got \(3, 3\)"):
        coupling.link(2, 1)(torch.zeros(1, 4, 3, 3))


@pytest.mark.parametrize("name", MODELS)
def test_variables_of_one_colour_do_not_couple(name):
    coupling = build(name, cap="paper")
    colours = coupling.colours()
    assert colours.shape == (coupling.variables,)
    index = coupling.groups.index
    alike = (colours[:, None] == colours)[index][:, index]
    assert dense(coupling)[alike].abs().max() < 1e-12


def test_colours_are_few():
    counts = {"stride 1": 9, "kernel 1": 2, "stride 2": 2 * 9 + 3 * 6, "holes": 9}
    for name, count in counts.items():
        assert len(build(name).colours().unique()) == count, name
    # The dense head reads all 980 variables of the third tier, so that all of them couple.
    found = paper_architecture().colours().unique()
    assert len(found) == 9 + 10 * 9 + 980 + 1


def test_tiers_that_do_not_meet_share_colours():
    tiers = [Tier(2, 1, 4, 4), Tier(3, 2, 4, 4)]
    coupling = TierCoupling(tiers, {(0, 0): 2, (1, 1): 2}, dtype=FLOAT)
    assert len(coupling.colours().unique()) == 2 * 4


def test_coordinate_ascent_makes_no_dense_matrix(monkeypatch):
    coupling = build("stride 2")
    bias = torch.randn(2, coupling.states, dtype=FLOAT)
    expected = mean_field(coupling, bias, tolerance=1e-9)
    monkeypatch.setattr(coupling, "dense", None)
    found = mean_field(coupling, bias, tolerance=1e-9, solver="coordinate")
    assert found.converged.all()
    assert_close(found.marginals, expected.marginals, rtol=0, atol=1e-8)


@pytest.mark.parametrize("cap", ["paper", "extended"])
def test_the_operator_is_the_coupling(cap):
    coupling = build("dense head", cap=cap, scale=3.0)
    q = torch.randn(3, coupling.states, dtype=FLOAT)
    weights = list(coupling.parameters())
    pairs = [
        torch.autograd.grad(multiply(q).square().sum(), weights)
        for multiply in (coupling, coupling.operator())
    ]
    assert_close(*pairs)
