import contextlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from janus_proto.v1 import control_pb2
from janus_server.controller.config import PoolConfig
from janus_server.controller.membership import (
    FORGOTTEN_AFTER_S,
    LOST_AFTER_S,
    MAX_MEMBERS,
    EpochPlan,
    Membership,
    UnknownWorkerError,
)
from janus_server.controller.registration import RegistrationRefusedError
from janus_server.errors import InvalidRequestError
from tests.fakes.controller import members_of, registration
from tests.fakes.model_specs import SMALL_SPEC

ATTENTION = control_pb2.WORKER_ROLE_ATTENTION
EXPERT = control_pb2.WORKER_ROLE_EXPERT


def membership(attention: int = 1, experts: int = 2, slots: int = 0) -> Membership:
    pools = PoolConfig(attention_workers=attention, expert_workers=experts, expert_slots=slots)
    return members_of(pools)


def join(members: Membership, role: int, *, now_s: float = 0.0, **fields: object) -> str:
    holds_experts = not members.deployment.has_expert_workers
    request = registration(role, holds_experts=holds_experts, **fields)
    worker_id = members.register(request, now_s=now_s).worker_id
    beat(members, worker_id, now_s=now_s)
    return worker_id


def beat(
    members: Membership,
    worker_id: str,
    *,
    ready: int = 0,
    now_s: float = 0.0,
    load: control_pb2.ExpertLoad | None = None,
) -> None:
    """A heartbeat of the worker's own."""
    [own] = [member.incarnation for member in members.members() if member.worker_id == worker_id]
    members.heartbeat(worker_id, incarnation=own, ready_epoch=ready, load=load, now_s=now_s)


def pass_time(members: Membership, since_s: float, seconds: float) -> None:
    """As the controller does: once an interval."""
    for second in range(1, round(seconds) + 1):
        members.expire(since_s + second)


def test_an_epoch_forms_when_both_pools_are_full() -> None:
    members = membership(attention=2, experts=2)
    for role in (EXPERT, ATTENTION, EXPERT):
        join(members, role)
        assert members.epoch is None
    join(members, ATTENTION)
    assert members.epoch.number == 1
    assert [m.worker_id for m in members.epoch.attention_workers] == ["attention-0", "attention-1"]
    assert [m.worker_id for m in members.epoch.expert_workers] == ["expert-0", "expert-1"]


def test_a_worker_that_never_learned_that_it_is_registered_is_in_no_epoch() -> None:
    members = membership(attention=1, experts=1)
    members.register(registration(EXPERT), now_s=0.0)  # the answer was lost
    join(members, ATTENTION)
    assert members.epoch is None
    second = join(members, EXPERT)
    assert [member.worker_id for member in members.epoch.expert_workers] == [second]
    assert second == "expert-1"


def test_every_layer_places_every_expert() -> None:
    members = membership(experts=2)
    for role in (ATTENTION, EXPERT, EXPERT):
        join(members, role)
    placement = members.epoch.placement
    assert (placement.num_workers, placement.slots_per_worker) == (2, 3)
    assert tuple(placement.layers) == SMALL_SPEC.moe_layers
    for slots_WS in placement.layers.values():
        assert set(slots_WS.ravel().tolist()) >= set(range(SMALL_SPEC.num_experts))


def test_the_wanted_number_of_slots_is_given() -> None:
    members = membership(experts=2, slots=5)
    for role in (ATTENTION, EXPERT, EXPERT):
        join(members, role)
    assert members.epoch.placement.slots_per_worker == 5


def test_without_expert_workers_there_is_no_placement() -> None:
    members = membership(attention=1, experts=0)
    join(members, ATTENTION)
    assert members.epoch.expert_workers == ()
    assert members.epoch.placement is None


def test_more_workers_than_wanted_stay_outside() -> None:
    members = membership(attention=1, experts=1)
    for role in (ATTENTION, ATTENTION, EXPERT, EXPERT):
        join(members, role)
    assert len(members.members()) == 4
    assert len(members.epoch.attention_workers) == len(members.epoch.expert_workers) == 1
    assert members.epoch.number == 1


def test_ready_means_ready_for_this_epoch() -> None:
    members = membership(experts=0)
    worker_id = join(members, ATTENTION)
    [member] = members.members()
    assert not members.is_ready(member)
    for epoch in (2, 7, 2**64 - 1):
        with pytest.raises(InvalidRequestError, match=f"is no member of an epoch {epoch}"):
            beat(members, worker_id, ready=epoch)
    assert not members.is_ready(member)
    beat(members, worker_id, ready=1)
    assert members.is_ready(member)


def test_the_version_grows_only_with_what_a_watcher_sees() -> None:
    members = membership(experts=0)
    worker_id = join(members, ATTENTION)
    seen = members.version
    beat(members, worker_id)
    members.expire(LOST_AFTER_S)
    assert members.version == seen
    beat(members, worker_id, ready=1)
    assert members.version == seen + 1


