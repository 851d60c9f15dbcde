"""Devices are values: their numbering is part of their identity, and their text form names them."""

from __future__ import annotations

import pytest
from gpus import GPU0, GPU1, GPU2, SHOWN0
from hypothesis import given
from hypothesis import strategies as st

from router.system.devices import HOST, Device, by_name

NODES = st.sampled_from(("", "b", "box-2.lan", "gpu0", "host"))
INDEXES = st.integers(0, 999_999)
DEVICES = st.builds(Device, NODES) | st.builds(
    lambda node, index, part: Device.gpu(index, part, node=node), NODES, INDEXES, st.none() | INDEXES
)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (HOST, "host"),
        (GPU0, "gpu0"),
        (Device.gpu(11), "gpu11"),
        (Device.gpu(1, 0), "gpu1:0"),
        (Device.gpu(0, node="b"), "b/gpu0"),
        (Device("b"), "b/host"),
    ],
)
def test_a_device_is_written_as_status_metrics_and_logs_have_it(device: Device, name: str) -> None:
    assert str(device) == f"{device}" == name
    assert Device.named(name) == device


@given(device=DEVICES)
def test_what_is_written_names_the_device_again(device: Device) -> None:
    assert Device.named(str(device)) == device
    assert hash(Device.named(str(device))) == hash(device)


@given(one=DEVICES, other=DEVICES)
def test_any_two_devices_are_in_some_order_and_only_equal_ones_are_written_alike(
    one: Device, other: Device
) -> None:
    assert (one < other) + (other < one) + (one == other) == 1
    assert (str(one) == str(other)) == (one == other)


def test_gpus_come_before_ram_and_by_their_numbers() -> None:
    in_order = [GPU0, Device.gpu(0, 0), GPU1, GPU2, Device.gpu(10), HOST, Device("b")]
    assert sorted(set(in_order)) == in_order


def test_what_an_engine_counts_is_not_what_the_driver_counts() -> None:
    assert SHOWN0 != GPU0
    assert {GPU0: 5000}.get(SHOWN0) is None
    assert str(SHOWN0) == "gpu0", "in the files of measurements"
    assert Device.named("gpu0", counted_by="engine") == SHOWN0
    assert Device.named("host", counted_by="engine") == HOST, "RAM is the same for both"


@pytest.mark.parametrize(
    "text", ["", "gpu", "gpu-1", "gpu0:", "cpu", "HOST", "gpu0 ", "/gpu0", "a/b/host", "gpu٣"]
)
def test_what_names_no_device_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a device: use host, or gpu and a number"):
        Device.named(text)


def test_figures_are_written_by_name() -> None:
    assert by_name({GPU1: 5, HOST: 3}) == {"gpu1": 5, "host": 3}
