"""Settings of the optimizer that cannot work or mean nothing are refused, each by its own key."""

import pytest

from torchtitan.config.checks import check_config
from torchtitan.config.faults import ConfigError
from torchtitan.config.manager import load_config
from torchtitan.config.optimizer_groups import OptimizerGroup, read_groups
from torchtitan.config.toml_file import save_toml


def refused(*argv):
    return {fault.setting for fault in check_config(load_config(argv))}


BF16 = "--training.dtype=bfloat16"
ROUND = "--optimizer.bf16_stochastic_round"


@pytest.mark.parametrize(
    ("argv", "setting"),
    [
        (["--optimizer.muon_momentum=1"], "optimizer.muon_momentum"),
        (["--optimizer.name=Muon", "--optimizer.muon_momentum=1"], "optimizer.muon_momentum"),
        (["--optimizer.name=AdamW8bit", "--optimizer.muon_momentum=0.9"], "optimizer.muon_momentum"),
        (["--optimizer.muon_lr_adjustment=original"], "optimizer.muon_lr_adjustment"),
        ([ROUND], "optimizer.bf16_stochastic_round"),
        ([ROUND, BF16, "--optimizer.name=Adam"], "optimizer.bf16_stochastic_round"),
        ([ROUND, BF16, "--optimizer.name=Muon"], "optimizer.bf16_stochastic_round"),
        ([ROUND, BF16, "--optimizer.implementation=foreach"], "optimizer.implementation"),
        (["--optimizer.name=AdamW8bit", "--optimizer.implementation=foreach"], "optimizer.implementation"),
        (["--optimizer.groups=[{patterns='*', optimizer='AdamW'}]"], "optimizer.groups[0].optimizer"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(argv, setting):
    assert setting in refused(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--optimizer.name=Muon", "--optimizer.muon_momentum=0", "--optimizer.muon_lr_adjustment=original"],
        ["--optimizer.name=Muon", "--optimizer.implementation=foreach"],
        ["--optimizer.name=AdamW8bit", "--optimizer.implementation=for-loop"],
        [ROUND, BF16],
        [ROUND, BF16, "--optimizer.name=AdamW8bit"],
        ["--optimizer.groups=[{patterns='*', weight_decay=0}, {patterns=['a', 'b'], lr_scale=2}]"],
    ],
)  # fmt: skip
def test_what_works_is_accepted(argv):
    assert refused(*argv) == set()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{pattern='*norm*', lr_scale=2}", "groups[0].pattern = \"*norm*\": is not a key of a group. Did you mean patterns?"),
        ("{patterns='*', lr_scale='2'}", "groups[0].lr_scale = \"2\": expects a number. Write it without quotes: 2."),
        ("{patterns=3, lr_scale=2}", "groups[0].patterns = 3: expects a string or a list of strings."),
        ("{patterns='*', weight_decay=-1}", "groups[0].weight_decay = -1: must be at least 0."),
        ("{patterns='*', lr_scale=nan}", "groups[0].lr_scale = NaN: must be at least 0."),
        ("{patterns=[], lr_scale=2}", "groups[0] = {\"patterns\": [], \"lr_scale\": 2}: matches nothing."),
        ("{patterns='*'}", "groups[0] = {\"patterns\": \"*\"}: sets nothing. Give one of lr_scale, weight_decay, optimizer."),
        ("{patterns='*', optimizer='Adam'}", "groups[0].optimizer = \"Adam\": expects one of \"AdamW\", \"Muon\"."),
    ],
)  # fmt: skip
def test_tables_are_checked(table, message):
    faults = check_config(load_config(["--optimizer.name=Muon", f"--optimizer.groups=[{table}]"]))
    assert any(str(fault).startswith(f"optimizer.{message}") for fault in faults), faults


def test_tables_in_a_file_survive_its_writing(tmp_path):
    (tmp_path / "mine.toml").write_text(
        '[optimizer]\nlr = 1e-3\n\n[[optimizer.groups]]\npatterns = "*norm*"\nweight_decay = 0.0\n'
        '\n[[optimizer.groups]]\npatterns = ["output.*"]\nlr_scale = 0.5\n'
    )
    config = load_config(["--job.config_file", str(tmp_path / "mine.toml")])
    assert read_groups(config.optimizer) == [
        OptimizerGroup(["*norm*"], weight_decay=0.0),
        OptimizerGroup(["output.*"], lr_scale=0.5),
    ]
    save_toml(config, tmp_path / "config.toml")
    again = load_config(["--job.config_file", str(tmp_path / "config.toml")])
    assert again.optimizer == config.optimizer


@pytest.mark.parametrize(
    "cleared", [["--optimizer.groups", "[]"], ["--optimizer.groups=[]"], ["--optimizer.groups"]]
)
def test_groups_of_a_file_can_be_cleared(tmp_path, cleared):
    file = tmp_path / "run.toml"
    file.write_text('[[optimizer.groups]]\npatterns = "*"\nlr_scale = 2\n')
    argv = ["--job.config_file", str(file)]
    assert load_config(argv).optimizer.groups
    assert load_config([*argv, *cleared, "--training.steps=2"]).optimizer.groups == []


@pytest.mark.parametrize(
    "argv", [["--optimizer.groups", "{}", "{}"], ["--optimizer.groups", "x"], ["--training.dataset"]]
)
def test_other_options_need_their_value(argv):
    with pytest.raises(ConfigError):
        load_config(argv)