def test_a_silent_worker_is_lost_until_it_is_heard_of() -> None:
    members = membership(experts=0)
    worker_id = join(members, ATTENTION, now_s=100.0)
    beat(members, worker_id, ready=1, now_s=101.0)
    [member] = members.members()
    members.expire(101.0 + LOST_AFTER_S)
    assert members.is_ready(member)
    members.expire(101.1 + LOST_AFTER_S)
    assert member.lost
    assert not members.is_ready(member)
    beat(members, worker_id, ready=1, now_s=120.0)
    assert members.is_ready(member)


def leave(members: Membership, worker_id: str) -> None:
    [own] = [member.incarnation for member in members.members() if member.worker_id == worker_id]
    members.heartbeat(worker_id, incarnation=own, ready_epoch=0, leaving=True, now_s=0.0)


def test_an_expert_worker_that_leaves_is_named_to_its_epoch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    members = membership(attention=2, experts=2)
    workers = [join(members, role) for role in (ATTENTION, ATTENTION, EXPERT, EXPERT)]
    outside = join(members, EXPERT)
    for worker_id in workers:
        beat(members, worker_id, ready=1)
    seen = members.version
    for leaving in (outside, "attention-1"):  # the epoch goes on without them
        leave(members, leaving)
        assert [members.who_left(worker_id) for worker_id in workers] == ["", "", "", ""]
    leave(members, "expert-1")
    assert [members.who_left(worker_id) for worker_id in workers] == ["expert-1"] * 4
    assert members.who_left(outside) == ""
    assert members.version == seen + 3
    ready = [member.worker_id for member in members.members() if members.is_ready(member)]
    assert ready == ["attention-0", "expert-0"]
    assert "expert-1 (pid 1) left: it was told to stop" in caplog.messages
    caplog.clear()
    members.expire(LOST_AFTER_S + 1)
    assert not [message for message in caplog.messages if "expert-1" in message]


def test_a_worker_that_left_forms_no_epoch() -> None:
    members = membership(attention=1, experts=1)
    leave(members, join(members, EXPERT))
    join(members, ATTENTION)
    assert members.epoch is None


def test_lost_workers_form_no_epoch_and_returned_ones_do() -> None:
    members = membership(attention=1, experts=1)
    expert = join(members, EXPERT, now_s=0.0)
    members.expire(LOST_AFTER_S + 1)
    join(members, ATTENTION, now_s=LOST_AFTER_S + 1)
    assert members.epoch is None
    beat(members, expert, now_s=LOST_AFTER_S + 2)
    assert members.epoch is not None


def test_a_worker_of_another_model_is_refused() -> None:
    members = membership()
    with pytest.raises(RegistrationRefusedError, match="serves another model"):
        join(members, EXPERT, model_fingerprint="other")
    assert members.members() == ()


def test_expert_workers_that_compute_with_unlike_things_are_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    older, other = (
        control_pb2.ComputeIdentity(device="cpu", cpu_features=features, versions={"torch": torch})
        for features, torch in ((["avx2"], "2.13.0"), (["amx_bf16", "avx2"], "2.11.0"))
    )
    members = membership(attention=1, experts=4)
    join(members, ATTENTION, compute=other)
    for compute in (older, older, other, other):
        join(members, EXPERT, compute=compute)
    [message] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert message == (
        "expert-0 and expert-2 may round differently, and then choose different experts for a "
        "token: amx_bf16 none and yes; torch 2.13.0 and 2.11.0"
    )


def test_nobody_is_ready_for_an_epoch_that_is_not_there_or_has_others() -> None:
    members = membership(attention=1, experts=0)
    early = membership(attention=1, experts=1)
    with pytest.raises(InvalidRequestError, match="attention-0 is no member of an epoch 1"):
        beat(early, join(early, ATTENTION), ready=1)
    _, outside = join(members, ATTENTION), join(members, ATTENTION)
    with pytest.raises(InvalidRequestError, match="attention-1 is no member of an epoch 1"):
        beat(members, outside, ready=1)


@pytest.mark.parametrize("incarnation", ["", "x", "\u00e9", "0" * 32])
def test_only_the_worker_that_registered_has_a_heartbeat(incarnation: str) -> None:
    members = membership()
    join(members, EXPERT)
    own = members.members()[0].incarnation
    for worker_id, shown in (("expert-0", incarnation), ("expert-9", own), ("", ""), ("\n", own)):
        with pytest.raises(UnknownWorkerError, match="does not know the worker"):
            members.heartbeat(worker_id, incarnation=shown, ready_epoch=0, now_s=0.0)


def test_a_lost_worker_outside_the_epoch_is_forgotten_and_its_id_never_given_again() -> None:
    members = membership(attention=1, experts=0)
    inside, outside = join(members, ATTENTION), join(members, ATTENTION)
    pass_time(members, 0.0, FORGOTTEN_AFTER_S)
    assert [member.worker_id for member in members.members()] == [inside, outside]
    seen = members.version
    members.expire(FORGOTTEN_AFTER_S + 1)
    assert [member.worker_id for member in members.members()] == [inside]
    assert members.version == seen + 1
    with pytest.raises(UnknownWorkerError):
        members.heartbeat(outside, incarnation="", ready_epoch=0, now_s=0.0)
    assert join(members, ATTENTION) == "attention-2"


