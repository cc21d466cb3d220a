"""Doctor's checks of ports, interfaces, the NPUs' links and the other machines."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from doctor_machines import NODES, FakeMachine, MakeSubject, fake, subject
from openpangu_sft.doctor import network
from openpangu_sft.doctor.finding import State, guarded

__all__ = ["fake", "subject"]


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    server = socket.create_server(("", 0))
    yield server
    server.close()


def test_ports(fake: FakeMachine, subject: MakeSubject, listening: socket.socket) -> None:
    assert network.ports(subject()).state == State.OK
    port = listening.getsockname()[1]
    taken = network.ports(subject(HCCL_IF_BASE_PORT=str(port)))
    assert (taken.state, f"{port} (HCCL)" in taken.found) == (State.FAILED, True)
    first = network.ports(subject(*NODES, MASTER_PORT=str(port), NODE_RANK="0"))
    assert (first.state, f"{port} (MASTER_PORT)" in first.found) == (State.FAILED, True)
    assert network.ports(subject(*NODES, MASTER_PORT=str(port), NODE_RANK="1")).state == State.OK
    assert network.ports(subject("train.engine=transformers")).state == State.SKIPPED
    assert "no port" in guarded("ports", lambda: network.ports(subject(HCCL_IF_BASE_PORT="x"))).found


def test_ports_that_the_system_gives_to_others(fake: FakeMachine, subject: MakeSubject) -> None:
    fake.write("/proc/sys/net/ipv4/ip_local_port_range", "15000\t60999\n")
    finding = network.ports(subject())
    assert (finding.state, "ip_local_reserved_ports=20000-20015" in finding.remedy) == (State.WARNING, True)
    fake.write("/proc/sys/net/ipv4/ip_local_reserved_ports", "20000-20015\n")
    assert network.ports(subject()).state == State.OK


def test_interfaces(fake: FakeMachine, subject: MakeSubject) -> None:
    fake.write("/sys/class/net/eth0/mtu")
    assert network.interfaces(subject()).found == "eth0"
    wrong = guarded("interfaces", lambda: network.interfaces(subject(HCCL_SOCKET_IFNAME="eth7")))
    assert (wrong.state, wrong.remedy) == (State.FAILED, "one of eth0")


@pytest.mark.parametrize(
    ("link", "health", "state"),
    [
        ("link status: UP", "net health status: Success", State.OK),
        ("link status: UP", "net health status: Init", State.WARNING),
        ("link status: DOWN", "net health status: Fault", State.FAILED),
        ("", "", State.FAILED),
    ],
)
def test_links(fake: FakeMachine, subject: MakeSubject, link: str, health: str, state: State) -> None:
    fake.add_npus("healthy.txt")
    assert network.links(subject()).state == State.SKIPPED
    assert network.links(subject(*NODES)).state == State.WARNING  # no hccn_tool
    fake.program("hccn_tool", f'case "$3" in -link) echo "{link}" ;; *) echo "{health}" ;; esac')
    assert network.links(subject(*NODES)).state == state


def test_the_first_machine(subject: MakeSubject) -> None:
    assert "MASTER_ADDR and NODE_RANK" in network.nodes(subject(*NODES)).found
    assert network.nodes(subject(*NODES, MASTER_ADDR="x", NODE_RANK="2")).state == State.FAILED
    local = network.nodes(subject(*NODES, MASTER_ADDR="localhost", NODE_RANK="0"))
    assert (local.state, "known to this machine only" in local.found) == (State.FAILED, True)
    # of a network for documentation, RFC 5737: nobody's
    assert "no address of this machine" in network.nodes(subject(*NODES, MASTER_ADDR="192.0.2.1", NODE_RANK="0")).found
    unknown = network.nodes(subject(*NODES, MASTER_ADDR="nowhere.invalid", NODE_RANK="0"))
    assert "no name that is known" in unknown.found


def test_the_other_machines(subject: MakeSubject, listening: socket.socket) -> None:
    port = str(listening.getsockname()[1])
    given = {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "1"}
    assert network.nodes(subject(*NODES, **given, MASTER_PORT=port)).state == State.OK
    listening.close()
    early = network.nodes(subject(*NODES, **given, MASTER_PORT=port))
    assert (early.state, "before make sft has begun there" in early.remedy) == (State.WARNING, True)
    unknown = network.nodes(subject(*NODES, MASTER_ADDR="nowhere.invalid", NODE_RANK="1"))
    assert unknown.state == State.FAILED


def test_peers(subject: MakeSubject, listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    assert network.nodes(subject(peers=(f"localhost:{port}",))).found == f"localhost:{port}: answers"
    listening.close()
    refusing = network.nodes(subject(peers=(f"localhost:{port}",)))
    said = f"localhost:{port}: reached; nothing listens on port {port}"
    assert (refusing.state, refusing.found) == (State.OK, said)  # it refuses, so it is there
    finding = network.nodes(subject(peers=("nowhere.invalid",)))
    assert (finding.state, finding.found) == (State.FAILED, "nowhere.invalid: no such name")
