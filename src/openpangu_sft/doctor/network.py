"""Ports, interfaces, the NPUs' own network and other machines, for a run on several NPUs or machines."""

from __future__ import annotations

import ipaddress
import re
import socket
from contextlib import suppress

from openpangu_sft.doctor.machine import Context, Finding, failed, ok, skipped, warning
from openpangu_sft.doctor.npu_smi import parse_fields
from openpangu_sft.training.mindspeed.start import require_network
from openpangu_sft.util.errors import UserError

SECONDS = 3.0
MASTER_PORT = "6000"  # default of the variable, as in training/run/launch.py
PORTS = range(1, 1 << 16)
HCCL_BASE, HCCL_COUNT = "60000", 16
HCCL_BASES = range(1024, 65521)
"""HCCL's ports of a host by default, and the range of HCCL_IF_BASE_PORT. Source: CANN 8.0's documentation,
https://www.hiascend.com/document/detail/en/canncommercial/800/apiref/envvar/envref_07_0074.html"""
HCCN_TOOL = "/usr/local/Ascend/driver/tools"


def ports(context: Context) -> Finding:
    """Whether HCCL's ports are free, and MASTER_PORT on the first of several machines."""
    recipe, environment = context.recipe, context.machine.environment
    wanted: dict[str, range] = {}
    if recipe.parallel.nodes > 1 and environment.get("NODE_RANK", "0") == "0":
        port = _port(environment.get("MASTER_PORT") or MASTER_PORT, "MASTER_PORT")
        wanted["MASTER_PORT"] = range(port, port + 1)
    base = _port(environment.get("HCCL_IF_BASE_PORT") or HCCL_BASE, "HCCL_IF_BASE_PORT", HCCL_BASES)
    if context.wants_npus and recipe.parallel.world > 1:
        wanted["HCCL_IF_BASE_PORT"] = range(base, base + HCCL_COUNT)
    taken = [f"{port} ({name})" for name, numbers in wanted.items() for port in numbers if not _is_free(port)]
    if taken:
        remedy = "end what listens there (ss -ltnp), or set this variable"
        return failed(f"taken: {', '.join(taken)}", remedy, "free ports")
    shown = ", ".join(f"{len(numbers)} from {numbers[0]} ({name})" for name, numbers in wanted.items())
    return ok(f"free: {shown}") if wanted else skipped("none is needed")


def _port(value: str, where: str, allowed: range = PORTS) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", value) or int(value) not in allowed:
        raise UserError(f"{value!r} is no port", where=where, remedy=f"a number from {allowed[0]} to {allowed[-1]}")
    return int(value)


def _is_free(port: int) -> bool:
    """Whether this user can listen on a port, over IPv4 and, where this machine has it, IPv6."""
    both = socket.has_dualstack_ipv6()
    with suppress(OSError):
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", port), family=family, dualstack_ipv6=both):
            return True
    return False


def interfaces(context: Context) -> Finding:
    """The interfaces that HCCL and gloo are told to use; raises `UserError` where one does not exist."""
    if context.recipe.parallel.world == 1:
        return skipped("not needed: one process")
    folder = context.machine.path("/sys/class/net")
    require_network(context.machine.environment, folder)
    return ok(", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())))  # bonding_masters is a file


def links(context: Context) -> Finding:
    """The NPUs' own network ports, which connect machines."""
    if context.recipe.parallel.nodes == 1:
        return skipped("not needed: one machine")
    tool = context.machine.program("hccn_tool", HCCN_TOOL)
    if not tool:
        remedy = f"on each host: {HCCN_TOOL}/hccn_tool -i 0 -link -g, then -net_health -g"
        return warning("not known: hccn_tool is not here", remedy, "link UP")
    if not context.used:
        return skipped("not known, see NPUs")

    def differing(option: str, field: str, wanted: str) -> str:
        lines = []
        for chip in context.used:
            ran = context.machine.run(tool, "-i", str(chip.device), option, "-g", seconds=10)
            said = parse_fields(ran.text).get(field) or ran.problem or "says nothing"
            lines += [f"{context.npus.name(chip)}: {field} {said}"] if said != wanted else []
        return "\n".join(lines)

    if down := differing("-link", "link status", "UP"):
        return failed(down, "see its cable, module and switch: hccn_tool -i N -optical -g", "link UP")
    if unhealthy := differing("-net_health", "net health status", "Success"):
        remedy = "set the address that it checks: hccn_tool -i N -netdetect -s address A.B.C.D"
        return warning(unhealthy, remedy, "net health Success")
    return ok("all links UP, net health Success")


def nodes(context: Context) -> Finding:
    """Whether the first machine is reachable from the others."""
    environment, count = context.machine.environment, context.recipe.parallel.nodes
    if count == 1:
        return skipped("not needed: one machine")
    if unset := [name for name in ("MASTER_ADDR", "NODE_RANK") if not environment.get(name)]:
        remedy = "export it on every machine, see docs/operations.md"
        return failed(f"{' and '.join(unset)} not set", remedy, f"{count} machines")
    address, rank = environment["MASTER_ADDR"], environment["NODE_RANK"]
    port = _port(environment.get("MASTER_PORT") or MASTER_PORT, "MASTER_PORT")
    if rank not in map(str, range(count)):
        return failed(f"NODE_RANK={rank}", "number the machines from 0", f"0 to {count - 1}")
    if rank == "0":
        if problem := _not_mine(address):
            found = f"MASTER_ADDR={address} {problem}"
            return failed(found, "set it to this machine's address, as the others reach it", "its address")
        return ok(f"{address} is this machine, the first of {count}")
    found = f"MASTER_ADDR={address}, port {port}:"
    try:
        with socket.create_connection((address, port), SECONDS):
            return ok(f"{found} answers")
    except (socket.gaierror, UnicodeError):  # UnicodeError: not a valid name, as a..b or a label of over 63 letters
        return failed(f"{found} no such name", "fix it, or /etc/hosts")
    except OSError as error:
        remedy = "normal before make sft has started there; otherwise check its firewall (NODE_RANK=0)"
        return warning(f"{found} {error.strerror or error}", remedy, "an answer")


def _not_mine(address: str) -> str:
    """Why other machines cannot reach this one by an address; empty where they can."""
    try:
        family, *_, found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0]
        socket.create_server((str(found[0]), 0), family=family).close()
    except (socket.gaierror, UnicodeError):
        return "is no name that is known here"
    except OSError:
        return "is no address of this machine, which is the first one (NODE_RANK=0)"
    return "is known to this machine only" if ipaddress.ip_address(str(found[0])).is_loopback else ""