def test_workers_that_register_again_and_again_are_bounded() -> None:
    members = membership(attention=2, experts=1)
    for _ in range(MAX_MEMBERS):
        join(members, EXPERT)
    with pytest.raises(RegistrationRefusedError, match="4096 workers have registered already"):
        join(members, ATTENTION)
    pass_time(members, 0.0, FORGOTTEN_AFTER_S + 1)
    join(members, ATTENTION)


def test_a_controller_that_was_held_up_takes_nobody_for_lost() -> None:
    members = membership(attention=1, experts=0)
    worker_id = join(members, ATTENTION, now_s=100.0)
    members.expire(101.0)
    members.expire(101.0 + 10 * LOST_AFTER_S)  # it was stopped, and could hear nothing
    [member] = members.members()
    assert not member.lost
    beat(members, worker_id, now_s=102.0 + 10 * LOST_AFTER_S)
    pass_time(members, 102.0 + 10 * LOST_AFTER_S, LOST_AFTER_S + 2)
    assert member.lost


class Calls(RuleBasedStateMachine):
    """Registrations, heartbeats and silence in any order, against what must hold at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.members = membership(attention=1, experts=2)
        self.now_s = 0.0
        self.given: list[tuple[str, str]] = []
        """(id, incarnation) of every worker that ever registered."""
        self.first: EpochPlan | None = None

    @rule(role=st.sampled_from([ATTENTION, EXPERT]))
    def register(self, role: int) -> None:
        member = self.members.register(registration(role), now_s=self.now_s)
        self.given.append((member.worker_id, member.incarnation))

    @rule(data=st.data(), epoch=st.integers(0, 2), is_other=st.booleans())
    def heartbeat(self, data: st.DataObject, epoch: int, is_other: bool) -> None:
        if not self.given:
            return
        worker_id, incarnation = data.draw(st.sampled_from(self.given))
        if is_other:
            incarnation = data.draw(st.sampled_from(self.given))[1]
        with contextlib.suppress(UnknownWorkerError, InvalidRequestError):
            self.members.heartbeat(
                worker_id, incarnation=incarnation, ready_epoch=epoch, now_s=self.now_s
            )
            assert (worker_id, incarnation) in self.given

    @rule(seconds=st.integers(1, 30))
    def wait(self, seconds: int) -> None:
        pass_time(self.members, self.now_s, seconds)
        self.now_s += seconds

    @invariant()
    def holds(self) -> None:
        ids = [worker_id for worker_id, _ in self.given]
        assert len(set(ids)) == len(ids)
        epoch = self.members.epoch
        known = {member.worker_id for member in self.members.members()}
        if epoch is not None:
            self.first = self.first or epoch
            assert epoch is self.first
            assert known >= epoch.ranks.keys()
        for member in self.members.members():
            is_member = epoch is not None and member.worker_id in epoch.ranks
            assert is_member or not self.members.is_ready(member)
            assert is_member or self.now_s - member.last_heard_s <= FORGOTTEN_AFTER_S
        assert self.members.activity.loads.keys() <= known


TestCalls = Calls.TestCase
TestCalls.settings = settings(derandomize=True, max_examples=60, deadline=None)


def test_a_malformed_load_leaves_the_heartbeat(caplog: pytest.LogCaptureFixture) -> None:
    members = membership(experts=1)
    join(members, ATTENTION)
    worker_id = join(members, EXPERT)
    layer = control_pb2.LayerLoad(layer=2, expert_tokens=[1])
    load = control_pb2.ExpertLoad(layers=[layer])
    beat(members, worker_id, ready=1, load=load, now_s=LOST_AFTER_S)
    members.expire(LOST_AFTER_S + 1)
    assert members.is_ready(members.epoch.expert_workers[0])
    assert f"ignored the load that {worker_id} reports" in caplog.text


def test_a_heartbeat_without_a_load_keeps_the_last() -> None:
    members = membership(experts=1)
    worker_id = join(members, EXPERT)
    beat(members, worker_id, load=control_pb2.ExpertLoad(num_token_pairs=3))
    beat(members, worker_id, now_s=1.0)
    assert members.activity.loads[worker_id].num_token_pairs == 3


def test_tokens_of_late_come_from_one_worker() -> None:
    members = membership(experts=2)
    join(members, ATTENTION)
    workers = [join(members, EXPERT) for _ in range(2)]
    layer = control_pb2.LayerLoad(layer=2, num_steps=1, expert_tokens=[3, 0, 1, 0, 0])
    load = control_pb2.ExpertLoad(num_layer_steps=1, layers=[layer])
    for worker_id in workers:
        beat(members, worker_id, ready=1, load=load, now_s=1.0)
    [(index, tokens_E)] = members.activity.recent_tokens.of().items()
    assert (index, tokens_E.tolist()) == (2, [3, 0, 1, 0, 0])
