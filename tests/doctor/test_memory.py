"""Doctor's check of main memory: what the machine has, and what its control groups leave of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor_machines import FakeMachine, MakeContext, context, fake
from openpangu_sft.doctor import resources
from openpangu_sft.doctor.machine import State

__all__ = ["context", "fake"]

V2, V1 = "/sys/fs/cgroup", "/sys/fs/cgroup/memory"
JOB = "/system.slice/slurmstepd.scope/job_7/step_0/user/task_0"


def has_available(fake: FakeMachine, gb: int) -> None:
    fake.write("/proc/meminfo", f"MemTotal: 999000000 kB\nMemAvailable: {gb * 1_000_000_000 // 1024} kB\n")


def is_in(fake: FakeMachine, cgroup: str) -> None:
    fake.write("/proc/self/cgroup", f"{cgroup}\n")


def v2(fake: FakeMachine, group: str, most: str, taken: int = 0, stat: str = "") -> None:
    fake.write(f"{V2}{group}/memory.max", f"{most}\n")
    fake.write(f"{V2}{group}/memory.current", f"{taken}\n")
    fake.write(f"{V2}{group}/memory.stat", stat)


def v1(fake: FakeMachine, group: str, most: int, taken: int = 0, stat: str = "") -> None:
    fake.write(f"{V1}{group}/memory.limit_in_bytes", f"{most}\n")
    fake.write(f"{V1}{group}/memory.usage_in_bytes", f"{taken}\n")
    fake.write(f"{V1}{group}/memory.stat", stat)


def said(context: MakeContext) -> str:
    return resources.memory(context()).found


def test_what_the_machine_has(fake: FakeMachine, context: MakeContext) -> None:
    has_available(fake, 10)
    assert resources.memory(context()).state == State.OK
    assert said(context).startswith("10.0 GB available; ")
    has_available(fake, 0)
    assert resources.memory(context()).state == State.WARNING
    assert resources.memory(context("train.engine=transformers")).state == State.FAILED


def test_a_group_in_the_mount_itself(fake: FakeMachine, context: MakeContext) -> None:
    has_available(fake, 10)
    is_in(fake, "0::/")
    v2(fake, "", "6000000000", 5_000_000_000)
    assert said(context).startswith(f"1.0 GB left in the limit of control group {V2}; ")
    v2(fake, "", "6000000000", 5_000_000_000, "anon 1\ninactive_file 3000000000\n")
    assert said(context).startswith("4.0 GB left")


@pytest.mark.parametrize("limited", [JOB, "/system.slice/slurmstepd.scope/job_7", "/system.slice"])
def test_a_job_is_under_its_group_and_all_above(fake: FakeMachine, context: MakeContext, limited: str) -> None:
    has_available(fake, 400)
    is_in(fake, f"0::{JOB}")
    v2(fake, JOB, "max", 1)
    v2(fake, limited, "4000000000", 1_000_000_000)
    v2(fake, "/system.slice/another.service", "1000", 1000)
    assert said(context).startswith(f"3.0 GB left in the limit of control group {V2}{limited}; ")


def test_the_smallest_rest_counts(fake: FakeMachine, context: MakeContext) -> None:
    has_available(fake, 400)
    is_in(fake, "0::/a/b/c")
    for group, most, taken in ("/a/b/c", 50, 1), ("/a/b", 60, 55), ("/a", 90, 20):
        v2(fake, group, str(most * 10**9), taken * 10**9)
    assert said(context).startswith(f"5.0 GB left in the limit of control group {V2}/a/b; ")


def test_a_limit_above_what_the_machine_has(fake: FakeMachine, context: MakeContext) -> None:
    has_available(fake, 7)
    is_in(fake, f"4:cpu,memory:/docker/1\n0::{JOB}")
    v2(fake, JOB, "9000000000")
    v1(fake, "/docker/1", 8_000_000_000)
    assert said(context).startswith("7.0 GB available; ")


def test_v1(fake: FakeMachine, context: MakeContext) -> None:
    has_available(fake, 400)
    is_in(fake, "9:name=systemd:/\n4:cpu,memory:/slurm/uid_1/job_7\n1:cpuset:/elsewhere\n0::/")
    v1(fake, "", 9223372036854771712, 10**12)  # v1's word for no limit
    v1(fake, "/elsewhere", 1000)
    own, with_all_below = "inactive_file 100\n", "total_inactive_file 1500000000\n"
    v1(fake, "/slurm/uid_1/job_7", 4_000_000_000, 2_500_000_000, f"cache 7\n{own}{with_all_below}")
    assert said(context).startswith(f"3.0 GB left in the limit of control group {V1}/slurm/uid_1/job_7; ")


@pytest.mark.parametrize("path", ["/docker/0123", "/../../job", "/..", "/"])
def test_a_container_that_sees_only_the_mount_itself(fake: FakeMachine, context: MakeContext, path: str) -> None:
    has_available(fake, 400)
    is_in(fake, f"4:memory:{path}")
    v1(fake, "", 2_000_000_000)
    assert said(context).startswith(f"2.0 GB left in the limit of control group {V1}; ")
    is_in(fake, f"0::{path}")
    v2(fake, "", "1000000000")
    assert said(context).startswith(f"1.0 GB left in the limit of control group {V2}; ")


@given(st.none() | st.text() | st.from_regex(r"([0-9]{1,2}:[a-z,]*:/[^\n]*\n){0,3}"), st.sampled_from(["", "memory"]))
def test_groups_never_lead_out_of_the_mount(text: str, controller: str) -> None:
    groups = resources.control_groups(text, controller)
    assert groups[-1] == "/"
    for group in groups:
        assert group.startswith("/")
        assert ".." not in group.split("/")


def test_cached_files_of_v1_and_v2() -> None:
    assert resources.inactive_file("anon 5\ninactive_file 7\n") == 7
    assert resources.inactive_file("inactive_file 3\ntotal_inactive_file 9\n") == 9
    assert resources.inactive_file("total_inactive_file 9\ninactive_file 3\n") == 9
    assert resources.inactive_file("inactive_file 3\ntotal_inactive_file 0\n") == 0
    assert resources.inactive_file(None) == 0
