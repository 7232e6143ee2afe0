"""What was declared of metrics, and what follows for a name."""

from __future__ import annotations

import itertools
from typing import Any

import msgpack
import pytest

from sidestep.definitions import REDUCTIONS
from sidestepd.rules import Rule, Rules, Source, operations, rule_from


def rules_of(*rules: Rule) -> Rules:
    return Rules(rules)


class TestPrecedence:
    def test_an_exact_name_beats_every_pattern(self):
        rules = rules_of(Rule(pattern="*", reduce=("max",)), Rule(pattern="loss", reduce=("min",)))

        assert ("min",) == rules.of("loss").reduce

    def test_among_patterns_the_one_declared_first_wins(self):
        rules = rules_of(Rule(pattern="a*", reduce=("max",)), Rule(pattern="*a", reduce=("min",)))

        assert ("max",) == rules.of("aa").reduce
        assert ("min",) == rules.of("ba").reduce

    def test_each_attribute_is_found_by_itself(self):
        rules = rules_of(
            Rule(pattern="val/*", step_metric="epoch"),
            Rule(pattern="*", reduce=("max",), step_metric="other"),
            Rule(pattern="val/acc", summary="best", hidden=False),
        )

        assert (
            Rule(pattern="val/acc", step_metric="epoch", reduce=("max",), summary="best", hidden=False)
        ) == rules.of("val/acc")

    def test_a_repeated_pattern_keeps_its_place_and_takes_the_new_attributes(self):
        rules = rules_of(
            Rule(pattern="a*", reduce=("max",), summary="max"),
            Rule(pattern="*", reduce=("min",)),
            Rule(pattern="a*", reduce=("sum",)),
        )

        assert Rule(pattern="ab", reduce=("sum",), summary="max") == rules.of("ab")

    def test_a_declaration_counts_also_for_names_that_were_asked_for_before(self):
        rules = rules_of(Rule(pattern="*", reduce=("min",)))
        assert ("min",) == rules.of("loss").reduce

        rules.declare(Rule(pattern="loss", reduce=("max",)))

        assert ("max",) == rules.of("loss").reduce

    def test_of_a_name_that_nothing_was_declared_of_nothing_holds(self):
        assert Rule(pattern="loss") == rules_of().of("loss")


class TestPatterns:
    @pytest.mark.parametrize(
        ("pattern", "fits", "fails"),
        [
            ("*/loss", "train/deep/loss", "loss"),
            ("train/*/loss", "train/a/b/loss", "train/loss"),
            ("train/*", "train/a/b", "val/a"),
            ("layer?/norm", "layer7/norm", "layer77/norm"),
            ("layer[0-3]/norm", "layer2/norm", "layer7/norm"),
            ("*", "Loss", None),
            ("Loss", "Loss", "loss"),
        ],
    )
    def test_a_sign_may_stand_anywhere_and_a_star_crosses_slashes(self, pattern, fits, fails):
        rules = rules_of(Rule(pattern=pattern, summary="max"))

        assert "max" == rules.of(fits).summary
        assert fails is None or rules.of(fails).summary is None

    def test_a_name_with_brackets_is_also_itself(self):
        """`acc[top1]` as a pattern would only fit `acct`, `acco`, ..."""
        rules = rules_of(Rule(pattern="acc[top1]", summary="max"))

        assert "max" == rules.of("acc[top1]").summary
        assert [] == rules.unmatched(["acc[top1]"])

    def test_patterns_that_fit_no_name_are_told(self):
        rules = rules_of(Rule(pattern="val/*"), Rule(pattern="tset/*"), Rule(pattern="exact"))

        assert ["tset/*"] == rules.unmatched(["val/acc", "loss"])

    def test_step_metrics_of_all_declarations_are_known(self):
        rules = rules_of(Rule(pattern="val/*", step_metric="epoch"), Rule(pattern="loss"))

        assert {"epoch"} == rules.step_metrics


class TestNamesMadeOfNames:
    @pytest.mark.parametrize(
        "made", ["loss.max", "loss/rank3", "loss.late", "loss.max.late", "loss.mean:n", "loss"]
    )
    def test_they_take_from_their_name_what_is_not_declared_of_themselves(self, made):
        rules = rules_of(Rule(pattern="loss", step_metric="epoch", summary="min", hidden=True))

        assert Rule(pattern=made, step_metric="epoch", summary="min", hidden=True) == rules.of_made(made)

    def test_their_own_declaration_comes_first(self):
        rules = rules_of(Rule(pattern="loss", summary="min"), Rule(pattern="loss.max", summary="max"))

        assert "max" == rules.of_made("loss.max").summary

    @pytest.mark.parametrize("name", ["loss.maximum", "loss/rank", "loss/rank3x", "losslate", ".late"])
    def test_a_name_that_only_looks_like_one_is_a_name(self, name):
        rules = rules_of(Rule(pattern="loss", summary="min"))

        assert rules.of_made(name).summary is None


