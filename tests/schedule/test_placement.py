from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.schedule import placement
from engine.schedule.placement import Layout, Role, Seat, lay_out, shortage

POLICY = Role("policy", 2, 1.0, True)
CRITIC = Role("critic", 2, 2.0, True)
REFERENCE = Role("reference", 1, 1.0, True)
ROLLOUT = Role("rollout", 4, 1.0, True)
REWARDS = Role("rewards", 1, 3.0, False)


def units(amount: float) -> int:
    """As Ray 2.60 reads an amount: cut, not rounded."""
    return int(amount * 10_000)


def counted(layout: Layout) -> list[dict[str, int]]:
    """The layout's bundles in units."""
    return [{name: units(amount) for name, amount in bundle.items()} for bundle in layout.bundles]


def taken(layout: Layout) -> list[dict[str, int]]:
    """Units that the seats reserve of each bundle."""
    sums = [dict.fromkeys(bundle, 0) for bundle in layout.bundles]
    for seat in (seat for seats in layout.seats.values() for seat in seats):
        for name, amount in seat.resources.items():
            sums[seat.bundle][name] += units(amount)
    return sums


def where(layout: Layout) -> dict[str, list[int]]:
    """Role -> the bundle of each rank."""
    return {role: [seat.bundle for seat in seats] for role, seats in layout.seats.items()}


def of_bundles(*bundles: dict[str, float]) -> Layout:
    """A layout whose every bundle belongs to a role of its own."""
    return Layout(bundles, {f"role{i}": (Seat(i, bundle),) for i, bundle in enumerate(bundles)}, ())


def test_separate_gives_each_rank_of_each_role_a_bundle_with_a_device():
    layout = lay_out([POLICY, CRITIC, REWARDS], mode="separate", groups=[], device="GPU")
    one, two, pool = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 3.0}
    assert layout.bundles == (one, one, two, two, pool)
    assert layout.seats == {
        "policy": (Seat(0, one), Seat(1, one)),
        "critic": (Seat(2, two), Seat(3, two)),
        "rewards": (Seat(4, pool),),
    }
    assert layout.sharing == ()


def test_packed_tenants_share_a_device_and_keep_their_own_cpus():
    layout = lay_out([POLICY, CRITIC, REWARDS], mode="packed", groups=[], device="GPU")
    assert layout.bundles == ({"CPU": 3.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 1.0}, {"CPU": 3.0})
    assert layout.seats == {
        "policy": (Seat(0, {"CPU": 1.0, "GPU": 0.5}), Seat(1, {"CPU": 1.0, "GPU": 0.5})),
        "critic": (Seat(0, {"CPU": 2.0, "GPU": 0.5}), Seat(1, {"CPU": 2.0, "GPU": 0.5})),
        "rewards": (Seat(2, {"CPU": 3.0}),),
    }
    assert layout.sharing == (("policy", "critic"),)


