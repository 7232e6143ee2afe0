"""wandb's public names beside ours, and the page that lists them.

To write its tables anew: python -m tests.unit.test_surface
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import wandb

import sidestep
from sidestep import _about, elsewhere, keywords
from sidestep.companions import KEYWORDS

PAGE = Path(sidestep.__file__).with_name("SURFACE.md")
BEGIN, END = "<!-- the tables -->\n", "<!-- their end -->\n"
SAME, BETTER, OTHER, REFUSED, WANDBS, NOT_YET = "same", "better", "different", "refused", "wandb's own", "not yet"

MODULE: Mapping[str, tuple[str, str]] = {
    "AlertLevel": (SAME, ""),
    "Artifact": (BETTER, "files are taken as they are and read by another process; nothing raises: `log_artifact` "
                 "refuses what is wrong; what only the server knows (`version`, `download`, ...) is wandb's own"),
    "Audio": (BETTER, "samples need no other package; encoded by the daemon"),
    "Image": (BETTER, "floats in [0, 1] are not black; encoded by the daemon, from any rank"),
    "Config": (BETTER, "entries may always be changed; nothing raises but a missing one"),
    "__version__": (OTHER, "sidestep's own version"),
    "alert": (BETTER, "from any rank; told at most once, also across crashes"),
    "api": (OTHER, "`api.api_key` is the key of this process's environment; anything else is wandb's"),
    "config": (BETTER, "as `Config`; before `init()` it is said and without effect"),
    "define_metric": (BETTER, "a `*` anywhere in the name, `reduce=` over ranks, no chart without its axis"),
    "ensure_configured": (SAME, "does nothing"),
    "finish": (BETTER, "waits 5 s at most; says what was not acknowledged"),
    "init": (BETTER, "returns at once, in every rank; see its keywords"),
    "join": (SAME, "`finish()`"),
    "log": (BETTER, "about a microsecond; never waits, never raises; no step is thrown away"),
    "log_artifact": (BETTER, "returns at once, from any rank; each once, across crashes too; whole or not at all"),
    "log_model": (BETTER, "as `log_artifact`; what is under way when the training ends arrives"),
    "login": (OTHER, "says where the key belongs, which is with the daemon; asks nobody; True"),
    "mark_preempting": (SAME, ""),
    "require": (SAME, "does nothing"),
    "restore": (WANDBS, "fetched by wandb itself, if it is installed"),
    "run": (SAME, ""),
    "save": (OTHER, "returns the files that it found; `live` and `end` are looked at when the run is finished"),
    "sdk": (OTHER, "`wandb_run.Run`, `lib.RunDisabled`, `lib.config_util.ConfigError`; anything else is wandb's"),
    "setup": (SAME, "does nothing: no service runs in a worker"),
    "summary": (OTHER, "what this process set, media with the next row; last values are known to the run alone"),
    "teardown": (SAME, "`finish()`"),
    "termsetup": (SAME, "does nothing"),
    "use_artifact": (WANDBS, "asked of wandb itself, if it is installed; its use is not written down"),
    "use_model": (WANDBS, "likewise"),
    "util": (OTHER, "`generate_id`; anything else is wandb's"),
    "watch": (OTHER, "never waits for a GPU, in every rank; the graph of the model (`log_graph`) is not logged"),
}  # fmt: skip
"""What there is to say of names that the package has. One that is not here is as in wandb."""

ABSENT: Mapping[str, str] = {
    "link_model": _about.NOT_HERE["link_model"],
    "pin_config_keys": _about.NOT_HERE["pin_config_keys"],
    "wandb": "a module inside wandb",
}
"""Names of wandb's module that the package lacks, and why; one that is not here is to come."""

