"""Keys: files that others can read, the list of clients, who may speak for whom, and where a daemon is."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from sidestep.endpoint import Endpoint, KeyFile, KeyPair, endpoints, exposed
from sidestep.errors import SettingsError
from sidestep.head import first_host, head_of, tcp_address
from sidestep.settings import WorkerSettings
from sidestep.whereabouts import Whereabouts
from sidestepd.addresses import context_of, remote_of
from sidestepd.clients import LOCAL, Clients, may_speak, parse, read_clients
from sidestepd.config import Config
from sidestepd.keygen import keygen, make_keys, rotate

HERE = Path("clients")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


def listed(keys: Path) -> dict[str, str]:
    return parse((keys / "clients").read_text(), keys / "clients")


def found(mode: int, uid: int) -> os.stat_result:
    return os.stat_result((stat.S_IFREG | mode, 0, 0, 1, uid, 0, 0, 0, 0, 0))


class TestKeygen:
    def test_a_worker_knows_its_daemon_and_the_daemon_its_worker(self, keys: Path):
        server, client = KeyFile.read(keys / "server.key"), KeyFile.read(keys / "client.key")

        assert (server.pair.public,) == client.servers
        assert {client.pair.public: "client"} == listed(keys)
        assert [0o600] * 3 == [stat.S_IMODE(path.stat().st_mode) for path in keys.iterdir()]

    @pytest.mark.parametrize("umask", [0o000, 0o277])
    def test_files_are_their_owners_to_read_and_write_whatever_is_masked(self, tmp_path: Path, umask: int):
        before = os.umask(umask)
        try:
            made = make_keys(tmp_path / "masked")
        finally:
            os.umask(before)

        assert {0o600} == {stat.S_IMODE(path.stat().st_mode) for path in (*made, tmp_path / "masked/clients")}

    def test_what_is_there_is_not_overwritten(self, keys: Path):
        before = (keys / "client.key").read_text()

        with pytest.raises(SettingsError, match="has all of that already"):
            keygen(keys, [], [])

        assert before == (keys / "client.key").read_text()

    def test_a_further_client_has_a_key_and_a_name_of_its_own(self, keys: Path):
        keygen(keys, ["eval"], [])

        assert {"client", "eval"} == set(listed(keys).values())

    def test_a_new_key_of_a_client_is_let_in_beside_the_old_one(self, keys: Path):
        old = KeyFile.read(keys / "client.key")

        rotate(keys, "client")

        new = KeyFile.read(keys / "client.key")
        assert {old.pair.public: "client", new.pair.public: "client"} == listed(keys)
        assert old.servers == new.servers
        assert old.pair.public != new.pair.public

    def test_clients_are_told_of_a_daemons_new_key_beside_the_old_one(self, keys: Path):
        old = KeyFile.read(keys / "server.key").pair.public

        rotate(keys, "server")

        new = KeyFile.read(keys / "server.key").pair.public
        assert (new, old) == KeyFile.read(keys / "client.key").servers

    def test_a_name_that_would_leave_the_folder_is_refused(self, keys: Path):
        with pytest.raises(SettingsError, match="a client's name is"):
            keygen(keys, ["../x"], [])


class TestKeyFile:
    @pytest.mark.parametrize(("mode", "uid"), [(0o600, 7), (0o400, 7), (0o440, 0), (0o640, 0)])
    def test_one_that_is_ours_or_the_systems_is_read(self, mode: int, uid: int):
        assert "" == exposed(found(mode, uid), us=7)

    @pytest.mark.parametrize(
        ("mode", "uid", "why"),
        [
            (0o640, 7, "others can read or change it"),
            (0o604, 7, "others can read or change it"),
            (0o660, 0, "others can read or change it"),
            (0o444, 0, "others can read or change it"),
            (0o600, 8, "it belongs to user 8"),
        ],
    )
    def test_one_that_others_reach_is_refused(self, mode: int, uid: int, why: str):
        assert why in exposed(found(mode, uid), us=7)

    def test_a_real_one_that_others_can_read_is_refused_in_words(self, keys: Path):
        (keys / "client.key").chmod(0o644)

        with pytest.raises(SettingsError, match=r"client\.key: others can read or change it \(mode 0644\)"):
            KeyFile.read(keys / "client.key")

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"public": "ab", "secret": "cd"}', "\xff"])
    def test_what_is_none_is_refused_in_words(self, tmp_path: Path, text: str):
        (tmp_path / "x.key").write_bytes(text.encode("latin-1"))
        (tmp_path / "x.key").chmod(0o600)

        with pytest.raises(SettingsError, match="is no key file"):
            KeyFile.read(tmp_path / "x.key")

    def test_a_secret_is_not_shown(self):
        assert "geheim" not in repr(KeyPair(public="p", secret="geheim"))


class TestClients:
    def test_a_list_may_have_comments_and_several_keys_of_one_name(self):
        text = f"# all of ours\n{'a' * 64} train  # until May\n\n{'b' * 64} train\n"

        assert {"a" * 64: "train", "b" * 64: "train"} == parse(text, HERE)

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            (f"{'a' * 64}", "line 1: a public key"),
            (f"# x\n{'A' * 64} train", "line 2: a public key"),
            (f"{'a' * 64} train eval", "line 1: a public key"),
            (f"{'a' * 64} train\n{'a' * 64} eval", "line 2: this key is train's already"),
        ],
    )
    def test_a_line_that_is_none_is_named(self, text: str, why: str):
        with pytest.raises(SettingsError, match=why):
            parse(text, HERE)

    def test_one_that_others_can_change_is_refused(self, keys: Path):
        (keys / "clients").chmod(0o666)

        with pytest.raises(SettingsError, match="others can change it"):
            Clients(keys / "clients")

    def test_one_that_lists_nobody_is_refused(self, keys: Path):
        (keys / "clients").write_text("# nobody\n")

        with pytest.raises(SettingsError, match="lists nobody"):
            read_clients(keys / "clients")

    def test_one_that_is_emptied_lets_in_nobody_any_more(self, keys: Path):
        """Also by an intake that is started again."""
        clients = Clients(keys / "clients")
        key = KeyFile.read(keys / "client.key").pair.public

        (keys / "clients").write_text("# nobody\n")
        clients.look()

        assert (None, None) == (clients.name_of(key), Clients(keys / "clients").name_of(key))

    def test_a_change_counts_and_a_damage_does_not(self, keys: Path):
        clients = Clients(keys / "clients")
        old, _ = KeyFile.read(keys / "client.key").pair.public, rotate(keys, "client")
        new = KeyFile.read(keys / "client.key").pair.public

        clients.look()
        both = [clients.name_of(key) for key in (old, new)]
        (keys / "clients").write_text(f"{new} client\n")
        clients.look()
        one = [clients.name_of(key) for key in (old, new)]
        (keys / "clients").write_text("what is this\n")
        clients.look()

        assert ["client", "client"] == both
        assert [None, "client"] == one == [clients.name_of(key) for key in (old, new)]

    def test_a_session_is_its_owners_and_this_node_may_speak_for_all(self):
        cases = [("a", "a"), ("a", None), ("a", "b"), ("a", LOCAL), (LOCAL, "a"), (LOCAL, LOCAL)]

        assert [True, True, False, False, True, True] == [may_speak(peer, owner) for peer, owner in cases]


class TestOptions:
    def test_a_port_that_others_reach_needs_keys_and_a_list(self):
        for given, missing in [
            ({}, "listen.key_file and listen.clients are not given"),
            ({"listen.key_file": "k"}, "listen.clients is not given"),
        ]:
            with pytest.raises(SettingsError, match=missing):
                Config.load(environ={}, overrides={"listen.tcp": "tcp://*:7711", **given})

    def test_a_port_of_this_machine_needs_none(self):
        config = Config.load(environ={"SIDESTEP_LISTEN_TCP": "tcp://127.0.0.1:7711, tcp://[::1]:7711"})

        assert ("tcp://127.0.0.1:7711", "tcp://[::1]:7711") == config.listen.tcp

    @pytest.mark.parametrize("address", ["head:7711", "tcp://head", "tcp://:7711", "tcp://head:70000", "ipc:///x"])
    def test_an_address_that_is_none_is_named(self, address: str):
        with pytest.raises(SettingsError, match="say tcp://HOST:PORT"):
            Config.load(environ={}, overrides={"listen.tcp": address})


class TestWhereTheDaemonIs:
    def test_a_key_file_names_the_daemons_it_trusts_and_nothing_else_does(self, keys: Path):
        client = KeyFile.read(keys / "client.key")

        ways = endpoints("tcp://head:7711", client, told="f" * 64)

        assert [Endpoint(address="tcp://head:7711", server_key=client.servers[0], own=client.pair)] == ways

    def test_a_daemon_whose_key_nobody_knows_is_not_spoken_to(self):
        with pytest.raises(SettingsError, match="no public key of the daemon"):
            endpoints("tcp://head:7711", KeyFile(pair=KeyPair(public="a" * 64, secret="b" * 64)))

    def test_keys_are_tried_in_turn_and_read_again(self, keys: Path):
        rotate(keys, "server")
        settings = WorkerSettings(address="tcp://head:7711", key_file=str(keys / "client.key"))
        whereabouts = Whereabouts(settings)

        first = whereabouts.look()
        whereabouts.failed()
        second = whereabouts.look()
        rotate(keys, "client")
        third = whereabouts.look()

        assert first is not None
        assert second is not None
        assert third is not None
        assert KeyFile.read(keys / "client.key").servers == (first.server_key, second.server_key)
        assert second.own != third.own

    def test_a_file_that_comes_late_is_found(self, tmp_path: Path):
        path = tmp_path / "context.json"
        whereabouts = Whereabouts(WorkerSettings(context=str(path)))

        before = whereabouts.look()
        path.write_text(json.dumps(context_of("ipc:///x.sock", None, None, {})))

        assert (None, False, Endpoint(address="ipc:///x.sock")) == (
            before,
            whereabouts.is_hopeless,
            whereabouts.look(),
        )

    def test_a_file_leads_from_another_node_over_tcp(self, tmp_path: Path):
        """Another one is also one of the same name from which the socket is not to be seen."""
        (tmp_path / "here.sock").touch()
        there = {"remote": "tcp://head:7711", "server_key": "a" * 64, "run": {"id": "r", "dir": "/runs/r"}}
        told = [
            context_of(f"ipc://{tmp_path}/here.sock", **there),
            context_of(f"ipc://{tmp_path}/here.sock", **there) | {"node": "another"},
            context_of(f"ipc://{tmp_path}/there.sock", **there),
        ]

        found = []
        for context in told:
            (tmp_path / "context.json").write_text(json.dumps(context))
            settings = WorkerSettings.from_env({"SIDESTEP_CONTEXT": str(tmp_path / "context.json")})
            found.append((settings.address, settings.run_id))

        assert [(f"ipc://{tmp_path}/here.sock", "r"), *[("tcp://head:7711", "r")] * 2] == found

    def test_an_address_that_was_said_counts_more_unless_the_file_leads_there_too(self, tmp_path: Path):
        path = tmp_path / "context.json"
        told = context_of("ipc:///x.sock", "tcp://head:7711", "a" * 64, {})
        path.write_text(json.dumps(told | {"node": "another"}))

        found = [
            WorkerSettings.from_env({"SIDESTEP_CONTEXT": str(path), "SIDESTEP_ADDRESS": address}).address
            for address in ("ipc:///x.sock", "ipc:///other.sock")
        ]

        assert ["tcp://head:7711", "ipc:///other.sock"] == found

    def test_a_worker_with_a_key_looks_on_the_first_node(self, keys: Path):
        with_key = WorkerSettings(key_file=str(keys / "client.key"), port=7000)

        found = [Whereabouts(settings, head="gpu01").look() for settings in (with_key, WorkerSettings())]

        assert ["tcp://gpu01:7000", None] == [it and it.address for it in found]

    def test_what_is_wrong_with_a_key_is_said_and_harms_nobody(self, keys: Path):
        said: list[str] = []
        (keys / "client.key").chmod(0o644)
        settings = WorkerSettings(address="tcp://head:7711", key_file=str(keys / "client.key"))

        assert Whereabouts(settings, say=said.append).look() is None
        assert "others can read or change it" in said[0]

    @pytest.mark.parametrize(
        ("bound", "advertise", "remote"),
        [
            ("tcp://[::]:7711", None, f"tcp://{os.uname().nodename}:7711"),
            ("tcp://[::]:7711", "10.0.0.7", "tcp://10.0.0.7:7711"),
            ("tcp://0.0.0.0:7711", "fd00::7", "tcp://[fd00::7]:7711"),
            ("tcp://[fd00::1]:7711", None, "tcp://[fd00::1]:7711"),
        ],
    )
    def test_others_are_told_a_name_that_reaches_this_node(self, bound: str, advertise: str | None, remote: str):
        assert remote == remote_of(bound, advertise)


class TestHead:
    @pytest.mark.parametrize(
        ("environ", "node", "head"),
        [
            ({"MASTER_ADDR": "10.0.0.1", "SLURM_JOB_NODELIST": "gpu[07-09]"}, "gpu08", "10.0.0.1"),
            ({"MASTER_ADDR": "localhost", "SLURM_STEP_NODELIST": "gpu[07-09]"}, "gpu08", "gpu07"),
            ({"SLURM_JOB_NODELIST": "a-[001,005]-x,login"}, "n", "a-001-x"),
            (
                {"JOB_COMPLETION_INDEX": "3"},
                "train-3.svc.ns.svc.cluster.local",
                "train-0.svc.ns.svc.cluster.local",
            ),
            ({"JOB_COMPLETION_INDEX": "3"}, "elsewhere", None),
            # JobSet: the set, its replicated job, the number of the replica and that of the pod; with one replica
            ({"JOB_COMPLETION_INDEX": "3"}, "js-workers-0-3.js.ns.svc", "js-workers-0-0.js.ns.svc"),
            ({"JOB_COMPLETION_INDEX": "0"}, "js-workers-0-0", "js-workers-0-0"),
            # With more each replica has its own, unless all are told
            ({"JOB_COMPLETION_INDEX": "3"}, "js-workers-1-3", "js-workers-1-0"),
            (
                {"JOB_COMPLETION_INDEX": "3", "MASTER_ADDR": "js-workers-0-0.js"},
                "js-workers-1-3",
                "js-workers-0-0.js",
            ),
            ({}, "n", None),
        ],
    )
    def test_it_is_where_the_launcher_says(self, environ: dict[str, str], node: str, head: str | None):
        assert head == head_of(environ, node)

    def test_a_pod_is_found_by_the_name_of_its_service(self, tmp_path: Path):
        """As Kubernetes writes it into the pod's list of hosts; the pod calls itself `train-3`."""
        hosts = tmp_path / "hosts"
        hosts.write_text("127.0.0.1 localhost\n10.0.0.9\ttrain-3.heads.ns.svc.cluster.local\ttrain-3\n")
        environ = {"JOB_COMPLETION_INDEX": "3"}

        heads = [head_of(environ, "train-3", hosts=path) for path in (hosts, tmp_path / "none")]

        assert ["train-0.heads.ns.svc.cluster.local", "train-0"] == heads

    @pytest.mark.parametrize(
        ("hosts", "first"),
        [
            ("", None),
            ("a", "a"),
            ("a,b[1-2]", "a"),
            ("r1n[2,4-5]", "r1n2"),
            ("r[01-02]n[0,3],login", "r01n0"),
            ("r[1-", None),
            ("r[]", None),
        ],
    )
    def test_slurms_list_is_read(self, hosts: str, first: str | None):
        assert first == first_host(hosts)

    def test_a_host_of_ipv6_is_bracketed(self):
        assert "tcp://[fd00::1]:7711" == tcp_address("fd00::1", 7711)