class TestReadingDeclarations:
    def test_everything_that_was_said_is_read(self):
        said = {
            "name": "v/*",
            "step_metric": "epoch",
            "reduce": ["mean", "max"],
            "summary": "min,max",
            "hidden": True,
        }

        assert (
            Rule(pattern="v/*", step_metric="epoch", reduce=("mean", "max"), summary="min,max", hidden=True)
        ) == rule_from(said)

    @pytest.mark.parametrize(
        ("said", "meant"),
        [
            ({"summary": "best", "goal": "minimize"}, "min"),
            ({"summary": "best", "goal": "maximize"}, "max"),
            ({"summary": "best"}, None),
            ({"summary": "last, bogus"}, "last"),
            ({"summary": "bogus"}, None),
            ({"summary": 5}, None),
        ],
    )
    def test_only_what_wandb_knows_is_asked_for_the_summary(self, said: dict[str, Any], meant: str | None):
        """wandb raises at what it does not know, and a script's slip is no reason to be without its rows."""
        assert meant == rule_from({"name": "loss", **said}).summary

    def test_what_is_said_through_a_stage_speaks_of_its_names(self):
        """Its metrics, its axis metric and its weights lie under the stage."""
        said = {"name": "acc", "step_metric": "epoch", "reduce": "mean:n"}

        assert Rule(pattern="val/acc", step_metric="val/epoch", reduce=("mean:val/n",)) == rule_from(said, "val")

    def test_the_main_axis_is_meant_also_in_a_stage(self):
        assert "global_step" == rule_from({"name": "acc", "step_metric": "global_step"}, "val").step_metric

    @pytest.mark.parametrize(
        "said",
        [
            {}, {"name": ""}, {"name": 5}, {"name": ["a"]}, {"name": "a", "step_metric": 5},
            {"name": "a", "reduce": "median"}, {"name": "a", "reduce": 5}, {"name": "a", "reduce": True},
            {"name": "a", "reduce": {"mean": 1}}, {"name": "a", "reduce": [["mean"]]},
            {"name": "a", "reduce": b"mean"},
            {"name": "a", "reduce": "mean:"}, {"name": "a", "reduce": ["mean", None]},
        ],
    )  # fmt: skip
    def test_nonsense_is_a_value_error(self, said):
        """Never another exception: a worker must not be able to end delivery."""
        with pytest.raises(ValueError, match=r"define_metric|reduce"):
            rule_from(said)

    def test_summary_and_hidden_that_are_no_such_are_left_out(self):
        assert Rule(pattern="a") == rule_from({"name": "a", "summary": 5, "hidden": "yes"})

    def test_the_known_operations_are_named_in_the_error(self):
        with pytest.raises(ValueError, match=r"'median'.*argmax_rank, count.*per_rank.*mean:NAME"):
            operations("median")

    def test_every_operation_is_taken(self):
        assert (*sorted(REDUCTIONS), "mean:n") == operations([*sorted(REDUCTIONS), "mean:n"])

    @pytest.mark.parametrize("nothing", [None, [], ()])
    def test_no_operation_is_none(self, nothing):
        assert operations(nothing) is None


class TestState:
    def test_what_is_restored_answers_alike_and_keeps_the_order(self):
        rules = rules_of(
            Rule(pattern="a*", reduce=("max", "min")),
            Rule(pattern="*a", step_metric="e", summary="s", hidden=False),
        )
        other = Rules()

        other.restore(msgpack.unpackb(msgpack.packb(rules.state())))

        assert rules.of("aa") == other.of("aa")
        assert rules.step_metrics == other.step_metrics
        assert rules.state() == other.state()


class TestSources:
    def rules(self, *sources: Source, pattern: str = "loss") -> Rules:
        return Rules(Rule(pattern=pattern, reduce=(source.name.lower(),), source=source) for source in sources)

    def test_the_command_line_beats_the_code_and_the_code_a_file(self):
        for sources in itertools.permutations(Source):
            without = [source for source in sources if source is not Source.COMMAND_LINE]

            assert ("command_line",) == self.rules(*sources).of("loss").reduce
            assert ("code",) == self.rules(*without).of("loss").reduce

    def test_a_pattern_of_the_command_line_beats_an_exact_name_of_the_code(self):
        """Who types it wants it, and can name what is excepted."""
        rules = self.rules(Source.COMMAND_LINE, pattern="l*")
        rules.declare(Rule(pattern="loss", reduce=("max",), summary="min"))

        assert (("command_line",), "min") == (rules.of("loss").reduce, rules.of("loss").summary)

    def test_only_what_the_code_said_is_remembered_of_a_life(self):
        """The rest is configured again, perhaps otherwise."""
        rules = self.rules(*Source)

        assert [["loss", None, ["code"], None, None]] == rules.state()
