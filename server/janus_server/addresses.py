"""HOST:PORT: where a process listens, and under which host of this machine its peers dial it."""

import errno
import ipaddress
import socket

from janus_server.errors import ConfigError

_DIAL_TIMEOUT_S = 10.0
"""How long this machine may take to accept a connection of its own."""


def split_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT ("[::1]:80" for IPv6, brackets kept); raises ConfigError where it is not."""
    host, colon, port = address.rpartition(":")
    is_bare_ipv6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if not (colon and host and port.isascii() and port.isdigit()) or is_bare_ipv6:
        raise ConfigError(f"{address!r} is not HOST:PORT")
    if int(port) > 65535:
        raise ConfigError(f"the port of {address} is above 65535")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """Write HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def check_host(address: str) -> str:
    """Return the host of HOST:PORT; raises ConfigError where there is no such host."""
    host, _ = split_address(address)
    _addresses_of(host)
    return host


def check_can_listen(listen: str) -> tuple[str, int]:
    """Return host and port of `listen`; raises ConfigError where no socket can listen there now.

    gRPC itself reports neither the reason nor, with several addresses behind one name, every
    failure.
    """
    host, port = split_address(listen)
    addresses = _addresses_of(host)
    errors = [error for address in addresses if (error := _bind_error(address, port))]
    in_use = any(error.errno == errno.EADDRINUSE for error in errors)
    if in_use or len(errors) == len(addresses):
        reason = "the port is in use" if in_use else _reason(errors[0])
        raise ConfigError(f"cannot listen on {listen}: {reason}")
    return host, port


def check_can_dial(host: str) -> None:
    """Raises ConfigError where this machine cannot reach a socket that listens on its `host`."""
    try:
        with listening_socket(host) as server:
            socket.create_connection(server.getsockname()[:2], _DIAL_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"this machine cannot reach itself at {host} ({_reason(error)}); is its network up?"
        ) from None


def is_wildcard(host: str) -> bool:
    """Whether to listen on this host is to listen on all addresses of the machine."""
    return any(ipaddress.ip_address(address).is_unspecified for address in _addresses_of(host))


def is_loopback(listen: str) -> bool:
    """Whether HOST:PORT can be reached from this machine alone."""
    host, _ = split_address(listen)
    return all(ipaddress.ip_address(address).is_loopback for address in _addresses_of(host))


def advertised_host(advertise_host: str, listen: str = "") -> str:
    """The host that peers dial: `advertise_host`, or where `listen` is; "" for a wildcard.

    Raises ConfigError where `advertise_host` is not this machine's, or not where `listen` is.
    """
    listen_host = split_address(listen)[0] if listen else ""
    if not listen_host or is_wildcard(listen_host):
        listen_host = ""
    if not advertise_host:
        return listen_host
    addresses = _addresses_of(advertise_host)
    if is_wildcard(advertise_host) or all(_bind_error(address, 0) for address in addresses):
        raise ConfigError(f"--advertise-host {advertise_host} is no address of this machine")
    if listen_host and not set(addresses) & set(_addresses_of(listen_host)):
        raise ConfigError(f"--advertise-host {advertise_host} is not where --listen {listen} is")
    return advertise_host


def own_address_towards(address: str) -> str:
    """The address of this machine from which packets to HOST:PORT go; raises ConfigError."""
    host, _ = split_address(address)
    for address in _addresses_of(host):
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 1))  # sends nothing
            except OSError:
                continue
            own: str = probe.getsockname()[0]
            return own
    raise ConfigError(f"this machine has no route to {host}")


def first_address(host: str) -> str:
    """The numeric address of this machine's `host` on which a socket can be bound."""
    addresses = _addresses_of(host)
    return next((address for address in addresses if not _bind_error(address, 0)), addresses[0])


def listening_socket(host: str) -> socket.socket:
    """A socket that listens on a free port of `host`; for "[::]" on IPv4 as well."""
    address = first_address(host)
    family = _family(address)
    both = family == socket.AF_INET6 and is_wildcard(host) and socket.has_dualstack_ipv6()
    return socket.create_server((address, 0), family=family, dualstack_ipv6=both)


def _addresses_of(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):  # a name that is none, such as a..b
        raise ConfigError(f"there is no host {host}") from None
    return [str(address[0]) for *_, address in found]


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _bind_error(address: str, port: int) -> OSError | None:
    try:
        with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if ":" in address:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((address, port))
    except OSError as error:
        return error
    return None


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return "it is no address of this machine"
    return error.strerror or str(error)
