"""Doctor's checks of ports, interfaces, the NPUs' links and the other machines."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from doctor_machines import NODES, FakeMachine, MakeContext, context, fake
from openpangu_sft.doctor import network
from openpangu_sft.doctor.machine import State, guarded

__all__ = ["context", "fake"]


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    server = socket.create_server(("", 0))
    yield server
    server.close()


def test_ports(fake: FakeMachine, context: MakeContext, listening: socket.socket) -> None:
    assert network.ports(context()).state == State.OK
    port = listening.getsockname()[1]
    taken = network.ports(context(HCCL_IF_BASE_PORT=str(port)))
    assert (taken.state, f"{port} (HCCL_IF_BASE_PORT)" in taken.found) == (State.FAILED, True)
    first = network.ports(context(*NODES, MASTER_PORT=str(port), NODE_RANK="0"))
    assert (first.state, f"{port} (MASTER_PORT)" in first.found) == (State.FAILED, True)
    assert network.ports(context(*NODES, MASTER_PORT=str(port), NODE_RANK="1")).state == State.OK
    assert network.ports(context("train.engine=transformers")).state == State.SKIPPED
    assert "no port" in guarded("ports", lambda: network.ports(context(HCCL_IF_BASE_PORT="x"))).found


@pytest.mark.parametrize(("base", "fits"), [("1023", False), ("1024", True), ("65520", True), ("65521", False)])
def test_ports_that_hccl_can_begin_with(
    context: MakeContext, monkeypatch: pytest.MonkeyPatch, base: str, fits: bool
) -> None:
    monkeypatch.setattr(network, "_is_free", lambda port: True)
    finding = guarded("ports", lambda: network.ports(context(HCCL_IF_BASE_PORT=base)))
    wrong = (State.FAILED, f"HCCL_IF_BASE_PORT: '{base}' is no port", "a number from 1024 to 65520")
    assert ((finding.state, finding.found, finding.remedy) == wrong) != fits
    assert fits == (f"16 from {base} " in finding.found)


@pytest.mark.parametrize("port", ["0", "65536", "99999", "-1", "6000x", "٣"])
def test_numbers_that_are_no_port(context: MakeContext, port: str) -> None:
    finding = guarded("ports", lambda: network.ports(context(*NODES, MASTER_PORT=port)))
    assert (finding.state, finding.remedy) == (State.FAILED, "a number from 1 to 65535")
    assert finding.found == f"MASTER_PORT: '{port}' is no port"


def test_a_port_that_is_taken_over_ipv6_only(context: MakeContext) -> None:
    with socket.socket(socket.AF_INET6) as server:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            server.bind(("::", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        server.listen()
        port = server.getsockname()[1]
        finding = network.ports(context(*NODES, MASTER_PORT=str(port)))
        assert (finding.state, finding.found) == (State.FAILED, f"taken: {port} (MASTER_PORT)")


def test_ports_of_a_machine_without_ipv6(
    context: MakeContext, listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.socket

    def without(family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6")
        return real(family, kind)

    monkeypatch.setattr(socket, "socket", without)
    assert network.ports(context()).state == State.OK
    assert network.ports(context(HCCL_IF_BASE_PORT=str(listening.getsockname()[1]))).state == State.FAILED


def test_interfaces(fake: FakeMachine, context: MakeContext) -> None:
    fake.write("/sys/class/net/eth0/mtu")
    fake.write("/sys/class/net/bonding_masters")
    assert network.interfaces(context()).found == "eth0"
    wrong = guarded("interfaces", lambda: network.interfaces(context(HCCL_SOCKET_IFNAME="eth7")))
    assert (wrong.state, wrong.remedy) == (State.FAILED, "one of eth0")
    assert network.interfaces(context(HCCL_SOCKET_IFNAME="eth")).state == State.OK
    assert guarded("interfaces", lambda: network.interfaces(context(GLOO_SOCKET_IFNAME="eth"))).state == State.FAILED


@pytest.mark.parametrize(
    ("link", "health", "state"),
    [
        ("link status: UP", "net health status: Success", State.OK),
        ("link status: UP", "net health status: Init", State.WARNING),
        ("link status: DOWN", "net health status: Fault", State.FAILED),
        ("", "", State.FAILED),
    ],
)
def test_links(fake: FakeMachine, context: MakeContext, link: str, health: str, state: State) -> None:
    fake.add_npus("healthy.txt")
    assert network.links(context()).state == State.SKIPPED
    assert network.links(context(*NODES)).state == State.WARNING  # no hccn_tool
    fake.program("hccn_tool", f'case "$3" in -link) echo "{link}" ;; *) echo "{health}" ;; esac')
    assert network.links(context(*NODES)).state == state


def test_links_of_all_chips(fake: FakeMachine, context: MakeContext) -> None:
    fake.add_npus("a3.txt", count=16)
    asked = fake.root / "asked"
    up = "link status: UP\nnet health status: Success"
    fake.program("hccn_tool", f'echo "$2" >>{asked}; [ "$2" = 5 ] || echo "{up}"')
    finding = network.links(context("parallel.devices_per_node=16", "train.global_batch_size=32", "parallel.nodes=2"))
    assert finding.found == "NPU 2 chip 1: link status says nothing"
    assert sorted(set(asked.read_text().split()), key=int) == [str(device) for device in range(16)]


def test_the_first_machine(context: MakeContext) -> None:
    assert "MASTER_ADDR and NODE_RANK" in network.nodes(context(*NODES)).found
    assert network.nodes(context(*NODES, MASTER_ADDR="x", NODE_RANK="2")).state == State.FAILED
    local = network.nodes(context(*NODES, MASTER_ADDR="localhost", NODE_RANK="0"))
    assert (local.state, "known to this machine only" in local.found) == (State.FAILED, True)
    # of a network for documentation, RFC 5737: nobody's
    assert "no address of this machine" in network.nodes(context(*NODES, MASTER_ADDR="192.0.2.1", NODE_RANK="0")).found
    unknown = network.nodes(context(*NODES, MASTER_ADDR="nowhere.invalid", NODE_RANK="0"))
    assert "no name that is known" in unknown.found


def test_the_other_machines(context: MakeContext, listening: socket.socket) -> None:
    port = str(listening.getsockname()[1])
    given = {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "1"}
    assert network.nodes(context(*NODES, **given, MASTER_PORT=port)).state == State.OK
    listening.close()
    early = network.nodes(context(*NODES, **given, MASTER_PORT=port))
    assert (early.state, "before make sft has started there" in early.remedy) == (State.WARNING, True)
    unknown = network.nodes(context(*NODES, MASTER_ADDR="nowhere.invalid", NODE_RANK="1"))
    assert unknown.state == State.FAILED


NO_NAMES = ["a..b", "a" * 70, ".", "nowhere.invalid"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_cannot_be(context: MakeContext, name: str) -> None:
    for rank, said in ("0", "is no name that is known here"), ("1", "no such name"):
        first = network.nodes(context(*NODES, MASTER_ADDR=name, NODE_RANK=rank))
        assert (first.state, said in first.found) == (State.FAILED, True)


def test_the_first_machine_over_ipv6(context: MakeContext) -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        environment = {"MASTER_ADDR": "::1", "MASTER_PORT": str(server.getsockname()[1]), "NODE_RANK": "1"}
        assert (
            network.nodes(context(*NODES, **environment)).found
            == f"MASTER_ADDR=::1, port {server.getsockname()[1]}: answers"
        )
