"""hosts.toml: which host is client, controller and worker of an experiment, and how each is reached.

    client = "cluster01"
    controller = "cluster02"
    workers = ["cluster03", "cluster04"]

    [defaults]                    # for every host
    user = "alice"
    python = "~/slosched/.venv/bin/python"

    [hosts.cluster04]             # where one differs
    address = "10.0.0.4"

The keys of [defaults] and [hosts.NAME] are the fields of `Host`. Every error names the file, the key and what
to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from slosched.addresses import bracketed, parse_address, parse_bind
from slosched.config import CONTROLLER_PORT, WORKER_PORT
from slosched.config_file import with_table
from slosched.errors import InvalidConfig, UnknownName
from slosched.field_types import AtLeast0, Port, check_types
from slosched.options import Option
from slosched.text_files import read_toml

_ROLES = ("client", "controller", "workers")
_KEYS = (*_ROLES, "defaults", "hosts")
#: A name also names files and folders here.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: More hosts than this are a typing error, and open too many connections at once.
MOST_HOSTS = 256
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Host:
    """One host. What is empty is left to ssh's own configuration, or has the meaning given here.

    `address` is what ssh connects to (default: the name, which may be an alias of ssh's configuration);
    `reach` is where the other hosts reach it (default: the address). `identity` and `ssh_config` are files of
    this machine, relative to hosts.toml. `python` runs slosched on the host, `folder` is where runs are kept
    while they last, and `environment` is set for every process. `device`, `gpus`, `profile` and
    `worker_config` (a file of that host) are the worker's; 0 GPUs: of an emulated device as many as the run
    takes, else one.
    """

    name: Annotated[str, Option(in_file=False)]
    local: Annotated[bool, Option(in_file=False)] = False
    address: str = ""
    reach: str = ""
    ssh_port: Port = 0
    user: str = ""
    identity: str = ""
    ssh_config: str = ""
    python: str = "python3"
    folder: str = "~/slosched-runs"
    environment: dict[str, str] | None = None
    bind: str = "0.0.0.0"
    worker_port: Port = WORKER_PORT
    controller_port: Port = CONTROLLER_PORT
    device: str = "auto"
    gpus: AtLeast0 = 0
    profile: str = ""
    worker_config: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        for key in ("address", "reach"):
            _check_address(key, getattr(self, key))
        if self.user and not _USER.fullmatch(self.user):
            raise InvalidConfig(f"user {self.user!r} is not a user's name")
        parse_bind(self.bind)
        for key in self.environment or {}:
            if not _VARIABLE.fullmatch(key):
                raise InvalidConfig(f"environment: {key!r} is not the name of a variable")
        for key in ("python", "folder"):
            if not getattr(self, key) or "\n" in getattr(self, key):
                raise InvalidConfig(f"{key} must name a file or folder of the host")
        self._check_ports()

    def _check_ports(self) -> None:
        if self.gpus > 1 and not self.emulated and not self.worker_port:
            raise InvalidConfig(
                "worker_port must be given for several real GPUs: each is served on a port of its own, "
                "from that one upwards"
            )
        if self.worker_port + max(self.gpus, 1) > 65536:
            raise InvalidConfig(f"worker_port {self.worker_port} is too high for {self.gpus} GPUs")

    @property
    def emulated(self) -> bool:
        return self.device == "emulated"

    @property
    def destination(self) -> str:
        """What ssh connects to."""
        return self.address or self.name

    @property
    def reached_at(self) -> str:
        """The address by which the other hosts reach it, without a port, in brackets if IPv6."""
        return bracketed(self.reach or self.destination)


@dataclass(frozen=True)
class Hosts:
    """The hosts of an experiment by their role; one host may have several roles."""

    client: Host
    controller: Host
    workers: tuple[Host, ...]

    def all(self) -> list[Host]:
        """Each host once, the client first."""
        return list({host.name: host for host in self._by_role()}.values())

    def _by_role(self) -> Iterator[Host]:
        yield self.client
        yield self.controller
        yield from self.workers

    def roles(self, host: Host) -> str:
        """What the host does, in words: "client, controller"."""
        named = [("client", self.client), ("controller", self.controller)]
        named += [("worker", worker) for worker in self.workers]
        return ", ".join(role for role, each in named if each.name == host.name)

    def described(self) -> dict[str, Any]:
        """The roles, and what of each host a run depends on: fit for JSON."""
        return {
            "client": self.client.name,
            "controller": self.controller.name,
            "workers": [
                {
                    "name": host.name,
                    "device": host.device,
                    "gpus": host.gpus,
                    "profile": host.profile,
                    "worker_config": host.worker_config,
                }
                for host in self.workers
            ],
        }


def this_host(*, device: str = "emulated", gpus: int = 0, profile: str = "") -> Hosts:
    """This host in every role, on free ports of the loopback interface."""
    host = Host(
        name="localhost",
        local=True,
        address=_LOOPBACK,
        bind=_LOOPBACK,
        worker_port=0,
        controller_port=0,
        device=device,
        gpus=gpus,
        profile=profile,
    )
    return Hosts(host, host, (host,))


def load_hosts(path: Path) -> Hosts:
    """The hosts that a file names. Raises InvalidConfig with file, key and what to do."""
    document = read_toml(path, "")[1]
    for key in document:
        if key not in _KEYS:
            raise InvalidConfig(f"{path}: {UnknownName('key', key, list(_KEYS))}")
    client, controller = (_one_name(path, document, role) for role in ("client", "controller"))
    workers = _worker_names(path, document)
    named = list(dict.fromkeys((client, controller, *workers)))
    if len(named) > MOST_HOSTS:
        raise InvalidConfig(f"{path}: {len(named)} hosts; at most {MOST_HOSTS} are used")
    tables = _table(path, document, "hosts")
    for name in tables:
        if name not in named:
            raise InvalidConfig(
                f"{path}: [hosts.{name}] has no role; name it in {', '.join(_ROLES)}, or remove the table"
            )
    defaults = _table(path, document, "defaults")
    made = {name: _host(path, name, defaults, tables.get(name, {})) for name in named}
    hosts = Hosts(made[client], made[controller], tuple(made[name] for name in workers))
    _check_apart(path, hosts)
    return hosts


def _one_name(path: Path, document: Mapping[str, Any], role: str) -> str:
    name = document.get(role)
    if not isinstance(name, str) or not name:
        raise InvalidConfig(f'{path}: {role} must name one host, as {role} = "cluster01"')
    return name


def _worker_names(path: Path, document: Mapping[str, Any]) -> list[str]:
    names = document.get("workers")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise InvalidConfig(
            f'{path}: workers must be a list of hosts, as workers = ["cluster03", "cluster04"]'
        )
    for place, name in enumerate(names):
        if name in names[:place]:
            raise InvalidConfig(
                f"{path}: workers names {name!r} twice; a host runs one worker, with `gpus` GPUs"
            )
    return names


def _table(path: Path, document: Mapping[str, Any], key: str) -> dict[str, Any]:
    table = document.get(key, {})
    if not isinstance(table, dict):
        raise InvalidConfig(f"{path}: {key} must be a table, headed [{key}]")
    return table


def _host(path: Path, name: str, defaults: Mapping[str, Any], own: Any) -> Host:
    if not isinstance(own, dict):
        raise InvalidConfig(f"{path}: {name} must be a table, headed [hosts.{name}]")
    where = f"{path}, [hosts.{name}]"
    host = with_table(f"{path}, [defaults]", Host(name=_checked(path, name)), defaults)
    host = with_table(where, host, own)
    return replace(
        host,
        identity=_file(path, where, "identity", host.identity),
        ssh_config=_file(path, where, "ssh_config", host.ssh_config),
    )


def _checked(path: Path, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidConfig(
            f"{path}: {name!r} is not a host's name: letters, digits, '.', '_' and '-', at most 63; "
            "give its address by the key address"
        )
    return name


def _file(path: Path, where: str, key: str, name: str) -> str:
    """A file of this machine, its path absolute; "" for none."""
    if not name:
        return ""
    file = path.parent / Path(name).expanduser()
    if not file.is_file():
        raise InvalidConfig(f"{where}: {key} {str(file)!r} is not a file of this machine")
    return str(file.resolve())


def _check_apart(path: Path, hosts: Hosts) -> None:
    """Workers that are the same machine by another name need ports of their own."""
    taken: dict[str, str] = {}
    for host in hosts.workers:
        if not host.worker_port:
            continue
        address = f"{host.reached_at}:{host.worker_port}"
        if address in taken:
            raise InvalidConfig(
                f"{path}: the workers {taken[address]} and {host.name} are both reached at {address}; give "
                "one another worker_port"
            )
        taken[address] = host.name


def _check_address(key: str, text: str) -> None:
    if not text:
        return
    try:
        parse_address(f"{bracketed(text)}:1")
    except InvalidConfig:
        raise InvalidConfig(
            f"{key} {text!r} is not a host's name or address (without a port)"
        ) from None