RUN: Mapping[str, tuple[str, str]] = {
    "alert": MODULE["alert"],
    "config": MODULE["config"],
    "config_static": (SAME, "a copy"),
    "define_metric": MODULE["define_metric"],
    "dir": (OTHER, "the run's directory on the daemon's side, `sidestep-runs/<time>-<id>`"),
    "display": (SAME, ""),
    "finish": MODULE["finish"],
    "group": (SAME, "setting it is said, and changes nothing"),
    "job_type": (SAME, "setting it is said, and changes nothing"),
    "log": MODULE["log"],
    "log_artifact": MODULE["log_artifact"],
    "log_code": (SAME, "small files are read at once"),
    "log_model": MODULE["log_model"],
    "save": MODULE["save"],
    "name": (BETTER, "may be set by any rank; the lowest that does counts"),
    "notes": (BETTER, "likewise"),
    "restore": MODULE["restore"],
    "resumed": (SAME, "waits up to 5 s for the run to be opened"),
    "settings": (OTHER, "what `init()` was given"),
    "starting_step": (SAME, "waits up to 5 s for the run to be opened"),
    "step": (OTHER, "the step that the next call without one takes; never waits"),
    "summary": MODULE["summary"],
    "sync_dir": (OTHER, "as `dir`"),
    "tags": (BETTER, "may be set by any rank; a tag that wandb refuses costs that tag alone"),
    "url": (SAME, "None offline; waits up to 5 s"),
    "use_artifact": MODULE["use_artifact"],
    "use_model": MODULE["use_model"],
    "watch": MODULE["watch"],
}

INIT: Mapping[str, tuple[str, str]] = {
    "allow_val_change": (BETTER, "entries may always be changed"),
    "anonymous": (SAME, "does nothing"),
    "config": (SAME, "a mapping, namespace, dataclass, flags of absl, or a file; `config-defaults.yaml` too; "
               "what a sweep chose wins"),
    "dir": (SAME, "for the daemon that a process starts by itself; else `sidestep run --dir`"),
    "force": (SAME, "does nothing: the key is the daemon's"),
    "id": (OTHER, "under `sidestep run` the command's run counts, and a differing id is said"),
    "mode": (OTHER, "online, offline, disabled; shared is what every run here is"),
    "reinit": (OTHER, "True and finish_previous finish the run before; else it is the one that there is"),
    "resume": (SAME, "allow, must, never; True and auto are allow"),
    "settings": (OTHER, "those that name the run count; the others are the daemon's business"),
}  # fmt: skip


def module_names() -> list[str]:
    """What `wandb.NAME` may be, but for what begins with an underscore."""
    return sorted({*wandb.__all__, *(name for name in dir(wandb) if not name.startswith("_"))})


def run_names() -> list[str]:
    return sorted({"summary", *(name for name in dir(wandb.Run) if not name.startswith("_"))})


def of_module(name: str) -> tuple[str, str]:
    """The verdict over a name of the module, and what there is to say."""
    if name in elsewhere.LOGGED_HERE:
        return WANDBS, "if wandb is installed; what it logs is logged here"
    if name in sidestep.__all__:
        return MODULE.get(name, (SAME, ""))
    if name in elsewhere.WANDBS:
        instead = elsewhere.WANDBS[name]
        return WANDBS, f"if wandb is installed; or {instead}" if instead else "if wandb is installed"
    if name in _about.NOT_HERE:
        return REFUSED, _about.NOT_HERE[name]
    return (OTHER, ABSENT[name]) if name in ABSENT else (NOT_YET, "")


def of_run(name: str) -> tuple[str, str]:
    if hasattr(sidestep.Run, name):
        return RUN.get(name, (SAME, ""))
    return (REFUSED, _about.NOT_HERE[name]) if name in _about.NOT_HERE else (NOT_YET, "")


def of_init(name: str) -> tuple[str, str]:
    if name in keywords.REFUSED.keys() - KEYWORDS:
        return REFUSED, keywords.REFUSED[name]
    return INIT.get(name, (SAME, ""))


