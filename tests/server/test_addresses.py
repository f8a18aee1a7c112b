import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from janus_server.addresses import (
    advertised_host,
    check_can_dial,
    check_can_listen,
    check_host,
    first_address,
    join_address,
    listening_socket,
    own_address_towards,
    split_address,
)
from janus_server.errors import ConfigError


@pytest.mark.parametrize(
    "address", ["", "localhost", ":80", "host:", "host:x", "host:-1", "::1:80", "host:80 "]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        split_address(address)


def test_addresses_are_split() -> None:
    assert split_address("localhost:80") == ("localhost", 80)
    assert split_address("[::1]:0") == ("[::1]", 0)
    with pytest.raises(ConfigError, match="above 65535"):
        split_address("localhost:65536")


@given(host=st.ip_addresses(), port=st.integers(0, 65535))
def test_what_is_joined_can_be_split(host: object, port: int) -> None:
    joined = join_address(str(host), port)
    bracketed, split_port = split_address(joined)
    assert (bracketed.strip("[]"), split_port) == (str(host), port)
    assert join_address(bracketed, port) == joined


@pytest.mark.parametrize("host", ["bad host", "a..b", "x" * 300, "no-such-host.invalid"])
def test_an_unknown_host_is_one_sentence(host: str) -> None:
    for check in (check_can_listen, check_host, own_address_towards):
        with pytest.raises(ConfigError, match=f"^there is no host {host}$"):
            check(f"{host}:80")
    with pytest.raises(ConfigError, match=f"^there is no host {host}$"):
        advertised_host(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_this_machine_reaches_itself(host: str) -> None:
    check_can_dial(host)


def test_a_host_that_cannot_be_reached_is_one_sentence() -> None:
    # Sockets may listen on a multicast address, but TCP reaches none.
    sentence = r"^this machine cannot reach itself at 224\.0\.0\.1 \(.+\); is its network up\?$"
    with pytest.raises(ConfigError, match=sentence):
        check_can_dial("224.0.0.1")


def test_an_address_of_another_machine_is_one_sentence() -> None:
    # 198.51.100.0/24 is reserved for documentation.
    sentence = r"cannot listen on 198\.51\.100\.1:80: it is no address of this machine"
    with pytest.raises(ConfigError, match=sentence):
        check_can_listen("198.51.100.1:80")


def test_checking_leaves_the_port_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match="in use"):
            check_can_listen(address)
    assert check_can_listen(address) == check_can_listen(address)


@pytest.mark.parametrize(
    ("advertise_host", "listen", "expected"),
    [
        ("", "127.0.0.2:5", "127.0.0.2"),
        ("", "localhost:5", "localhost"),
        ("", "0.0.0.0:5", ""),
        ("", "[::]:5", ""),
        ("", "", ""),
        ("127.0.0.2", "0.0.0.0:5", "127.0.0.2"),
        ("localhost", "127.0.0.1:5", "localhost"),
        ("127.0.0.2", "", "127.0.0.2"),
    ],
)
def test_the_host_that_peers_dial(advertise_host: str, listen: str, expected: str) -> None:
    assert advertised_host(advertise_host, listen) == expected


@pytest.mark.parametrize(
    ("advertise_host", "listen", "sentence"),
    [
        ("198.51.100.1", "", "--advertise-host 198.51.100.1 is no address of this machine"),
        ("0.0.0.0", "", "--advertise-host 0.0.0.0 is no address of this machine"),
        (
            "127.0.0.2",
            "127.0.0.1:5",
            "--advertise-host 127.0.0.2 is not where --listen 127.0.0.1:5 is",
        ),
    ],
)
def test_a_host_that_peers_cannot_dial(advertise_host: str, listen: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        advertised_host(advertise_host, listen)
    assert str(caught.value) == sentence


def test_the_own_address_is_the_one_that_leads_there() -> None:
    assert own_address_towards("127.0.0.1:9") == "127.0.0.1"
    assert own_address_towards("localhost:9") in ("127.0.0.1", "::1")


def needs_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")


@pytest.mark.parametrize(
    ("host", "dialled"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("localhost", ["localhost"]),
        ("0.0.0.0", ["127.0.0.1", "127.0.0.2"]),
        ("[::1]", ["::1"]),
        ("[::]", ["::1", "127.0.0.1"]),
    ],
)
def test_a_listening_socket(host: str, dialled: list[str]) -> None:
    if ":" in host:
        needs_ipv6()
    with listening_socket(host) as server:
        for address in dialled:
            socket.create_connection((address, server.getsockname()[1]), timeout=10).close()
    assert first_address(host).strip("[]") == first_address(host)