def test_tenants_that_take_turns_share_the_cpus_of_the_largest_too():
    layout = lay_out([POLICY, CRITIC, REWARDS], mode="turns", groups=[], device="GPU")
    share = {"CPU": 1.0, "GPU": 0.5}
    assert layout.bundles == ({"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 3.0})
    assert layout.seats["policy"] == layout.seats["critic"] == (Seat(0, share), Seat(1, share))
    assert layout.seats["rewards"] == (Seat(2, {"CPU": 3.0}),)
    assert layout.sharing == (("policy", "critic"),)


@pytest.mark.parametrize(("mode", "bundle_cpus", "cpus"), [("packed", 4.0, 1.0), ("turns", 1.0, 0.25)])
def test_four_roles_fit_on_one_device(mode, bundle_cpus, cpus):
    roles = [Role(name, 1, 1.0, True) for name in ("policy", "critic", "reference", "rollout")]
    layout = lay_out(roles, mode=mode, groups=[], device="accel")
    assert layout.bundles == ({"CPU": bundle_cpus, "accel": 1.0},)
    assert layout.seats == {role.name: (Seat(0, {"CPU": cpus, "accel": 0.25}),) for role in roles}
    assert shortage(layout, {"laptop": {"CPU": bundle_cpus, "accel": 1.0}}) is None


def test_a_third_is_rounded_down_so_that_three_fit():
    roles = [Role(name, 1, 1.0, True) for name in ("policy", "critic", "rollout")]
    layout = lay_out(roles, mode="turns", groups=[], device="GPU")
    assert {seat.resources["GPU"] for seats in layout.seats.values() for seat in seats} == {0.3333}
    assert taken(layout) == [{"CPU": 9999, "GPU": 9999}]


def test_amounts_survive_the_cut_that_ray_makes_of_them():
    assert units(0.57) == 5699  # three seats of 0.19 would not go in
    roles = [Role(name, 1, 0.19, True) for name in ("policy", "critic", "rollout")]
    layout = lay_out(roles, mode="packed", groups=[], device=None)
    assert (counted(layout), taken(layout)) == ([{"CPU": 5700}], [{"CPU": 5700}])


def test_uneven_ranks_share_as_far_as_they_go_and_are_alone_after_that():
    layout = lay_out([POLICY, REFERENCE, ROLLOUT], mode="packed", groups=[], device="GPU")
    assert where(layout) == {"policy": [0, 1], "reference": [0], "rollout": [0, 1, 2, 3]}
    assert [bundle["CPU"] for bundle in layout.bundles] == [3.0, 2.0, 1.0, 1.0]
    assert [bundle["GPU"] for bundle in layout.bundles] == [1.0] * 4
    assert [seat.resources["GPU"] for seat in layout.seats["rollout"]] == [0.3333, 0.5, 1.0, 1.0]


def test_each_group_has_its_own_devices_and_a_role_in_no_group_is_alone():
    layout = lay_out(
        [POLICY, REFERENCE, ROLLOUT, CRITIC, REWARDS],
        mode="turns",
        groups=[["critic", "policy"], ["reference"]],
        device="GPU",
    )
    assert where(layout) == {
        "policy": [0, 1],
        "critic": [0, 1],
        "reference": [2],
        "rollout": [3, 4, 5, 6],
        "rewards": [7],
    }
    assert layout.sharing == (("policy", "critic"),)
    assert all(seat.resources == {"CPU": 1.0, "GPU": 1.0} for seat in layout.seats["rollout"])


def test_a_group_left_with_one_started_role_is_as_separate():
    groups = [["policy", "critic"], ["rollout", "reward_model"]]
    layout = lay_out([POLICY, ROLLOUT, REWARDS], mode="turns", groups=groups, device="GPU")
    assert layout == lay_out([POLICY, ROLLOUT, REWARDS], mode="separate", groups=[], device="GPU")


def test_a_pool_without_a_device_is_alone_even_where_a_group_names_it():
    layout = lay_out([POLICY, REWARDS], mode="packed", groups=[["policy", "rewards"]], device="GPU")
    assert layout == lay_out([POLICY, REWARDS], mode="separate", groups=[], device="GPU")


def test_without_devices_the_same_roles_share_cpus_alone():
    layout = lay_out([POLICY, CRITIC, REWARDS], mode="turns", groups=[], device=None)
    assert layout.bundles == ({"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 3.0})
    assert layout.seats["critic"] == (Seat(0, {"CPU": 1.0}), Seat(1, {"CPU": 1.0}))
    assert layout.sharing == (("policy", "critic"),)


@st.composite
def plans(draw):
    names = draw(st.permutations(["policy", "critic", "reference", "reward_model", "rollout", "rewards"]))
    cpus = st.one_of(st.sampled_from([0.19, 0.29, 0.57, 1 / 3, 1.0]), st.floats(0.001, 64))
    roles = [
        Role(name, draw(st.integers(1, 4)), draw(cpus), name != "rewards")
        for name in names[: draw(st.integers(1, len(names)))]
    ]
    cuts = sorted(draw(st.lists(st.integers(0, 5), max_size=3)))
    groups = [names[start:end] for start, end in zip([0, *cuts], [*cuts, 6], strict=True)] if cuts else []
    mode = draw(st.sampled_from(["separate", "packed", "turns"]))
    return roles, mode, groups, draw(st.sampled_from(["GPU", "accel", None]))


@settings(max_examples=300, deadline=None)
@given(plans())
def test_every_rank_has_one_seat_and_no_bundle_is_overfull(plan):
    roles, mode, groups, device = plan
    layout = lay_out(roles, mode=mode, groups=groups, device=device)
    assert {role: len(seats) for role, seats in layout.seats.items()} == {role.name: role.ranks for role in roles}
    assert all(len(set(bundles)) == len(bundles) for bundles in where(layout).values())
    assert {seat.bundle for seats in layout.seats.values() for seat in seats} == set(range(len(layout.bundles)))
    for bundle, used in zip(counted(layout), taken(layout), strict=True):
        assert all(0 < used[name] <= bundle[name] for name in bundle)
    for role in roles:
        with_device = {"CPU", device} if device and role.on_device else {"CPU"}
        assert all(set(seat.resources) == with_device for seat in layout.seats[role.name])


@settings(max_examples=300, deadline=None)
@given(plans())
def test_separate_has_a_bundle_for_each_rank_and_sharing_never_more(plan):
    roles, mode, groups, device = plan
    layout = lay_out(roles, mode=mode, groups=groups, device=device)
    ranks = sum(role.ranks for role in roles)
    tenants = [{role for role, at in where(layout).items() if i in at} for i in range(len(layout.bundles))]
    if mode == "separate":
        assert len(layout.bundles) == ranks
    assert (len(layout.bundles) < ranks) == bool(layout.sharing)
    assert {frozenset(group) for group in layout.sharing} == {frozenset(t) for t in tenants if len(t) > 1} - {
        frozenset(t) for t in tenants for other in tenants if t < other
    }


def test_a_run_that_fills_the_cluster_exactly_fits():
    layout = lay_out([POLICY, REWARDS], mode="separate", groups=[], device="accel")
    assert shortage(layout, {"a": {"CPU": 1, "accel": 1, "memory": 1e9}, "b": {"CPU": 4, "accel": 1}}) is None


def test_tenths_that_add_up_fit():
    layout = of_bundles(*[{"CPU": 0.1}] * 3)
    assert 0.1 + 0.1 + 0.1 > 0.3
    assert shortage(layout, {"a": {"CPU": 0.3}}) is None


def test_too_few_devices_are_told_in_sum_with_a_table_of_roles():
    layout = lay_out([POLICY, REFERENCE, REWARDS], mode="separate", groups=[], device="accel")
    assert shortage(layout, {"a": {"CPU": 16.0, "accel": 1.0, "memory": 1e9}, "b": {"CPU": 0.5, "accel": 1.0}}) == (
        "the run needs 6 CPU, 3 accel "
        "(policy: 2 x (1 CPU, 1 accel), reference: 1 x (1 CPU, 1 accel), rewards: 1 x 3 CPU) "
        "but the whole cluster has 16.5 CPU, 2 accel: 1 accel too few"
    )


def test_a_cluster_without_the_named_device_is_told_that_it_has_none():
    layout = lay_out([POLICY], mode="separate", groups=[], device="acel")
    assert shortage(layout, {"a": {"CPU": 1.0, "accel": 8.0}}) == (
        "the run needs 2 CPU, 2 acel (policy: 2 x (1 CPU, 1 acel)) "
        "but the whole cluster has 1 CPU, 0 acel: 1 CPU, 2 acel too few"
    )


def test_roles_that_share_are_one_line_of_the_table():
    layout = lay_out([POLICY, ROLLOUT], mode="packed", groups=[], device="GPU")
    message = shortage(layout, {})
    assert message is not None
    assert "(policy + rollout: 2 x (2 CPU, 1 GPU), rollout: 2 x (1 CPU, 1 GPU))" in message
    assert "the whole cluster has 0 CPU, 0 GPU: 6 CPU, 4 GPU too few" in message


def test_cpus_on_one_node_and_devices_on_another_do_not_fit():
    layout = lay_out([REWARDS, POLICY], mode="separate", groups=[], device="accel")
    assert shortage(layout, {"head": {"CPU": 8.0}, "worker": {"CPU": 0.5, "accel": 4.0}}) == (
        "the run needs 5 CPU, 2 accel (rewards: 1 x 3 CPU, policy: 2 x (1 CPU, 1 accel)), "
        "but no node has the 1 CPU, 1 accel that policy needs in one place: "
        "head (8 CPU, 0 accel), worker (0.5 CPU, 4 accel)"
    )


def test_three_bundles_of_a_cpu_do_not_fit_on_two_nodes_of_one_and_a_half():
    layout = lay_out([Role("policy", 3, 1.0, True)], mode="separate", groups=[], device=None)
    assert shortage(layout, {"a": {"CPU": 1.5}, "b": {"CPU": 1.5}}) == (
        "the run needs 3 CPU (policy: 3 x 1 CPU), which cannot be divided among the nodes, each part in one place: "
        "2 nodes like a (1.5 CPU)"
    )
    assert shortage(layout, {"a": {"CPU": 1.0}, "b": {"CPU": 2.0}}) is None


def test_a_division_that_greed_overlooks_is_found():
    cpus = [5, 4, 4, 3, 2, 2]  # largest first leaves 1 + 1 for the last 2; 5 + 3 + 2 and 4 + 4 + 2 fit
    assert shortage(of_bundles(*[{"CPU": n} for n in cpus]), {"a": {"CPU": 10}, "b": {"CPU": 10}}) is None


def test_a_pool_leaves_the_cpus_beside_the_devices_to_those_who_need_them():
    layout = of_bundles({"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0})
    assert shortage(layout, {"gpus": {"CPU": 2, "GPU": 2}, "plain": {"CPU": 3}}) is None


@pytest.mark.timeout(20)
def test_a_thousand_nodes_are_decided_exactly():
    nodes = {f"n{i}": {"CPU": 1.5, "GPU": 2.0} for i in range(1000)}
    for ranks, refused in ((1000, False), (1001, True)):
        layout = lay_out([Role("rollout", ranks, 1.0, True)], mode="separate", groups=[], device="GPU")
        message = shortage(layout, nodes)
        assert (message is not None) == refused
    assert message is not None
    assert message.endswith(
        "which cannot be divided among the nodes, each part in one place: 1000 nodes like n0 (1.5 CPU, 2 GPU)"
    )


def test_what_is_undecided_within_the_bound_is_not_refused(monkeypatch):
    layout, nodes = of_bundles(*[{"CPU": 1.0}] * 3), {"a": {"CPU": 1.5}, "b": {"CPU": 1.5}}
    assert shortage(layout, nodes) is not None
    monkeypatch.setattr(placement, "MAX_WORK", 3)
    assert shortage(layout, nodes) is None


def fits(bundles: list[dict[str, int]], nodes: list[dict[str, int]]) -> bool:
    """Whether any assignment of bundles to nodes overfills none: all of them are tried."""
    return any(
        all(
            sum(bundle.get(name, 0) for bundle, at in zip(bundles, assignment, strict=True) if at == i)
            <= node.get(name, 0)
            for i, node in enumerate(nodes)
            for name in ("CPU", "GPU")
        )
        for assignment in product(range(len(nodes)), repeat=len(bundles))
    )


halves = st.integers(1, 6).map(lambda n: n / 2)
bundle = st.one_of(st.fixed_dictionaries({"CPU": halves}), st.fixed_dictionaries({"CPU": halves, "GPU": st.just(1.0)}))


@st.composite
def tight_clusters(draw):
    """Bundles, and nodes that would hold them but for a little moved from one node to another."""
    bundles = draw(st.lists(bundle, min_size=1, max_size=6))
    nodes = [{"CPU": 0.0, "GPU": 0.0} for _ in range(draw(st.integers(1, 3)))]
    for each in bundles:
        node = nodes[draw(st.integers(0, len(nodes) - 1))]
        for name, amount in each.items():
            node[name] += amount
    for name, step in (("CPU", 0.5), ("CPU", 0.5), ("GPU", 1.0)):
        giver, taker = (draw(st.sampled_from(nodes)) for _ in range(2))
        if giver[name] >= step and draw(st.booleans()):
            giver[name] -= step
            taker[name] += step
    nodes[0]["CPU"] = max(0.0, nodes[0]["CPU"] + draw(st.sampled_from([0.0, 0.0, 0.5, -0.5])))
    return bundles, nodes


@settings(max_examples=500, deadline=None)
@given(tight_clusters())
def test_a_layout_is_refused_exactly_where_no_division_among_the_nodes_exists(case):
    bundles, nodes = case
    layout = of_bundles(*bundles)
    in_units = [{name: units(amount) for name, amount in node.items()} for node in nodes]
    refused = shortage(layout, {f"node{i}": node for i, node in enumerate(nodes)}) is not None
    assert refused != fits(counted(layout), in_units)
