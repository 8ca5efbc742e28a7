"""The parts of the command line: labels by name, pipelines' own words, progress."""

import io
import json
import re
import sys

import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit.commands import labels, pipeline, progress
from tests.dit import _folders

NAMES = {
    0: "tench, Tinca tinca",
    2: "great white shark, white shark, man-eater",
    3: "7",
    134: "crane",
    207: "golden retriever",
    208: "Labrador retriever",
    517: "crane",
    999: "salt, pepper",
}


class TestLabels:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("207", [207]),
            (" 7 ,0,7", [7, 0, 7]),
            ("Golden  Retriever, 5", [207, 5]),
            ("white shark,tinca TINCA", [2, 0]),
            # All of a name out of the file is one label, not one for each synonym.
            (
                "tench, Tinca tinca, 5, great white shark,white shark,man-eater",
                [0, 5, 2],
            ),
            ("salt, pepper, salt", [999, 999]),
            # A number is the number of a class unless it is marked as a name.
            ('7, "7"', [7, 3]),
            ('"tench, Tinca tinca","golden retriever"', [0, 207]),
        ],
    )
    def test_numbers_and_names(self, text, expected):
        assert labels.read_labels(text, NAMES, "").tolist() == expected

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("crane", "classes 134 (crane) and 517 (crane); give the number"),
            ("retriever", "nearest names are: golden retriever, labrador retriever."),
            ("tensch", "nearest names are: tench"),
            ("zebra crossing", "'zebra crossing', which names no class here; give its"),
            ("tench,", "'', which names no class"),
        ],
    )
    def test_names_that_are_none(self, text, words):
        with pytest.raises(ValueError, match=re.escape(words)):
            labels.read_labels(text, NAMES, "")

    def test_without_names_the_reason_is_given(self):
        with pytest.raises(
            ValueError, match="'tench', which is no number, and because"
        ):
            labels.read_labels("207, tench", {}, "because")


class TestLabelNames:
    def test_of_a_pipeline(self, tmp_path):
        table = {"0": "tench, Tinca tinca", "10": "brambling"}
        index = {**_folders.INDEX, "id2label": table}
        _folders.write_json(tmp_path / "model_index.json", index)
        names = pipeline.label_names(tmp_path).by_label
        assert names == {0: "tench, Tinca tinca", 10: "brambling"}

    def test_that_were_not_written(self, tmp_path):
        assert "there is no" in pipeline.label_names(tmp_path).absence
        _folders.write_json(tmp_path / "model_index.json", _folders.INDEX)
        assert "no `id2label`" in pipeline.label_names(tmp_path).absence

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("{", "is no JSON"),
            ("[]", "holds a list, no settings"),
            (json.dumps({"id2label": ["tench"]}), "must give each class a name"),
            (json.dumps({"id2label": {"a": "tench"}}), "must give each class a name"),
            (json.dumps({"id2label": {"0": 1}}), "must give each class a name"),
        ],
    )
    def test_of_a_damaged_file(self, tmp_path, content, words):
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(ValueError, match=words) as error:
            pipeline.label_names(tmp_path)
        assert "model_index.json" in str(error.value)


class TestScheduler:
    @pytest.mark.parametrize(
        ("change", "flow", "words"),
        [
            ({"prediction_type": "v_prediction"}, False, "prediction_type='v_predict"),
            (
                {"beta_schedule": "scaled_linear"},
                False,
                "beta_schedule='scaled_linear'",
            ),
            ({"num_train_timesteps": 4000}, False, "num_train_timesteps=4000"),
            ({"trained_betas": [0.1]}, False, r"trained_betas=\[0.1\]"),
            ({"clip_sample": True}, False, "give `--clip` to do so, or `--no-clip`"),
            ({}, True, "predicts 'epsilon', and euler needs .* a velocity"),
        ],
    )
    def test_that_contradicts_the_sampler(self, tmp_path, change, flow, words):
        path = tmp_path / "scheduler" / "scheduler_config.json"
        _folders.write_json(path, {**_folders.SCHEDULER, **change})
        sampler = dit.Sampler.euler() if flow else dit.Sampler.ddim()
        with pytest.raises(ValueError, match=words):
            pipeline.check_scheduler(tmp_path, sampler, flow=flow)

    def test_that_agrees_or_is_not_there(self, tmp_path):
        pipeline.check_scheduler(tmp_path, dit.Sampler.ddim(), flow=False)
        path = tmp_path / "scheduler" / "scheduler_config.json"
        _folders.write_json(path, _folders.SCHEDULER)
        pipeline.check_scheduler(tmp_path, dit.Sampler.ddim(), flow=False)
        _folders.write_json(path, {**_folders.SCHEDULER, "clip_sample": True})
        for clip in (False, True):
            sampler = dit.Sampler.ddim(clip=clip)
            pipeline.check_scheduler(tmp_path, sampler, flow=False, clip=clip)
        _folders.write_json(path, {"_class_name": "FlowMatchEulerDiscreteScheduler"})
        pipeline.check_scheduler(tmp_path, dit.Sampler.euler(), flow=True)


class Terminal(io.StringIO):
    """What somebody watches, and what was written to it."""

    def isatty(self):
        return True


class TestProgress:
    def test_nobody_looks(self):
        with progress.progress_bar("sampling") as tell:
            assert tell is None

    @pytest.mark.parametrize(
        ("unit", "reports", "shown"),
        [
            # The steps of a program may report out of order.
            ("step", [(1, 4), (3, 4), (2, 4), (4, 4)], "4/4"),
            (
                "B",
                [(1_350_000_000, 2_700_000_000), (2_700_000_000,) * 2],
                "2.70G/2.70G",
            ),
        ],
    )
    def test_a_terminal_shows_how_far_it_is(self, monkeypatch, unit, reports, shown):
        monkeypatch.setattr(sys, "stderr", Terminal())
        with progress.progress_bar("going on", unit) as tell:
            for report in reports:
                tell(*report)
        last = sys.stderr.getvalue().split("\r")[-1]
        assert "going on: 100%" in last
        assert shown in last

    def test_without_tqdm_the_extra_is_named(self, monkeypatch):
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setitem(sys.modules, "tqdm", None)
        with (
            pytest.raises(ImportError, match="extra `dit`"),
            progress.progress_bar("sampling"),
        ):
            pass