def tables() -> str:
    """All names as they should stand in the page."""
    init = inspect.signature(wandb.init).parameters
    return "\n".join(
        [
            *_table("The module", [(name, *of_module(name)) for name in module_names()]),
            *_table("`Run`", [(name, *of_run(name)) for name in run_names()]),
            *_table("Keywords of `init`", [(name, *of_init(name)) for name in sorted(init)]),
        ]
    )


def _table(title: str, rows: list[tuple[str, str, str]]) -> Iterator[str]:
    yield from (f"## {title}", "", "| wandb | sidestep | |", "| --- | --- | --- |")
    yield from (f"| `{name}` | {verdict} | {what} |" for name, verdict, what in rows)
    yield ""


def page() -> str:
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


def verdicts(text: str) -> dict[tuple[str, str], str]:
    """Section and name to the verdict."""
    found, section = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line
        elif line.startswith("| `"):
            _, name, verdict, *_ = (cell.strip() for cell in line.split("|"))
            found[section, name] = verdict
    return found


class TestSurface:
    def test_every_name_of_wandbs_is_in_the_page_and_nothing_is_called_there_that_is_not(self):
        """To write it anew: python -m tests.unit.test_surface. What came since may still be called "not yet"."""
        said, now = verdicts(page()), verdicts(tables())

        assert said.keys() == now.keys()
        assert {} == {
            name: (verdict, now[name]) for name, verdict in said.items() if verdict not in (now[name], NOT_YET)
        }

    @pytest.mark.nightly
    def test_the_page_is_as_the_script_writes_it(self):
        assert tables() == page(), "python -m tests.unit.test_surface"

    def test_what_is_said_of_names_is_said_of_names_that_both_have(self):
        assert set() == MODULE.keys() - set(sidestep.__all__)
        assert set() == (MODULE.keys() | ABSENT.keys()) - {*module_names(), "ensure_configured", "join", "require"}
        assert set() == {name for name in RUN if not hasattr(sidestep.Run, name)} | RUN.keys() - set(run_names())
        assert set() == INIT.keys() - inspect.signature(wandb.init).parameters.keys()

    def test_what_is_absent_is(self):
        assert set() == (ABSENT.keys() | elsewhere.WANDBS.keys()) & set(sidestep.__all__)

    def test_what_is_wandbs_own_is_there(self):
        assert set() == elsewhere.WANDBS.keys() - set(module_names())

    def test_every_keyword_of_init_is_taken(self):
        ours = inspect.signature(sidestep.init).parameters
        taken = keywords.REFUSED.keys() | keywords.HARMLESS | KEYWORDS | {"tensorboard"} | ours.keys()

        assert set() == inspect.signature(wandb.init).parameters.keys() - taken

    def test_what_init_takes_by_its_place_is_in_wandbs_places(self):
        ours = [
            it.name
            for it in inspect.signature(sidestep.init).parameters.values()
            if it.kind is it.POSITIONAL_OR_KEYWORD
        ]

        assert list(inspect.signature(wandb.init).parameters)[: len(ours)] == ours

    def test_calls_take_what_wandbs_take(self):
        """Every parameter of wandb's can be given to ours by its name."""
        lacking = {}
        for name in sorted(set(run_names()) & set(dir(sidestep.Run))):
            theirs, ours = getattr(wandb.Run, name, None), inspect.getattr_static(sidestep.Run, name)
            if not callable(theirs) or not callable(ours) or name in ("finish",):
                continue
            mine = inspect.signature(getattr(sidestep.Run, name)).parameters
            if any(it.kind is inspect.Parameter.VAR_KEYWORD for it in mine.values()):
                continue
            if missing := [it for it in inspect.signature(theirs).parameters if it not in mine]:
                lacking[name] = missing

        assert {} == lacking


def main() -> None:
    """Write the tables into the page."""
    text = PAGE.read_text()
    PAGE.write_text(f"{text.partition(BEGIN)[0]}{BEGIN}{tables()}{END}")


if __name__ == "__main__":
    main()
